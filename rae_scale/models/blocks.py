"""The parts that every transformer here is made of: attention, SwiGLU, RMSNorm, and the adaLN block of the DiT.

Shape letters: B batch, T tokens, C latent channels, D channels of one head, z conditioning channels.
No part holds a head count or a hidden width at run time: they are read off the projections' outputs, so a process
that holds a slice of the heads or channels runs the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rae_scale import ops

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [B, T, heads, D] -> [B, T, heads, D]."""

NORM_EPS = 1e-6


class Rope(NamedTuple):
    """Rotary tables of the tokens at hand, each float32 [T, D]."""

    cos: Tensor
    sin: Tensor


def check_heads(what: str, hidden_size: int, num_heads: int, head_multiple: int = 1) -> None:
    """Raise ValueError unless `num_heads` heads, each a multiple of `head_multiple` wide, fill `hidden_size`."""
    if hidden_size % num_heads == 0 and (hidden_size // num_heads) % head_multiple == 0:
        return
    fitting = [n for n in range(1, hidden_size + 1) if hidden_size % n == 0 and hidden_size // n % head_multiple == 0]
    if not fitting:
        raise ValueError(
            f"{what}: hidden_size={hidden_size} cannot be cut into heads whose width divides by {head_multiple}; "
            f"choose a hidden_size that divides by {head_multiple}"
        )
    reason = (
        f"does not divide by num_heads={num_heads}"
        if hidden_size % num_heads
        else f"over num_heads={num_heads} gives a head width of {hidden_size // num_heads}, which does not divide by "
        f"{head_multiple} (2-D rotary embedding turns pairs along two axes)"
    )
    nearest = min(fitting, key=lambda n: (abs(n - num_heads), n))
    raise ValueError(f"{what}: hidden_size={hidden_size} {reason}; num_heads={nearest} is the nearest that fits")


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned weight; statistics in float32, result in the input's dtype."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, NORM_EPS)


class ModulatedRMSNorm(RMSNorm):
    """RMSNorm, then scale and shift: what stands before a branch of a DiT block."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        """All [B, T, C] but the weight. Inside autocast the result has its type, since a linear layer reads it."""
        return ops.norm_modulate(x, self.weight, shift, scale, NORM_EPS)


class ResidualModulatedRMSNorm(RMSNorm):
    """The end of a branch and the start of the next: x + gate * y, and its modulated norm."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return ops.gated_residual_norm_modulate(x, y, gate, self.weight, shift, scale, NORM_EPS)


class HeadNorm(RMSNorm):
    """The weight of an RMSNorm of single heads, which is applied together with the rotation."""

    def forward(self) -> Tensor:  # type: ignore[override]
        """A copy: sharded engines take the parameter itself away when its own module has run."""
        return self.weight.clone()


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection, rows ordered (query, key, value)."""

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool, attention: AttentionFn) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = HeadNorm(self.head_dim) if qk_norm else None
        self.k_norm = HeadNorm(self.head_dim) if qk_norm else None
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.attention = attention

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        """Map [B, T, hidden] to [B, T, hidden]. Without `rope` heads are neither rotated nor normed."""
        qkv = self.qkv(x)
        if rope is None:
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in qkv.chunk(3, dim=-1))
        else:
            q_weight = None if self.q_norm is None else self.q_norm()
            k_weight = None if self.k_norm is None else self.k_norm()
            q, k, v = ops.qk_norm_rope(
                qkv, *rope, head_dim=self.head_dim, q_weight=q_weight, k_weight=k_weight, eps=NORM_EPS
            )
        return self.proj(self.attention(q, k, v).flatten(-2))


SWIGLU_MULTIPLE = 128


def swiglu_width(hidden_size: int) -> int:
    """The published inner width of the feed-forward layer of a DiT block."""
    return 8 * hidden_size // 3


def padded_width(inner_size: int, multiple: int = SWIGLU_MULTIPLE) -> int:
    """The width in which SwiGLU is held. It does not depend on the number of processes, so that checkpoints do not."""
    return -(-inner_size // multiple) * multiple


class SwiGLU(nn.Module):
    """silu(gate) * value between two linear layers, the inner width held zero-padded to a multiple.

    The published inner width int(8h/3) is odd for most sizes (5461, 10922): slow on tensor cores and not divisible.
    Padded gate and value are zero, so their product, its gradient to them (through the zero columns of `w3`) and the
    gradient of those columns (through the zero product) are all zero: the function is that of the logical width and
    training leaves the padding at zero.
    """

    def __init__(self, hidden_size: int, inner_size: int, *, multiple: int = SWIGLU_MULTIPLE) -> None:
        super().__init__()
        self.inner_size = inner_size
        self.padded_size = padded_width(inner_size, multiple)
        self.w12 = nn.Linear(hidden_size, 2 * self.padded_size)
        self.w3 = nn.Linear(self.padded_size, hidden_size)

    @property
    def num_padding_parameters(self) -> int:
        """Entries of this module's parameters that exist only as padding."""
        hidden_size = self.w3.out_features
        return (self.padded_size - self.inner_size) * (2 * (hidden_size + 1) + hidden_size)

    def logical_w12(self, tensor: Tensor) -> Tensor:
        """View of `w12`'s weight or bias without padding: [2, inner_size, ...], gate then value."""
        return tensor.unflatten(0, (2, self.padded_size))[:, : self.inner_size]

    def logical_w3(self) -> Tensor:
        """View of `w3`'s weight without padding: [hidden, inner_size]."""
        return self.w3.weight[:, : self.inner_size]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier over the logical shapes: padding must not widen the fan."""
        w12, w3 = self.logical_w12(self.w12.weight), self.logical_w3()
        w12.copy_(nn.init.xavier_uniform_(w12.flatten(0, 1).clone()).view_as(w12))
        w3.copy_(nn.init.xavier_uniform_(w3.clone()))
        nn.init.zeros_(self.w12.bias)
        nn.init.zeros_(self.w3.bias)
        self.zero_padding()

    @torch.no_grad()
    def zero_padding(self) -> None:
        for tensor in (self.w12.weight, self.w12.bias):
            tensor.unflatten(0, (2, self.padded_size))[:, self.inner_size :].zero_()
        self.w3.weight[:, self.inner_size :].zero_()

    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu_into(self.w12(x), self.w3)


class DiTBlock(nn.Module):
    """Attention and SwiGLU, each behind an RMSNorm that the condition shifts and scales and followed by its gate.

    The published block applies SiLU to the condition before its adaLN layer. That tensor is the same for all blocks,
    so the caller computes it once and passes it in activated.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, z_channels: int, *, qk_norm: bool, attention: AttentionFn
    ) -> None:
        super().__init__()
        self.norm1 = ModulatedRMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qk_norm=qk_norm, attention=attention)
        self.norm2 = ResidualModulatedRMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, swiglu_width(hidden_size))
        self.adaln = nn.Linear(z_channels, 6 * hidden_size)

    def init_weights(self) -> None:
        for norm in self.modules():
            if isinstance(norm, RMSNorm):
                norm.init_weights()
        init_linear(self.attn.qkv)
        init_linear(self.attn.proj)
        self.mlp.init_weights()
        zero_linear(self.adaln)  # every gate starts closed: the block starts as the identity

    def forward(self, x: Tensor, activated: Tensor, rope: Rope) -> Tensor:
        """Map tokens [B, T, hidden], with the activated condition SiLU(c) [B, T, z], to [B, T, hidden]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = ops.chunks(self.adaln(activated), 6)
        y = self.attn(self.norm1(x, shift1, scale1), rope)
        x, h = self.norm2(x, y, gate1, shift2, scale2)
        return ops.gated_residual(x, self.mlp(h), gate2)


class FinalLayer(nn.Module):
    """Modulated norm and the projection from hidden to latent channels."""

    def __init__(self, hidden_size: int, z_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm = ModulatedRMSNorm(hidden_size)
        self.adaln = nn.Linear(z_channels, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, out_channels)

    def init_weights(self) -> None:
        self.norm.init_weights()
        zero_linear(self.adaln)
        zero_linear(self.linear)

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """Map tokens [B, T, hidden], with the activated condition [B, T, z], to [B, T, C]."""
        shift, scale = ops.chunks(self.adaln(activated), 2)
        return self.linear(self.norm(x, shift, scale))


def init_linear(layer: nn.Linear) -> None:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)


def zero_linear(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
