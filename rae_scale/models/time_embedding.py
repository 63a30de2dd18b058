"""Gaussian Fourier features of the flow time, and the MLP that lifts them to the conditioning width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCY_SEED = 114514  # of the official release, whose checkpoints do not hold the frequencies
NUM_FREQUENCIES = 256


def fourier_frequencies() -> Tensor:
    """The fixed frequencies W ~ N(0, 1), float32 [256]; the same numbers as in the official release."""
    generator = torch.Generator(device="cpu").manual_seed(FREQUENCY_SEED)
    return torch.randn(NUM_FREQUENCIES, generator=generator, device="cpu")


class Float32Linear(nn.Linear):
    """Computes in float32 whatever autocast says and in whatever precision its weights are handed to it: sharded
    engines gather them in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # there is none on meta
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class TimeEmbedding(nn.Module):
    """t -> [sin(2 pi t W), cos(2 pi t W)] -> Linear -> SiLU -> Linear.

    Always computed in float32, also under autocast: 2 pi t W reaches 20, where neighbouring bfloat16 numbers are
    0.125 apart, as much as a step of the sampler.
    """

    frequencies: Tensor

    def __init__(self, z_channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Float32Linear(2 * NUM_FREQUENCIES, z_channels), nn.SiLU(), Float32Linear(z_channels, z_channels)
        )
        self.register_buffer("frequencies", torch.empty(NUM_FREQUENCIES), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.init_constants()

    @torch.no_grad()
    def init_constants(self) -> None:
        self.frequencies.copy_(fourier_frequencies())

    def forward(self, t: Tensor) -> Tensor:
        """Map times [B] in [0, 1] to float32 [B, z_channels]."""
        angles = 2 * math.pi * t.float()[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))
