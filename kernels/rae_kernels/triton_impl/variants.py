"""What is launched with what: the shipped instantiations of each kernel, for compiling them ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

ELEMENT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"}
"""Triton's names of element types."""

HIDDEN_SIZES = (1280, 2048, 2304, 3072, 4096)
"""Of the published DiTs."""
DEMO_HIDDEN_SIZE = 144
WIDE_HEAD_SIZE = 2688
"""Of the DDT head, whose residual stream has the type of its branches."""
LLM_HIDDEN_SIZES = (1536, 3584)
"""Of Qwen2.5 1.5B and 7B."""


class Dtypes(NamedTuple):
    """Types of the residual stream, of what branches and modulation hold, and of weights."""

    name: str
    residual: torch.dtype
    branch: torch.dtype
    weight: torch.dtype


TRAINING_DTYPES = (
    Dtypes("mixed", torch.float32, torch.bfloat16, torch.float32),
    Dtypes("gathered", torch.float32, torch.bfloat16, torch.bfloat16),
)
"""Autocast over float32 weights, and over weights that an engine gathers in bfloat16."""
NARROW_STREAM_DTYPES = tuple(
    dtypes._replace(name=f"{dtypes.name}-narrow", residual=torch.bfloat16) for dtypes in TRAINING_DTYPES
)


class Variant(NamedTuple):
    """One kernel as a shipped configuration launches it.

    kernel:      the `@triton.jit` function.
    types:       Triton type of every argument that is no constant: "*bf16" (aligned to 16 bytes), "i32", "fp32".
    constants:   value of every `tl.constexpr` argument (also of a pointer that is None).
    divisible:   integer arguments that divide by 16, as Triton finds out at launch.
    num_warps, num_stages: as launched.
    instructions: substrings of SASS instructions that have to be there, such as "LDG.E.128".
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2
    instructions: tuple[str, ...] = ("LDG.E.128", "STG.E.128")
