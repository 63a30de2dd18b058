"""Attention by PyTorch's scaled_dot_product_attention, with the order of its backends stated for each device."""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

FLASH_FIRST = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
CUDNN_FIRST = (SDPBackend.CUDNN_ATTENTION, *FLASH_FIRST)


class AttentionPlan(NamedTuple):
    """The backends a device tries, in order (none: PyTorch's own choice), and why."""

    device: str
    backends: tuple[SDPBackend, ...]
    reason: str

    def __str__(self) -> str:
        order = ", then ".join(backend.name.removesuffix("_ATTENTION").lower() for backend in self.backends)
        return f"attention on {self.device}: {order or 'PyTorch default'} ({self.reason})"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention. q: [B, T, H, D]; k, v: [B, S, H, D]; returns [B, T, H, D] in the type of q.

    attn_mask: broadcastable to [B, H, T, S], boolean (True takes part) or added to the scores; not beside is_causal.
    scale: factor of the scores, 1/sqrt(D) when None.
    A backend that cannot serve a call (flash takes no attn_mask) leaves it to the next of its device's order.
    """
    # Transposed views, not copies: the backends read strides.
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    backends = attention_plan(q.device).backends
    if backends:
        with sdpa_kernel(list(backends), set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale)
    return out.transpose(1, 2)


def attention_plan(device: torch.device) -> AttentionPlan:
    """The plan of a device. The first use of each device logs it, so that no run chooses a backend silently."""
    return resolve_plan(device)


# What torch.compiler.assume_constant_result sets, without importing the compiler, which takes seconds.
attention_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def resolve_plan(device: torch.device) -> AttentionPlan:
    if device.type == "cuda":
        plan = cuda_plan(str(device), *torch.cuda.get_device_capability(device))
    else:
        plan = AttentionPlan(str(device), (), "it has one fused kernel, and plain math for the rest")
    logger.info("%s", plan)
    return plan


def cuda_plan(device: str, major: int, minor: int) -> AttentionPlan:
    """Left alone, PyTorch may take FlashAttention-2 on Hopper, where cuDNN is about twice as fast on DiT shapes."""
    name = f"{device} (sm_{major}{minor})"
    if major in (9, 10):
        return AttentionPlan(name, CUDNN_FIRST, "cuDNN is the fastest on sm_90 and sm_100")
    return AttentionPlan(name, FLASH_FIRST, "cuDNN is slower than flash outside sm_90 and sm_100")


def attention_backend_report() -> str:
    """One line for each kind of device of this process: the backends in order, and why."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return "\n".join(str(attention_plan(device)) for device in devices)
