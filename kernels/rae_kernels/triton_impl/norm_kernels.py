"""Kernels of RMSNorm, modulation and gated residual: one program per row forward; backward, programs that walk rows.

A row is held in registers whole. What is summed over rows, the gradient of the norm's weight, is summed by each program
over the rows it walks and then over programs in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_row(pointer, row, stride, column, C):
    return tl.load(pointer + tl.cast(row, tl.int64) * stride + column, mask=column < C, other=0.0).to(tl.float32)


@triton.jit
def store_row(pointer, row, stride, column, C, value):
    tl.store(pointer + tl.cast(row, tl.int64) * stride + column, value, mask=column < C)


@triton.jit
def norm_kernel(
    x, weight, shift, scale, total, h, factor,
    x_stride, shift_stride, scale_stride, channels, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, MODULATED: tl.constexpr, FROM_TOTAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    values = load_row(x, row, x_stride, column, C)
    sum_squares = tl.load(total + row) if FROM_TOTAL else tl.sum(values * values, axis=0)
    r = tl.rsqrt(sum_squares / channels + eps)
    tl.store(factor + row, r)
    result = values * r * load_row(weight, row, 0, column, C)
    if MODULATED:
        result = result * (1.0 + load_row(scale, row, scale_stride, column, C))
        result += load_row(shift, row, shift_stride, column, C)
    store_row(h, row, C, column, C, result)


@triton.jit
def norm_backward_kernel(
    gradient, x, weight, scale, factor, for_x, for_weight, for_shift, for_scale, for_total,
    rows, gradient_stride, x_stride, scale_stride, for_shift_stride, for_scale_stride, channels,
    C: tl.constexpr, BLOCK: tl.constexpr, MODULATED: tl.constexpr, FROM_TOTAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    w = load_row(weight, program, 0, column, C)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        g = load_row(gradient, row, gradient_stride, column, C)
        r = tl.load(factor + row)
        normal = load_row(x, row, x_stride, column, C) * r
        opened = g
        if MODULATED:
            opened = g * (1.0 + load_row(scale, row, scale_stride, column, C))
            store_row(for_shift, row, for_shift_stride, column, C, g)
            store_row(for_scale, row, for_scale_stride, column, C, g * normal * w)
        sum_weight += opened * normal
        inner = opened * w
        along = tl.sum(inner * normal, axis=0)
        if FROM_TOTAL:
            store_row(for_x, row, C, column, C, r * inner)
            tl.store(for_total + row, -0.5 * along * r * r / channels)
        else:
            store_row(for_x, row, C, column, C, r * (inner - normal * (along / channels)))
    store_row(for_weight, program, C, column, C, sum_weight)


@triton.jit
def gated_residual_kernel(
    x, y, gate, out, total, x_stride, y_stride, gate_stride,
    C: tl.constexpr, BLOCK: tl.constexpr, WITH_SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    sum_out = load_row(gate, row, gate_stride, column, C) * load_row(y, row, y_stride, column, C)
    sum_out += load_row(x, row, x_stride, column, C)
    store_row(out, row, C, column, C, sum_out)
    if WITH_SUM:
        rounded = sum_out.to(out.dtype.element_ty).to(tl.float32)
        tl.store(total + row, tl.sum(rounded * rounded, axis=0))


@triton.jit
def gated_residual_backward_kernel(
    gradient, for_sum, x, y, gate, for_x, for_y, for_gate,
    gradient_stride, x_stride, y_stride, gate_stride, for_gate_stride,
    C: tl.constexpr, BLOCK: tl.constexpr, WITH_SUM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    g = load_row(gradient, row, gradient_stride, column, C)
    branch = load_row(y, row, y_stride, column, C)
    opening = load_row(gate, row, gate_stride, column, C)
    if WITH_SUM:
        out = load_row(x, row, x_stride, column, C) + opening * branch
        g += 2.0 * tl.load(for_sum + row) * out.to(gradient.dtype.element_ty).to(tl.float32)
        store_row(for_x, row, C, column, C, g)
    store_row(for_y, row, C, column, C, g * opening)
    store_row(for_gate, row, for_gate_stride, column, C, g * branch)


@triton.jit
def gated_residual_norm_kernel(
    x, y, gate, weight, shift, scale, out, h, factor,
    x_stride, y_stride, gate_stride, shift_stride, scale_stride, eps,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    values = load_row(gate, row, gate_stride, column, C) * load_row(y, row, y_stride, column, C)
    values += load_row(x, row, x_stride, column, C)
    store_row(out, row, C, column, C, values)
    values = values.to(out.dtype.element_ty).to(tl.float32)
    r = tl.rsqrt(tl.sum(values * values, axis=0) / C + eps)
    tl.store(factor + row, r)
    result = values * r * load_row(weight, row, 0, column, C)
    result = result * (1.0 + load_row(scale, row, scale_stride, column, C))
    store_row(h, row, C, column, C, result + load_row(shift, row, shift_stride, column, C))


@triton.jit
def gated_residual_norm_backward_kernel(
    for_out, gradient, x, y, gate, weight, scale, factor, for_x, for_y, for_weight, for_gate, for_shift, for_scale,
    rows, for_out_stride, gradient_stride, x_stride, y_stride, gate_stride, scale_stride,
    for_gate_stride, for_shift_stride, for_scale_stride,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    w = load_row(weight, program, 0, column, C)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        branch = load_row(y, row, y_stride, column, C)
        opening = load_row(gate, row, gate_stride, column, C)
        out = load_row(x, row, x_stride, column, C) + opening * branch
        r = tl.load(factor + row)
        normal = out.to(for_out.dtype.element_ty).to(tl.float32) * r
        g = load_row(gradient, row, gradient_stride, column, C)
        store_row(for_shift, row, for_shift_stride, column, C, g)
        store_row(for_scale, row, for_scale_stride, column, C, g * normal * w)
        opened = g * (1.0 + load_row(scale, row, scale_stride, column, C))
        sum_weight += opened * normal
        inner = opened * w
        along = tl.sum(inner * normal, axis=0)
        total = load_row(for_out, row, for_out_stride, column, C) + r * (inner - normal * (along / C))
        store_row(for_x, row, C, column, C, total)
        store_row(for_y, row, C, column, C, total * opening)
        store_row(for_gate, row, for_gate_stride, column, C, total * branch)
    store_row(for_weight, program, C, column, C, sum_weight)


@triton.jit
def sum_of_squares_kernel(x, total, x_stride, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    values = load_row(x, row, x_stride, tl.arange(0, BLOCK), C)
    tl.store(total + row, tl.sum(values * values, axis=0))


@triton.jit
def sum_of_squares_backward_kernel(for_sum, x, for_x, x_stride, C: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    values = load_row(x, row, x_stride, column, C)
    store_row(for_x, row, C, column, C, 2.0 * tl.load(for_sum + row) * values)
