"""What every frozen encoder has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

RGB = tuple[float, float, float]


class FrozenEncoder(nn.Module, ABC):
    """Pixels to the latents that the DiT generates and the language model reads.

    Calling it maps pixels [B, 3, S, S] in [0, 1] to float32 [B, T, C], tokens of a square grid in row-major order.
    S is `image_size`, T `num_tokens`, C `channels`. It applies its own `image_mean` and `image_std`. Gradients are
    the caller's to switch off: the encoder stage trains one of these.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, *, image_size: int, num_tokens: int, channels: int, image_mean: RGB, image_std: RGB) -> None:
        super().__init__()
        self.image_size = image_size
        self.num_tokens = num_tokens
        self.channels = channels
        self.image_mean = image_mean
        self.image_std = image_std
        self.register_buffer("_mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(image_std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map pixels [B, 3, S, S] in [0, 1] to latents [B, T, C], float32. ValueError if S is not `image_size`."""
        return self.encode(self.normalise(pixels)).float()

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Map images with this encoder's mean and std, [B, 3, S, S], to latents [B, T, C]."""

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] in [0, 1] to this encoder's mean and std."""
        expected = (3, self.image_size, self.image_size)
        if pixels.shape[1:] != expected:
            raise ValueError(
                f"{type(self).__name__} takes pixels [B, {', '.join(map(str, expected))}], got {list(pixels.shape)}; "
                f"resize the images to {self.image_size} x {self.image_size}"
            )
        return (pixels - self._mean) / self._std
