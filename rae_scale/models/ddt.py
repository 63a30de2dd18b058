"""The wide DDT head (paper section 3.3): two blocks, wider than the backbone, that predict the velocity.

The backbone's output s, not the time and text condition, modulates the head, token by token; the head reads the noisy
latents afresh. This is the wiring of the Scale-RAE release: the time is not added again after the backbone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_scale.models.blocks import (
    AttentionFn,
    DiTBlock,
    Rope,
    check_heads,
    init_linear,
    padded_width,
    swiglu_width,
)
from rae_scale.models.positions import HEAD_DIM_MULTIPLE, rope_2d_tables


@dataclass(frozen=True)
class DDTHeadConfig:
    """Dimensions of the head. The number of heads for width 2688 is unpublished; 21 gives the RAE paper's 128."""

    hidden_size: int = 2688
    depth: int = 2
    num_heads: int = 21

    def __post_init__(self) -> None:
        check_heads("DDT head", self.hidden_size, self.num_heads, HEAD_DIM_MULTIPLE)

    @property
    def padded_inner_size(self) -> int:
        """Width of the blocks' SwiGLU as it is held."""
        return padded_width(swiglu_width(self.hidden_size))


class DDTHead(nn.Module):
    """Wide blocks over a second embedding of the noisy latents (no added positions, rotary ones only)."""

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(
        self,
        cfg: DDTHeadConfig,
        *,
        in_channels: int,
        backbone_size: int,
        grid_size: int,
        qk_norm: bool,
        attention: AttentionFn,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.grid_size = grid_size
        self.x_embed = nn.Linear(in_channels, cfg.hidden_size)
        self.condition = nn.Linear(backbone_size, cfg.hidden_size)
        self.blocks = nn.ModuleList(
            DiTBlock(cfg.hidden_size, cfg.num_heads, cfg.hidden_size, qk_norm=qk_norm, attention=attention)
            for _ in range(cfg.depth)
        )
        table = torch.empty(grid_size**2, cfg.hidden_size // cfg.num_heads)
        self.register_buffer("rope_cos", table, persistent=False)
        self.register_buffer("rope_sin", table.clone(), persistent=False)

    def init_weights(self) -> None:
        init_linear(self.x_embed)
        init_linear(self.condition)
        for block in self.blocks:
            block.init_weights()
        self.init_constants()

    @torch.no_grad()
    def init_constants(self) -> None:
        cos, sin = rope_2d_tables(self.cfg.hidden_size // self.cfg.num_heads, self.grid_size)
        self.rope_cos.copy_(cos)
        self.rope_sin.copy_(sin)

    def forward(self, x: Tensor, s: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Map latents [B, T, C] and backbone output s [B, T, backbone] to tokens and activated condition.

        Both results are [B, T, head hidden]; the final layer is conditioned like the head's blocks.
        """
        activated = F.silu(self.condition(F.silu(s)))
        rope = Rope(self.rope_cos[positions], self.rope_sin[positions])
        hidden = self.x_embed(x)
        for block in self.blocks:
            hidden = block(hidden, activated, rope)
        return hidden, activated
