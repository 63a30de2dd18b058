"""Launching the kernels of `norm_kernels` for the operators of `rae_kernels.norm_operators`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import torch
import triton
from torch import Tensor

from rae_kernels.norm_operators import one_per_row, residual_dtype
from rae_kernels.triton_impl import norm_kernels as kernels
from rae_kernels.triton_impl.rows import rows_of, written_rows
from rae_kernels.triton_impl.variants import (
    DEMO_HIDDEN_SIZE,
    ELEMENT,
    HIDDEN_SIZES,
    LLM_HIDDEN_SIZES,
    NARROW_STREAM_DTYPES,
    TRAINING_DTYPES,
    WIDE_HEAD_SIZE,
    Dtypes,
    Variant,
)

PROGRAMS = 512
"""Of a backward pass, whatever the device: the sum over rows must not depend on it."""


FORWARD, BACKWARD = 512, 256
"""Channels to a warp: backward passes hold more rows at once."""


def shape_of(channels: int, per_warp: int = FORWARD, most_warps: int = 16) -> dict[str, int]:
    """Width of the block and number of warps for rows of `channels`."""
    block = triton.next_power_of_2(channels)
    return {"C": channels, "BLOCK": block, "num_warps": min(most_warps, max(1, block // per_warp))}


def norm_backward_shape(channels: int, modulated: bool) -> dict[str, int]:
    """At most 8 warps: with 16, as with 8 where nothing is modulated, sm_80 gets too few registers to a thread."""
    return shape_of(channels, BACKWARD if modulated else FORWARD, 8)


def norm(
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    total: Tensor | None,
    channels: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    h, factor = torch.empty(x.shape, dtype=dtype, device=x.device), one_per_row(x)
    x, x_stride = rows_of(x)
    shift, shift_stride = rows_of(shift)
    scale, scale_stride = rows_of(scale)
    if h.numel():
        kernels.norm_kernel[(factor.numel(),)](
            x, weight, shift, scale, total if total is None else total.contiguous(), h, factor,
            x_stride, shift_stride, scale_stride, channels, eps,
            MODULATED=scale is not None, FROM_TOTAL=total is not None, **shape_of(x.shape[-1]),
        )  # fmt: skip
    return h, factor


def norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    factor: Tensor,
    for_shift: Tensor | None,
    for_scale: Tensor | None,
    from_total: bool,
    channels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    for_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for_total = torch.empty(factor.shape if from_total else 0, dtype=factor.dtype, device=x.device)
    parts = weight_parts(factor.numel(), weight)
    gradient, gradient_stride = rows_of(gradient)
    x, x_stride = rows_of(x)
    scale, scale_stride = rows_of(scale)
    for_shift, for_shift_stride = written_rows(for_shift)
    for_scale, for_scale_stride = written_rows(for_scale)
    if for_x.numel():
        kernels.norm_backward_kernel[(len(parts),)](
            gradient, x, weight, scale, factor, for_x, parts, for_shift, for_scale, for_total if from_total else None,
            factor.numel(), gradient_stride, x_stride, scale_stride, for_shift_stride, for_scale_stride, channels,
            MODULATED=scale is not None, FROM_TOTAL=from_total,
            **norm_backward_shape(x.shape[-1], scale is not None),
        )  # fmt: skip
    return for_x, parts.sum(0).to(weight.dtype), for_total


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, with_sum: bool) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=residual_dtype(x, y, gate), device=x.device)
    total = one_per_row(x) if with_sum else torch.empty(0, dtype=torch.float32, device=x.device)
    x, x_stride = rows_of(x)
    y, y_stride = rows_of(y)
    gate, gate_stride = rows_of(gate)
    if out.numel():
        kernels.gated_residual_kernel[(len(x),)](
            x, y, gate, out, total if with_sum else None, x_stride, y_stride, gate_stride,
            WITH_SUM=with_sum, **shape_of(x.shape[-1]),
        )  # fmt: skip
    return out, total


def gated_residual_backward(
    gradient: Tensor, for_sum: Tensor | None, x: Tensor | None, y: Tensor, gate: Tensor, for_gate: Tensor
) -> tuple[Tensor, Tensor]:
    with_sum = for_sum is not None and x is not None
    for_sum = None if for_sum is None else for_sum.contiguous()
    for_x = torch.empty(0 if x is None else x.shape, dtype=(gradient if x is None else x).dtype, device=y.device)
    for_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    gradient, gradient_stride = rows_of(gradient)
    x, x_stride = rows_of(x)
    y, y_stride = rows_of(y)
    gate, gate_stride = rows_of(gate)
    for_gate, for_gate_stride = written_rows(for_gate)
    if for_y.numel():
        kernels.gated_residual_backward_kernel[(len(y),)](
            gradient, for_sum, x, y, gate, for_x if with_sum else None, for_y,
            for_gate, gradient_stride, x_stride, y_stride, gate_stride, for_gate_stride,
            WITH_SUM=with_sum, **shape_of(y.shape[-1]),
        )  # fmt: skip
    return for_x, for_y


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=residual_dtype(x, y, gate), device=x.device)
    h, factor = torch.empty(x.shape, dtype=dtype, device=x.device), one_per_row(x)
    x, x_stride = rows_of(x)
    y, y_stride = rows_of(y)
    gate, gate_stride = rows_of(gate)
    shift, shift_stride = rows_of(shift)
    scale, scale_stride = rows_of(scale)
    if out.numel():
        kernels.gated_residual_norm_kernel[(len(x),)](
            x, y, gate, weight, shift, scale, out, h, factor,
            x_stride, y_stride, gate_stride, shift_stride, scale_stride, eps, **shape_of(x.shape[-1]),
        )  # fmt: skip
    return out, h, factor


def gated_residual_norm_backward(
    for_out: Tensor,
    gradient: Tensor,
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    scale: Tensor,
    factor: Tensor,
    for_gate: Tensor,
    for_shift: Tensor,
    for_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    for_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    parts = weight_parts(factor.numel(), weight)
    for_out, for_out_stride = rows_of(for_out)
    gradient, gradient_stride = rows_of(gradient)
    x, x_stride = rows_of(x)
    y, y_stride = rows_of(y)
    gate, gate_stride = rows_of(gate)
    scale, scale_stride = rows_of(scale)
    for_gate, for_gate_stride = written_rows(for_gate)
    for_shift, for_shift_stride = written_rows(for_shift)
    for_scale, for_scale_stride = written_rows(for_scale)
    if for_x.numel():
        kernels.gated_residual_norm_backward_kernel[(len(parts),)](
            for_out, gradient, x, y, gate, weight, scale, factor, for_x, for_y, parts, for_gate, for_shift, for_scale,
            factor.numel(), for_out_stride, gradient_stride, x_stride, y_stride, gate_stride, scale_stride,
            for_gate_stride, for_shift_stride, for_scale_stride, **shape_of(x.shape[-1], BACKWARD),
        )  # fmt: skip
    return for_x, for_y, parts.sum(0).to(weight.dtype)


def sum_of_squares(x: Tensor) -> Tensor:
    total = one_per_row(x)
    rows, stride = rows_of(x)
    if x.numel():
        kernels.sum_of_squares_kernel[(total.numel(),)](rows, total, stride, **shape_of(x.shape[-1]))
    return total


def sum_of_squares_backward(for_sum: Tensor, x: Tensor) -> Tensor:
    for_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, stride = rows_of(x)
    if x.numel():
        kernels.sum_of_squares_backward_kernel[(for_sum.numel(),)](
            for_sum.contiguous(), rows, for_x, stride, **shape_of(x.shape[-1])
        )
    return for_x


def weight_parts(rows: int, weight: Tensor) -> Tensor:
    """What each program of a backward pass sums up for the weight: float32 [programs, C]."""
    return torch.empty(min(rows, PROGRAMS), len(weight), dtype=torch.float32, device=weight.device)


def variants() -> Iterator[Variant]:
    """The kernels at the published widths, with the types of training."""
    for channels, dtypes in product((*HIDDEN_SIZES, DEMO_HIDDEN_SIZE), TRAINING_DTYPES):
        yield from whole_rows(channels, dtypes)
    for dtypes in NARROW_STREAM_DTYPES:
        yield from whole_rows(WIDE_HEAD_SIZE, dtypes)
    for channels in HIDDEN_SIZES:
        yield from halved_rows(channels // 2, TRAINING_DTYPES[0])
    yield from halved_rows(WIDE_HEAD_SIZE // 2, NARROW_STREAM_DTYPES[0])
    for channels, dtypes in product(LLM_HIDDEN_SIZES, (*TRAINING_DTYPES, *NARROW_STREAM_DTYPES)):
        yield from norms(channels, dtypes, modulated=False, from_total=False)


def whole_rows(channels: int, dtypes: Dtypes) -> Iterator[Variant]:
    """What a block runs on one process."""
    types = types_of(dtypes)
    yield from norms(channels, dtypes, modulated=True, from_total=False)
    yield from gated_residuals(channels, dtypes, with_sum=False)
    yield variant(kernels.gated_residual_norm_kernel, "", channels, types, {}, set(), dtypes)
    gradient = types | {"gradient": types["h"]}
    yield variant(kernels.gated_residual_norm_backward_kernel, "", channels, gradient, {}, set(), dtypes)


def halved_rows(channels: int, dtypes: Dtypes) -> Iterator[Variant]:
    """What a block that tensor parallelism has split runs: sums leave a process and come back as totals."""
    types = types_of(dtypes)
    yield from norms(channels, dtypes, modulated=True, from_total=True)
    yield from gated_residuals(channels, dtypes, with_sum=True)
    total = variant(kernels.sum_of_squares_kernel, "", channels, types, {}, set(), dtypes)
    yield total._replace(instructions=("LDG.E.128",))
    yield variant(kernels.sum_of_squares_backward_kernel, "", channels, types, {}, set(), dtypes)


def norms(channels: int, dtypes: Dtypes, *, modulated: bool, from_total: bool) -> Iterator[Variant]:
    types, flags = types_of(dtypes), {"MODULATED": modulated, "FROM_TOTAL": from_total}
    if not modulated:  # then the result has the type of x
        types |= {"h": types["x"]}
    absent = set() if modulated else {"shift", "scale", "for_shift", "for_scale"}
    absent |= set() if from_total else {"total", "for_total"}
    name = ("modulated" if modulated else "plain") + ("-from-total" if from_total else "")
    yield variant(kernels.norm_kernel, name, channels, types, flags, absent, dtypes)
    types |= {"gradient": types["h"]}
    yield variant(kernels.norm_backward_kernel, name, channels, types, flags, absent, dtypes)


def gated_residuals(channels: int, dtypes: Dtypes, *, with_sum: bool) -> Iterator[Variant]:
    types, flags, name = types_of(dtypes), {"WITH_SUM": with_sum}, "with-sum" if with_sum else "plain"
    absent = set() if with_sum else {"total"}
    yield variant(kernels.gated_residual_kernel, name, channels, types, flags, absent, dtypes)
    types |= {"gradient": types["x"]}
    absent = set() if with_sum else {"for_sum", "x", "for_x"}
    yield variant(kernels.gated_residual_backward_kernel, name, channels, types, flags, absent, dtypes)


def types_of(dtypes: Dtypes) -> dict[str, str]:
    """Triton's types of the kernels' arguments; that of `gradient` differs between kernels."""
    stream, branch = f"*{ELEMENT[dtypes.residual]}", f"*{ELEMENT[dtypes.branch]}"
    types = dict.fromkeys(("x", "for_x", "out", "for_out"), stream)
    of_branch = ("y", "gate", "shift", "scale", "h", "for_y", "for_gate", "for_shift", "for_scale")
    types |= dict.fromkeys(of_branch, branch) | {"weight": f"*{ELEMENT[dtypes.weight]}"}
    types |= dict.fromkeys(("total", "factor", "for_weight", "for_sum", "for_total"), "*fp32")
    return types | {"eps": "fp32", "rows": "i32", "channels": "i32"}


def variant(
    kernel: object,
    name: str,
    channels: int,
    types: Mapping[str, str],
    flags: Mapping[str, bool],
    absent: set[str],
    dtypes: Dtypes,
) -> Variant:
    shape = shape_of(channels)
    if kernel is kernels.norm_backward_kernel:
        shape = norm_backward_shape(channels, flags["MODULATED"])
    elif kernel is kernels.gated_residual_norm_backward_kernel:
        shape = shape_of(channels, BACKWARD)
    constants: dict[str, object] = {"C": channels, "BLOCK": shape["BLOCK"], **flags, **dict.fromkeys(absent)}
    arguments = [argument for argument in kernel.arg_names if argument not in constants]  # type: ignore[attr-defined]
    strides = tuple(argument for argument in arguments if argument.endswith("_stride"))
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}  # type: ignore[attr-defined]
    return Variant(
        name="-".join(part for part in (kernel.__name__, name, str(channels), dtypes.name) if part),  # type: ignore[attr-defined]
        kernel=kernel,
        types={argument: "i32" if argument in strides else types[argument] for argument in arguments},
        constants=constants,
        divisible=(*strides, "channels"),
        num_warps=shape["num_warps"],
    )
