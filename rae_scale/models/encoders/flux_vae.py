"""The FLUX VAE, the paper's baseline for reconstruction latents (section 4), through diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from rae_scale.models.encoders.base import FrozenEncoder
from rae_scale.models.pretrained import from_pretrained

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PACK = 2  # latents are packed 2 x 2: 16 channels on 32 x 32 become 64 on 16 x 16

FLUX_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


class FluxVAEEncoder(FrozenEncoder):
    """(z - shift) * scale, packed 2 x 2 into tokens. At 256 pixels: 256 tokens of 64 channels."""

    def __init__(self, model: AutoencoderKL, image_size: int = 256) -> None:
        config = model.config
        reduction = 2 ** (len(config.block_out_channels) - 1)
        super().__init__(
            image_size=image_size,
            num_tokens=(image_size // (reduction * PACK)) ** 2,
            channels=config.latent_channels * PACK**2,
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.5, 0.5, 0.5),
        )
        self.model = model
        self.shift = config.shift_factor
        self.scale = config.scaling_factor

    def forward(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map pixels [B, 3, S, S] in [0, 1] to latents [B, T, C], float32.

        noise: standard normal [B, T, C] that draws a sample of the posterior, as the paper trains; its source is the
        caller's so that it can be a function of the sample. None gives the posterior's mode.
        """
        return self.encode(self.normalise(pixels), noise).float()

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        posterior = self.model.encode(images).latent_dist
        z = pack(posterior.mean)
        if noise is not None:
            z = z + pack(posterior.std) * noise
        return (z - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents [B, T, C] to pixels [B, 3, S, S] in [0, 1]."""
        z = unpack(latents) / self.scale + self.shift
        images = self.model.decode(z).sample
        return (images * self._std + self._mean).float().clamp(0, 1)


def pack(z: Tensor) -> Tensor:
    """[B, C, H, W] to tokens [B, H/2 * W/2, 4 C] in row-major order, a token's entries ordered channel, row, column."""
    return F.pixel_unshuffle(z, PACK).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor) -> Tensor:
    """Tokens [B, T, 4 C] of a square grid to [B, C, H, W]: the inverse of `pack`."""
    side = round(tokens.shape[1] ** 0.5)
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), PACK)


def load_flux_vae(path: str | None) -> FluxVAEEncoder:
    """The FLUX VAE with random weights, or the AutoencoderKL at `path`: its own folder, or a FLUX folder or hub id.

    ValueError if diffusers is not installed or the weights cannot be read.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ValueError(
            "model.encoder.name='flux-vae' needs the diffusers package; install it with `pip install '.[vae]'`"
        ) from error
    if path is None:
        return FluxVAEEncoder(AutoencoderKL(**FLUX_CONFIG))
    subfolder = None if (Path(path) / "config.json").is_file() else "vae"
    model = from_pretrained(AutoencoderKL, path, "model.encoder.path", subfolder=subfolder, torch_dtype=torch.float32)
    return FluxVAEEncoder(model)
