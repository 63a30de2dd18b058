"""The ViT decoder of the representation autoencoder: latent tokens to pixels (paper section 2; RAE's ViT-B, L, XL).

A linear embedding, a learned class token in front, fixed positions, pre-norm transformer blocks, and one linear layer
from each token to its patch of pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rae_scale import ops
from rae_scale.models.blocks import Attention, AttentionFn, check_heads
from rae_scale.models.positions import sincos_2d

INIT_STD = 0.02  # as in ViT-MAE, whose decoder this is
RGB = 3


@dataclass(frozen=True)
class ViTDecoderConfig:
    """Dimensions of a decoder; `image_mean` and `image_std` are those of the encoder's pixel normalisation.

    ValueError if the heads do not fit `hidden_size` or the patches do not fit `image_size`.
    """

    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    layer_norm_eps: float = 1e-12
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        check_heads("ViT decoder", self.hidden_size, self.num_heads)
        if self.hidden_size % 4:
            raise ValueError(
                f"ViT decoder: hidden_size={self.hidden_size} does not divide by 4, which the 2-D position table "
                f"needs; choose {self.hidden_size + -self.hidden_size % 4}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"ViT decoder: image_size={self.image_size} does not divide by patch_size={self.patch_size}; choose "
                f"{self.image_size - self.image_size % self.patch_size} or another patch_size"
            )

    @property
    def grid_size(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid_size**2


class DecoderOutput(NamedTuple):
    """What the decoder predicts, in the encoder's normalised pixel space."""

    logits: Tensor
    """[B, T, patch * patch * 3], a token's pixels row by row, colours innermost."""
    image_before_denormalise: Tensor
    """[B, 3, image_size, image_size]."""


class MLP(nn.Module):
    """Linear, exact GELU, Linear."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DecoderBlock(nn.Module):
    """Pre-norm attention and MLP, [B, T, hidden] to [B, T, hidden]."""

    def __init__(self, cfg: ViTDecoderConfig, attention: AttentionFn) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.attn = Attention(cfg.hidden_size, cfg.num_heads, qk_norm=False, attention=attention)
        self.norm2 = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViTDecoder(nn.Module):
    """Latent tokens [B, T, in_channels] to pixels."""

    pos_embed: Tensor
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, cfg: ViTDecoderConfig, attention: AttentionFn = ops.attention) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Linear(cfg.in_channels, cfg.hidden_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, cfg.hidden_size))
        self.blocks = nn.ModuleList(DecoderBlock(cfg, attention) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.hidden_size, eps=cfg.layer_norm_eps)
        self.pred = nn.Linear(cfg.hidden_size, cfg.patch_size**2 * RGB)
        self.register_buffer("pos_embed", torch.empty(1 + cfg.num_tokens, cfg.hidden_size), persistent=False)
        self.register_buffer("image_mean", torch.empty(RGB, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.empty(RGB, 1, 1), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Set every parameter and constant afresh: also what fills a model made by `to_empty` from meta."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.cls_token, std=INIT_STD)
        self.init_constants()

    @torch.no_grad()
    def init_constants(self) -> None:
        """Set what training never changes and no checkpoint has to hold: position table and pixel statistics."""
        self.pos_embed[0].zero_()  # the class token has no place on the grid
        self.pos_embed[1:].copy_(sincos_2d(self.cfg.hidden_size, self.cfg.grid_size))
        self.image_mean.copy_(torch.tensor(self.cfg.image_mean, device="cpu").view(RGB, 1, 1))
        self.image_std.copy_(torch.tensor(self.cfg.image_std, device="cpu").view(RGB, 1, 1))

    def forward(self, z: Tensor) -> DecoderOutput:
        """Map latents [B, T, in_channels] to patches and their image, both before denormalisation.

        ValueError if T or the channels are not the decoder's.
        """
        if z.shape[1:] != (self.cfg.num_tokens, self.cfg.in_channels):
            raise ValueError(
                f"latents are [tokens, channels] = {list(z.shape[1:])}, the decoder was built for "
                f"{[self.cfg.num_tokens, self.cfg.in_channels]}; use the decoder of the latents' encoder"
            )
        x = torch.cat([self.cls_token.expand(len(z), -1, -1), self.embed(z)], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        logits = self.pred(self.norm(x)[:, 1:])
        return DecoderOutput(logits, unpatchify(logits, self.cfg.patch_size))

    def decode(self, z: Tensor) -> Tensor:
        """Map latents [B, T, in_channels] to pixels [B, 3, image_size, image_size], clamped to [0, 1]."""
        image = self(z).image_before_denormalise
        return (image * self.image_std + self.image_mean).clamp(0, 1)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Lay patches [B, T, patch * patch * 3] of a square row-major grid out as an image [B, 3, S, S]."""
    grid_size = round(patches.shape[1] ** 0.5)
    tiles = patches.unflatten(2, (patch_size, patch_size, RGB)).unflatten(1, (grid_size, grid_size))
    return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
