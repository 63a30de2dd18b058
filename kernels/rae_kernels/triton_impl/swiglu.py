"""Kernels of `rae_kernels.swiglu`: a program has a piece of a row, of gate and value, wherever these two lie."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from rae_kernels.triton_impl.rows import rows_of
from rae_kernels.triton_impl.variants import ELEMENT, Variant


@triton.jit
def piece_of_row(F, BLOCK: tl.constexpr):
    """Row and columns of this program; pieces of a row follow each other, as in memory."""
    pieces = tl.cdiv(F, BLOCK)
    row = tl.program_id(0) // pieces
    return row.to(tl.int64), tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def swiglu_kernel(gate, value, out, F, gate_stride, value_stride, BLOCK: tl.constexpr):
    row, column = piece_of_row(F, BLOCK)
    g = tl.load(gate + row * gate_stride + column, mask=column < F).to(tl.float32)
    v = tl.load(value + row * value_stride + column, mask=column < F).to(tl.float32)
    tl.store(out + row * F + column, g * tl.sigmoid(g) * v, mask=column < F)


@triton.jit
def swiglu_backward_kernel(
    gradient, gate, value, for_gate, for_value,
    F, gradient_stride, gate_stride, value_stride, for_gate_stride, for_value_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = piece_of_row(F, BLOCK)
    d = tl.load(gradient + row * gradient_stride + column, mask=column < F).to(tl.float32)
    g = tl.load(gate + row * gate_stride + column, mask=column < F).to(tl.float32)
    v = tl.load(value + row * value_stride + column, mask=column < F).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    through_gate = d * v * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(for_gate + row * for_gate_stride + column, through_gate, mask=column < F)
    tl.store(for_value + row * for_value_stride + column, d * g * sigmoid, mask=column < F)


def shape_of(width: int) -> dict[str, int]:
    """Columns of a program and its warps: two 16-byte loads of bfloat16 per thread and tensor."""
    block = max(32, min(2048, triton.next_power_of_2(width)))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def launch_forward(gate: Tensor, value: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gate, gate_stride = rows_of(torch.atleast_2d(gate))
    value, value_stride = rows_of(torch.atleast_2d(value))
    if out.numel():
        shape = shape_of(out.shape[-1])
        swiglu_kernel[(len(gate) * triton.cdiv(out.shape[-1], shape["BLOCK"]),)](
            gate, value, out, out.shape[-1], gate_stride, value_stride, **shape
        )
    return out


def launch_backward(gradient: Tensor, gate: Tensor, value: Tensor, for_gate: Tensor, for_value: Tensor) -> None:
    """Write the gradients of gate and value, which are views of rows."""
    if not gradient.numel():
        return
    gradient, gradient_stride = rows_of(torch.atleast_2d(gradient))
    gate, gate_stride = rows_of(torch.atleast_2d(gate))
    value, value_stride = rows_of(torch.atleast_2d(value))
    width, shape = gradient.shape[-1], shape_of(gradient.shape[-1])
    swiglu_backward_kernel[(len(gradient) * triton.cdiv(width, shape["BLOCK"]),)](
        gradient, gate, value, for_gate, for_value, width,
        gradient_stride, gate_stride, value_stride, for_gate.stride(-2), for_value.stride(-2), **shape,
    )  # fmt: skip


def swiglu_packed(packed: Tensor) -> Tensor:
    return launch_forward(*packed.chunk(2, dim=-1))


def swiglu_packed_backward(gradient: Tensor, packed: Tensor) -> Tensor:
    for_packed = torch.empty(packed.shape, dtype=packed.dtype, device=packed.device)
    launch_backward(gradient, *packed.chunk(2, dim=-1), *for_packed.view(-1, packed.shape[-1]).chunk(2, dim=-1))
    return for_packed


def swiglu_separate(gate: Tensor, value: Tensor) -> Tensor:
    return launch_forward(gate, value)


def swiglu_separate_backward(gradient: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    for_gate, for_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, value))
    width = gate.shape[-1]
    launch_backward(gradient, gate, value, for_gate.view(-1, width), for_value.view(-1, width))
    return for_gate, for_value


SHIPPED_WIDTHS = (384, 5504)
"""Of the demo and of DiT-2.4B. The code depends on the block alone, which is the same from 2048 columns on."""


def variants() -> Iterator[Variant]:
    for width in SHIPPED_WIDTHS:
        for dtype in (torch.bfloat16, torch.float32):
            for kernel in (swiglu_kernel, swiglu_backward_kernel):
                constants = shape_of(width)
                num_warps = constants.pop("num_warps")
                integers = tuple(name for name in kernel.arg_names if name == "F" or name.endswith("_stride"))
                pointers = [name for name in kernel.arg_names if name not in (*integers, *constants)]
                direction = "forward" if kernel is swiglu_kernel else "backward"
                yield Variant(
                    name=f"swiglu_{direction}_{ELEMENT[dtype]}_{width}",
                    kernel=kernel,
                    types=dict.fromkeys(pointers, f"*{ELEMENT[dtype]}") | dict.fromkeys(integers, "i32"),
                    constants=constants,
                    divisible=integers,
                    num_warps=num_warps,
                )
