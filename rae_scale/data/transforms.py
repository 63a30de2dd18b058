"""From an encoded image to the pixels that the encoders take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rae_scale.config.schema import Crop
from rae_scale.data.decode import decode_image
from rae_scale.data.draws import Draw, uniform


@dataclass(frozen=True)
class ImageTransform:
    """Decode, crop, resize and mirror. What is random is a function of (seed, sample index).

    size: side of the result. max_pixels, scaled_decode: see `decode_image`.
    crop: "square" squashes the whole picture, as the official release does; "center" and "random" keep the proportions
          of the largest square in the middle, or anywhere, and lose the rest.
    flip: mirror half of the pictures.
    """

    size: int
    max_pixels: int
    crop: Crop = "square"
    flip: bool = False
    scaled_decode: bool = False
    seed: int = 0

    def __call__(self, data: bytes, sample_index: int, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 RGB `[size, size, 3]`, written to `out` if that is given. Raises BadImage."""
        image = decode_image(data, self.max_pixels, at_least=self.size if self.scaled_decode else None)
        if self.crop != "square":
            place = 0.5 if self.crop == "center" else uniform(self.seed, sample_index, Draw.CROP)
            image = largest_square(image, place)
        if self.flip and uniform(self.seed, sample_index, Draw.FLIP) < 0.5:
            image = np.ascontiguousarray(image[:, ::-1])
        return resize_square(image, self.size, out)


def largest_square(image: np.ndarray, place: float) -> np.ndarray:
    """The largest square of `[H, W, 3]`, a view. place: in [0, 1], from the left or top of the room that there is."""
    height, width, _ = image.shape
    side = min(height, width)
    top, left = (round(place * (length - side)) for length in (height, width))
    return image[top : top + side, left : left + side]


def resize_square(image: np.ndarray, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """Resize uint8 `[H, W, 3]` straight to uint8 `[size, size, 3]`, whatever the aspect ratio.

    The "square" preprocessing of the official release: antialiased bicubic. Within one level of Pillow's (but for
    overshoots at sharp edges) and five times as fast. An image that has the size already is returned as it is.
    out: C-contiguous `[size, size, 3]`, which then holds the result and is returned.
    """
    if out is None and image.shape[:2] == (size, size):
        return image
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    if image.shape[:2] == (size, size):
        out[:] = image
        return out
    # torch's uint8 kernel wants channels last, which is how the image lies in memory. It only sees that if the batch
    # of one has the stride of a whole image; else it would write channels first, and half of its time again is lost.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    resized = torch.from_numpy(out)[None].permute(0, 3, 1, 2)
    # What F.interpolate(mode="bicubic", antialias=True, align_corners=False) calls, which takes no `out`.
    torch.ops.aten._upsample_bicubic2d_aa.out(pixels, [size, size], False, None, None, out=resized)
    return out


def to_float(pixels: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` to float32 `[B, 3, H, W]` in [0, 1], on their device; an encoder normalises as it wants."""
    count, height, width, channels = pixels.shape
    result = torch.empty(count, channels, height, width, dtype=torch.float32, device=pixels.device)
    # A CUDA kernel multiplies by 1 / 255 if that is a number of the host, which rounds otherwise than a CPU's division.
    most = torch.full((), 255.0, dtype=torch.float32, device=pixels.device)
    return torch.div(pixels.permute(0, 3, 1, 2), most, out=result)
