"""Attention by PyTorch's scaled_dot_product_attention, with the order of its backends stated for each kind of call."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rae_kernels.dispatch import compute_dtype

logger = logging.getLogger(__name__)

HALF_DTYPES = (torch.bfloat16, torch.float16)
CUDNN_MAX_HEAD_DIM = 128  # of torch's forward and backward together
FLASH_MAX_HEAD_DIM = 256

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
# Efficient attention takes float32 and masks too, and math takes everything: every call finds a backend.
ANYTHING = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


class AttentionCall(NamedTuple):
    """What the choice of a backend depends on."""

    device: str
    capability: tuple[int, int] | None
    """Of a CUDA device, as (9, 0) for sm_90; None elsewhere."""
    dtype: torch.dtype
    head_dim: int
    masked: bool
    one_query: bool
    """A sequence of a single query."""

    def __str__(self) -> str:
        sm = "" if self.capability is None else " (sm_{}{})".format(*self.capability)
        extras = (", with a mask" if self.masked else "") + (", one query" if self.one_query else "")
        return f"{self.device}{sm}, {str(self.dtype).removeprefix('torch.')}, head_dim {self.head_dim}{extras}"


class AttentionPlan(NamedTuple):
    """The backends a call tries, in order (none: PyTorch's own choice), and why."""

    backends: tuple[SDPBackend, ...]
    reason: str

    def __str__(self) -> str:
        order = ", then ".join(backend.name.removesuffix("_ATTENTION").lower() for backend in self.backends)
        return f"{order or 'PyTorch default'} ({self.reason})"


def plan_attention(call: AttentionCall) -> AttentionPlan:
    """Which backends `call` tries, in which order. Nothing but `call` decides.

    Left alone, PyTorch may take FlashAttention-2 on Hopper, where cuDNN is about twice as fast on DiT shapes.
    """
    if call.capability is None:
        return AttentionPlan((), "the device has one fused kernel, and plain math for the rest")
    if call.dtype not in HALF_DTYPES:
        return AttentionPlan(ANYTHING, "cuDNN and flash take bfloat16 and float16 only")
    flash = () if call.masked or call.head_dim > FLASH_MAX_HEAD_DIM else (FLASH,)
    why_not_cudnn = cudnn_problem(call)
    if why_not_cudnn is None:
        return AttentionPlan((CUDNN, *flash, *ANYTHING), "cuDNN is the fastest on sm_90 and sm_100")
    if flash:
        return AttentionPlan((*flash, *ANYTHING), why_not_cudnn)
    why_not_flash = "takes no mask" if call.masked else f"takes head_dim up to {FLASH_MAX_HEAD_DIM}"
    return AttentionPlan(ANYTHING, f"{why_not_cudnn}; flash {why_not_flash}")


def cudnn_problem(call: AttentionCall) -> str | None:
    """Why cuDNN is not the first to try; None if it is."""
    assert call.capability is not None
    if call.capability[0] not in (9, 10):
        return "cuDNN is slower than flash outside sm_90 and sm_100"
    if call.head_dim > CUDNN_MAX_HEAD_DIM or call.head_dim % 8:
        return f"cuDNN takes multiples of 8 up to {CUDNN_MAX_HEAD_DIM} as head_dim"
    if call.one_query:
        return "cuDNN has no backward for a single query"
    return None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention. q: [B, T, H, D]; k, v: [B, S, H, D]; returns [B, T, H, D] in the type of q,
    inside autocast in its type.

    attn_mask: broadcastable to [B, H, T, S], boolean (True takes part) or added to the scores; not beside is_causal.
    scale: factor of the scores, 1/sqrt(D) when None.
    A backend that cannot serve a call after all leaves it to the next of the plan's order.
    """
    backends = attention_plan(q.device, autocast_dtype(q), q.shape[3], attn_mask is not None, q.shape[1] == 1).backends
    # Transposed views, not copies: the backends read strides.
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not backends:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale).transpose(1, 2)
    with sdpa_kernel(list(backends), set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale)
    return ContiguousGradient.apply(out.transpose(1, 2))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type in which autocast, if it is on, hands `x` to attention: it leaves float64 alone, and tensors without
    values, of whose device it does not know."""
    return x.dtype if x.dtype == torch.float64 or x.is_meta else compute_dtype(x)


class ContiguousGradient(torch.autograd.Function):
    """Identity; backward passes on a contiguous gradient, in the layout that the fused kernels gave the output: cuDNN's
    backward wants the two to be equal, and a sum, for one, gives an expanded gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def attention_plan(
    device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool, one_query: bool
) -> AttentionPlan:
    """The plan of such calls. The first of each kind logs it, so that no run chooses a backend silently."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return resolve_plan(AttentionCall(str(device), capability, dtype, head_dim, masked, one_query))


# What torch.compiler.assume_constant_result sets, without importing the compiler, which takes seconds.
attention_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]

_lines: dict[AttentionCall, str] = {}


@cache
def resolve_plan(call: AttentionCall) -> AttentionPlan:
    plan = plan_attention(call)
    _lines[call] = f"attention on {call}: {plan}"
    logger.info("%s", _lines[call])
    return plan


def attention_backend_report() -> str:
    """A line for each kind of call so far: the backends in order, and why. For a device without calls, the line of
    bfloat16 and head_dim 128."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        if not any(call.device == str(device) for call in _lines):
            attention_plan(device, torch.bfloat16, 128, False, False)
    return "\n".join(_lines.values())
