"""Kernels of `rae_kernels.flow_operators`: noise is drawn in registers, four numbers to a counter.

A program has a run of one sample's elements. Those of a slice that begins amid the four numbers of a counter (channels
that four does not divide) are shifted by LEAD, the numbers of that counter that come before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rae_kernels.flow_operators import loss_dtype
from rae_kernels.spec.flow import mean_square_slope
from rae_kernels.triton_impl.variants import ELEMENT, Variant

GROUPS = 512
"""Counters to a program, at most."""

# A launch with another seed, step or slice is no other kernel.
NOISE = ["seed", "step", "stream", "first_group"]


@triton.jit
def normals(seed, step, index, stream, group, GROUPS: tl.constexpr):
    """`philox_normal` of the counters `group` [GROUPS]: float32 [4 * GROUPS], in order."""
    c0 = group.to(tl.uint32)
    zero = c0 * 0
    c1 = zero + index.to(tl.uint32)
    c2 = zero + ((index >> 32).to(tl.uint32) | (stream.to(tl.uint32) << 16))
    c3 = zero + step.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    n0, n1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1))
    n2, n3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3))
    # The last index of a join is the innermost: (n0, n2) and (n1, n3) make n0, n1, n2, n3.
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [4 * GROUPS])


@triton.jit(do_not_specialize=NOISE)
def flow_interpolate_kernel(
    x, t, sample_index, out, seed: tl.int64, step: tl.int64, stream, numel, x_stride, GROUPS: tl.constexpr
):
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    eps = normals(seed, step, tl.load(sample_index + sample), stream, block * GROUPS + tl.arange(0, GROUPS), GROUPS)
    element = block * (4 * GROUPS) + tl.arange(0, 4 * GROUPS)
    mask = element < numel
    values = tl.load(x + sample * x_stride + element, mask=mask, other=0.0).to(tl.float32)
    time = tl.load(t + sample).to(tl.float32)
    tl.store(out + sample * numel + element, (1.0 - time) * values + time * eps, mask=mask)


@triton.jit(do_not_specialize=NOISE)
def flow_matching_loss_kernel(
    velocity, x, sample_index, parts, difference,
    seed: tl.int64, step: tl.int64, stream, first_group, numel, velocity_stride, x_stride,
    LEAD: tl.constexpr, KEEP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = first_group + block * GROUPS + tl.arange(0, GROUPS)
    eps = normals(seed, step, tl.load(sample_index + sample), stream, group, GROUPS)
    element = block * (4 * GROUPS) + tl.arange(0, 4 * GROUPS) - LEAD
    mask = element < numel
    if LEAD:
        mask = mask & (element >= 0)
    values = tl.load(velocity + sample * velocity_stride + element, mask=mask, other=0.0).to(tl.float32)
    values -= eps - tl.load(x + sample * x_stride + element, mask=mask, other=0.0).to(tl.float32)
    values = tl.where(mask, values, 0.0)
    tl.store(parts + sample * tl.num_programs(1) + block, tl.sum(values * values, axis=0))
    if KEEP:
        tl.store(difference + sample * numel + element, values, mask=mask)


@triton.jit
def flow_matching_loss_backward_kernel(for_loss, difference, for_velocity, slope, numel, BLOCK: tl.constexpr):
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    element = block * BLOCK + tl.arange(0, BLOCK)
    mask = element < numel
    factor = tl.load(for_loss + sample) * slope
    values = tl.load(difference + sample * numel + element, mask=mask, other=0.0)
    tl.store(for_velocity + sample * numel + element, values * factor, mask=mask)


def shape_of(numel: int) -> dict[str, int]:
    """Counters to a program and number of warps, for samples of `numel` elements."""
    groups = min(GROUPS, triton.next_power_of_2(triton.cdiv(numel, 4)))
    return {"GROUPS": groups, "num_warps": max(1, groups // 128)}


def samples_of(tensor: Tensor) -> tuple[Tensor, int]:
    """[B, P, C] with each sample's elements in a row, and the distance between samples. A copy if it must be."""
    if not tensor[0].is_contiguous():
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0)


