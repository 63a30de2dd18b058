"""Attention within each of several sequences that stand one after another in a single run of tokens, without padding.

N tokens in the run, B sequences of L tokens at most; H heads of queries, Hk of keys and values, D channels of a head.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rae_kernels.attention import FLASH_MAX_HEAD_DIM, HALF_DTYPES, attention, autocast_dtype
from rae_kernels.dispatch import chosen

logger = logging.getLogger(__name__)


class Sequences(NamedTuple):
    """Where the sequences of a run lie. What the host must know is given as numbers: asking the device means waiting.

    starts:     int32 [B + 1] on the run's device, the first token of each sequence, then the end of the last.
    total:      the value of that end. Tokens of the run behind it belong to no sequence.
    max_length: tokens of the longest sequence.
    """

    starts: Tensor
    total: int
    max_length: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Sequences:
        """Of sequences with these numbers of tokens; ValueError if one has none."""
        if min(lengths, default=0) < 1:
            raise ValueError(f"lengths={list(lengths)}: a sequence has at least one token; leave out the empty ones")
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(ends.to(device, non_blocking=True), int(ends[-1]), max(lengths))


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    *,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each token to those of its sequence. q: [N, H, D]; k, v: [N, Hk, D], H a multiple of Hk.

    attn_mask: boolean [B, L, L], which query of a sequence sees which key, by their places in it; not beside is_causal.
    scale: factor of the scores, 1/sqrt(D) when None.
    Returns [N, H, D] in the type of q, inside autocast in its type. Tokens that belong to no sequence get zeros, and no
    gradient.

    Raises:
        ValueError: H is no multiple of Hk, the run is shorter than its sequences, or both kinds of mask are given.
    """
    check(q, k, sequences, is_causal, attn_mask)
    # Autocast does not look into the kernels.
    q, k, v = (x.to(autocast_dtype(q)) for x in (q, k, v))
    kernel = varlen_kernel(q.device, q.dtype, q.shape[2], attn_mask is not None)
    rest = q.shape[0] - sequences.total
    if rest:
        q, k, v = (x[: sequences.total] for x in (q, k, v))
    if kernel is None:
        out = padded_attention(q, k, v, sequences, is_causal=is_causal, attn_mask=attn_mask, scale=scale)
    else:
        out = kernel(q, k, v, sequences, is_causal, scale)
    return F.pad(out, (0, 0, 0, 0, 0, rest)) if rest else out


def check(q: Tensor, k: Tensor, sequences: Sequences, is_causal: bool, attn_mask: Tensor | None) -> None:
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads of queries are no multiple of {k.shape[1]} heads of keys and values")
    if q.shape[0] < sequences.total:
        raise ValueError(f"the sequences hold {sequences.total} tokens, but the run only {q.shape[0]}")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal exclude each other; put causality into the mask")


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    *,
    is_causal: bool,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`varlen_attention` by way of padded sequences [B, L, H, D], for q, k and v without tokens of no sequence."""
    starts, total, longest = sequences
    lengths = starts.diff()
    row = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths, output_size=total)
    column = torch.arange(total, device=q.device) - starts[:-1][row]
    place = row * longest + column
    size = len(lengths) * longest

    def spread(x: Tensor) -> Tensor:
        x = x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
        return x.new_zeros(size, *x.shape[1:]).index_copy(0, place, x).unflatten(0, (len(lengths), longest))

    mask = None
    if not is_causal:  # else no query sees the padding, which stands on the right
        real = torch.arange(longest, device=q.device) < lengths[:, None]
        mask = real[:, None, None]
        if attn_mask is not None:
            # Queries of the padding see something, whatever the mask says: a softmax over nothing is not a number.
            mask = attn_mask[:, None] & mask | ~real[:, None, :, None]
    out = attention(spread(q), spread(k), spread(v), attn_mask=mask, is_causal=is_causal, scale=scale)
    return out.flatten(0, 1).index_select(0, place)


VarlenKernel = Callable[[Tensor, Tensor, Tensor, Sequences, bool, float | None], Tensor]


def varlen_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool) -> VarlenKernel | None:
    """The kernel for such calls; None for padded sequences. The first call of each kind logs the choice and why."""
    return resolve(device, dtype, head_dim, masked, chosen() == "reference")


@cache
def resolve(
    device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool, reference: bool
) -> VarlenKernel | None:
    name, reason = plan_varlen(device.type, dtype, head_dim, masked, reference, torch_varlen() is not None, has_flash())
    kind = f"{device}, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}{', with a mask' if masked else ''}"
    _lines.append(f"packed attention on {kind}: {name} ({reason})")
    logger.info("%s", _lines[-1])
    kernels: dict[str, VarlenKernel | None] = {"torch": by_torch, "flash-attn": by_flash_attn, "padded": None}
    return kernels[name]


_lines: list[str] = []


def varlen_report() -> str:
    """A line for each kind of call so far: what it runs on, and why."""
    return "\n".join(_lines)


def plan_varlen(
    device_type: str, dtype: torch.dtype, head_dim: int, masked: bool, reference: bool, torch_has: bool, flash_has: bool
) -> tuple[str, str]:
    """("torch", "flash-attn" or "padded", and why). torch_has, flash_has: whether the packages have such a kernel."""
    if reference:
        return "padded", "RAE_KERNELS=reference"
    if device_type != "cuda":
        return "padded", "the kernels for packed sequences are CUDA's"
    if dtype not in HALF_DTYPES:
        return "padded", "the kernels for packed sequences take bfloat16 and float16 only"
    if masked:
        return "padded", "the kernels for packed sequences take no mask"
    if head_dim > FLASH_MAX_HEAD_DIM or head_dim % 8:
        return "padded", f"the kernels take multiples of 8 up to {FLASH_MAX_HEAD_DIM} as head_dim"
    if torch_has:
        return "torch", "torch.nn.attention.varlen chooses between cuDNN and flash"
    if flash_has:
        return "flash-attn", f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return "padded", f"torch {torch.__version__} has no torch.nn.attention.varlen, and flash-attn is not installed"


@cache
def torch_varlen() -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return cast(Callable[..., Tensor], varlen_attn)


def has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def by_torch(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, is_causal: bool, scale: float | None) -> Tensor:
    function = torch_varlen()
    assert function is not None
    settings = torch_settings(tuple(inspect.signature(function).parameters), is_causal, scale)
    if "enable_gqa" not in settings:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    starts, _, longest = sequences
    # The very same tensor of starts for queries and keys: only then cuDNN is sure that they are aligned.
    return function(q, k, v, starts, starts, longest, longest, **settings)


def torch_settings(known: tuple[str, ...], is_causal: bool, scale: float | None) -> dict[str, Any]:
    """The arguments behind the lengths, as the version of torch names them whose parameters are `known`."""
    settings: dict[str, Any] = {"scale": scale}
    if "window_size" in known:
        settings["window_size"] = (-1, 0) if is_causal else (-1, -1)
    else:
        settings["is_causal"] = is_causal
    if "enable_gqa" in known:
        settings["enable_gqa"] = True
    return settings


def by_flash_attn(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, is_causal: bool, scale: float | None
) -> Tensor:
    function = import_module("flash_attn").flash_attn_varlen_func
    starts, _, longest = sequences
    return cast(Tensor, function(q, k, v, starts, starts, longest, longest, softmax_scale=scale, causal=is_causal))
