"""From decoded pixels to what the encoders take."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def resize_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 `[H, W, 3]` straight to uint8 `[size, size, 3]`, whatever the aspect ratio.

    The "square" preprocessing of the official release: antialiased bicubic. Within one level of Pillow's (but for
    overshoots at sharp edges) and five times as fast. An image that has the size already is returned as it is.
    """
    if image.shape[:2] == (size, size):
        return image
    # torch's uint8 kernel wants channels last, which is how the image lies in memory.
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def to_float(image: np.ndarray) -> torch.Tensor:
    """uint8 `[H, W, 3]` to float32 `[3, H, W]` in [0, 1]; each encoder applies its own mean and deviation."""
    return torch.tensor(image).permute(2, 0, 1).to(torch.float32).div_(255.0)