def flow_interpolate(x: Tensor, t: Tensor, sample_index: Tensor, seed: int, step: int, stream: int) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        x, x_stride = samples_of(x)
        numel = x[0].numel()
        shape = shape_of(numel)
        flow_interpolate_kernel[len(x), triton.cdiv(numel, 4 * shape["GROUPS"])](
            x, t.contiguous(), sample_index.contiguous(), out, seed, step, stream, numel, x_stride, **shape
        )
    return out


def flow_matching_loss(
    velocity: Tensor,
    x: Tensor,
    sample_index: Tensor,
    seed: int,
    step: int,
    stream: int,
    first_token: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = velocity.shape
    numel = tokens * channels
    first_group, lead = divmod(first_token * channels, 4)
    shape = shape_of(numel + lead)
    programs = triton.cdiv(numel + lead, 4 * shape["GROUPS"])
    parts = torch.empty(batch, programs, dtype=loss_dtype(velocity, x), device=x.device)
    difference = torch.empty(velocity.shape if keep else 0, dtype=parts.dtype, device=x.device)
    if velocity.numel():
        velocity, velocity_stride = samples_of(velocity)
        x, x_stride = samples_of(x.narrow(1, first_token, tokens))
        flow_matching_loss_kernel[batch, programs](
            velocity, x, sample_index.contiguous(), parts, difference if keep else None,
            seed, step, stream, first_group, numel, velocity_stride, x_stride, LEAD=lead, KEEP=keep, **shape,
        )  # fmt: skip
    return parts.sum(dim=1) / numel, difference


def flow_matching_loss_backward(for_loss: Tensor, difference: Tensor, dtype: torch.dtype) -> Tensor:
    for_velocity = torch.empty(difference.shape, dtype=dtype, device=difference.device)
    if difference.numel():
        numel = difference[0].numel()
        shape = shape_of(numel)
        block = 4 * shape["GROUPS"]
        flow_matching_loss_backward_kernel[len(difference), triton.cdiv(numel, block)](
            for_loss.contiguous(), difference, for_velocity, mean_square_slope(difference), numel,
            BLOCK=block, num_warps=shape["num_warps"],
        )  # fmt: skip
    return for_velocity


def variants() -> Iterator[Variant]:
    """Every kernel at the published latents, 256 tokens of 1152, 1024 or 64 channels, and at the demo's 16 of 64.

    What differs between them is how much a program has to do, and for all published ones that is the same.
    """
    sizes = {
        shape_of(tokens * channels)["GROUPS"] for tokens, channels in ((256, 1152), (256, 1024), (256, 64), (16, 64))
    }
    for groups in sorted(sizes):
        yield from variants_of(groups)


def variants_of(groups: int) -> Iterator[Variant]:
    shape = shape_of(4 * groups)
    common = {"seed": "i64", "step": "i64", "stream": "i32", "first_group": "i32", "sample_index": "*i64"}
    common |= {"t": "*fp32", "x": "*fp32", "out": "*fp32", "parts": "*fp32", "for_loss": "*fp32", "slope": "fp32"}
    for velocity in (torch.bfloat16, torch.float32):
        element = f"*{ELEMENT[velocity]}"
        types = common | {"velocity": element, "difference": "*fp32", "for_velocity": element}
        name = f"{ELEMENT[velocity]}-{4 * groups}"
        for keep in (False, True):
            constants = {"GROUPS": groups, "LEAD": 0, "KEEP": keep} | ({} if keep else {"difference": None})
            found = variant(flow_matching_loss_kernel, name, types, constants, shape["num_warps"])
            yield found if keep else found._replace(name=f"{found.name}-loss-only", instructions=("LDG.E.128",))
        constants = {"BLOCK": 4 * groups}
        yield variant(flow_matching_loss_backward_kernel, name, types, constants, shape["num_warps"])
    yield variant(flow_interpolate_kernel, str(4 * groups), common, {"GROUPS": groups}, shape["num_warps"])


def variant(
    kernel: Any, name: str, types: Mapping[str, str], constants: Mapping[str, object], num_warps: int
) -> Variant:
    arguments = [argument for argument in kernel.arg_names if argument not in constants]
    sizes = tuple(argument for argument in arguments if argument == "numel" or argument.endswith("_stride"))
    return Variant(
        name=f"{kernel.__name__}-{name}",
        kernel=kernel,
        types={argument: "i32" if argument in sizes else types[argument] for argument in arguments},
        constants=constants,
        divisible=sizes,
        num_warps=num_warps,
    )
