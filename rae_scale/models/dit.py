"""The diffusion transformer of Scale-RAE (paper section 3.1, Table 10): one LLM query state modulates one latent token.

There is no cross-attention and no text token inside. The condition c = SiLU(t_emb + y) is [B, T, z], and every block's
adaLN layer maps it to six vectors per token. An optional wide head (`ddt.py`, paper section 3.3) predicts the velocity
from the backbone's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_scale import ops
from rae_scale.models.blocks import (
    AttentionFn,
    DiTBlock,
    FinalLayer,
    Rope,
    check_heads,
    init_linear,
    padded_width,
    swiglu_width,
)
from rae_scale.models.ddt import DDTHead, DDTHeadConfig
from rae_scale.models.positions import HEAD_DIM_MULTIPLE, rope_2d_tables, sincos_2d
from rae_scale.models.time_embedding import TimeEmbedding


@dataclass(frozen=True)
class DiTConfig:
    """Dimensions of a DiT; `ddt` adds the wide head. ValueError if the heads do not fit `hidden_size`."""

    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    z_channels: int
    grid_size: int = 16
    qk_norm: bool = False
    class_dropout_prob: float = 0.1
    ddt: DDTHeadConfig | None = None

    def __post_init__(self) -> None:
        check_heads("DiT", self.hidden_size, self.num_heads, HEAD_DIM_MULTIPLE)

    @property
    def num_tokens(self) -> int:
        return self.grid_size**2

    @property
    def padded_inner_size(self) -> int:
        """Width of the blocks' SwiGLU as it is held."""
        return padded_width(swiglu_width(self.hidden_size))


class ConditionEmbedding(nn.Module):
    """c = SiLU(t_emb + y), where a learned null vector stands in for y in the samples that are dropped."""

    def __init__(self, z_channels: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(z_channels)
        self.null = nn.Parameter(torch.zeros(z_channels))

    def init_weights(self) -> None:
        self.time.init_weights()
        nn.init.zeros_(self.null)

    def forward(self, t: Tensor, y: Tensor, drop: Tensor | None) -> Tensor:
        """Map t [B], y [B, T, z] and drop bool [B] to float32 [B, T, z]."""
        if drop is None:
            drop = torch.zeros_like(t, dtype=torch.bool)
        # Chosen by value, not by branch: every process runs the same graph whatever its samples are.
        y = torch.where(drop[:, None, None], self.null, y)
        return F.silu(self.time(t)[:, None, :] + y)


class DiT(nn.Module):
    """Velocity of noisy latents, conditioned token by token.

    Under bf16 autocast the matrix products run in bfloat16, while the time embedding, the condition, the residual
    stream and the norm statistics stay float32: the time embedding and the position table are float32 and type
    promotion carries that on. `attention` is injected so that sequence parallelism can wrap it.
    """

    pos_embed: Tensor
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, cfg: DiTConfig, attention: AttentionFn = ops.attention) -> None:
        super().__init__()
        self.cfg = cfg
        self.x_embed = nn.Linear(cfg.in_channels, cfg.hidden_size)
        self.condition = ConditionEmbedding(cfg.z_channels)
        self.blocks = nn.ModuleList(
            DiTBlock(cfg.hidden_size, cfg.num_heads, cfg.z_channels, qk_norm=cfg.qk_norm, attention=attention)
            for _ in range(cfg.depth)
        )
        self.head: DDTHead | None = None
        if cfg.ddt is None:
            self.final = FinalLayer(cfg.hidden_size, cfg.z_channels, cfg.in_channels)
        else:
            self.head = DDTHead(
                cfg.ddt,
                in_channels=cfg.in_channels,
                backbone_size=cfg.hidden_size,
                grid_size=cfg.grid_size,
                qk_norm=cfg.qk_norm,
                attention=attention,
            )
            self.final = FinalLayer(cfg.ddt.hidden_size, cfg.ddt.hidden_size, cfg.in_channels)
        head_dim = cfg.hidden_size // cfg.num_heads
        self.register_buffer("pos_embed", torch.empty(cfg.num_tokens, cfg.hidden_size), persistent=False)
        self.register_buffer("rope_cos", torch.empty(cfg.num_tokens, head_dim), persistent=False)
        self.register_buffer("rope_sin", torch.empty(cfg.num_tokens, head_dim), persistent=False)
        self.init_weights()

    @property
    def head_blocks(self) -> nn.ModuleList:
        """The wide head's blocks; empty without a head."""
        return nn.ModuleList() if self.head is None else self.head.blocks

    def init_weights(self) -> None:
        """Set every parameter and constant afresh: also what fills a model made by `to_empty` from meta."""
        init_linear(self.x_embed)
        self.condition.init_weights()
        for block in self.blocks:
            block.init_weights()
        if self.head is not None:
            self.head.init_weights()
        self.final.init_weights()
        self.init_constants()

    @torch.no_grad()
    def init_constants(self) -> None:
        """Set what training never changes and no checkpoint has to hold: tables, time frequencies, zero padding."""
        self.condition.time.init_constants()
        for block in [*self.blocks, *self.head_blocks]:
            block.mlp.zero_padding()
        if self.head is not None:
            self.head.init_constants()
        self.pos_embed.copy_(sincos_2d(self.cfg.hidden_size, self.cfg.grid_size))
        cos, sin = rope_2d_tables(self.cfg.hidden_size // self.cfg.num_heads, self.cfg.grid_size)
        self.rope_cos.copy_(cos)
        self.rope_sin.copy_(sin)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """Velocity of latents on their grid.

        x: [B, C, H, W] noisy latents; t: [B] times in [0, 1], 1 is noise; y: [B, H*W, z] condition, row-major;
        drop: bool [B], samples whose condition becomes the null vector. Returns [B, C, H, W].
        """
        tokens = self.forward_tokens(x.flatten(2).transpose(1, 2), t, y, drop)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])

    def forward_tokens(
        self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Velocity of latent tokens.

        x: [B, T, C]; t: [B]; y: [B, T, z]; drop: bool [B]; positions: int64 [T], the tokens' indices on the
        row-major grid (None: all of them, in order). Returns [B, T, C]. ValueError if `positions` is None and T is
        not the whole grid.
        """
        if positions is None:
            positions = self._all_positions(x)
        activated = F.silu(self.condition(t, y, drop))
        rope = Rope(self.rope_cos[positions], self.rope_sin[positions])
        hidden = self.x_embed(x) + self.pos_embed[positions]
        for block in self.blocks:
            hidden = block(hidden, activated, rope)
        if self.head is not None:
            hidden, activated = self.head(x, hidden, positions)
        return self.final(hidden, activated)

    def _all_positions(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.cfg.num_tokens:
            raise ValueError(
                f"latents have {x.shape[1]} tokens but the model's grid is {self.cfg.grid_size} x "
                f"{self.cfg.grid_size} = {self.cfg.num_tokens}; pass `positions`, or build the DiT with another "
                "grid_size"
            )
        return torch.arange(x.shape[1], device=x.device)
