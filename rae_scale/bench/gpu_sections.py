"""The sections of the GPU check, each a function that measures and returns plain data.

The sections up to `attention` need PyTorch and `rae_kernels` only, those of steps the whole package.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rae_kernels
from rae_kernels.adamw import adamw_ema_
from rae_kernels.dispatch import fallbacks
from rae_scale.bench import kernels
from rae_scale.bench.attention import PUBLISHED_LENGTHS, PUBLISHED_SHAPES, bench_attention
from rae_scale.bench.cases import CASES, Builder
from rae_scale.bench.machine import environment
from rae_scale.bench.results import write_json
from rae_scale.bench.timing import copy_bandwidth, measure, rates, size

Data = dict[str, Any]

WARPS = (1, 2, 4, 8, 16)
TUNED_FAMILIES = ("norm", "qk_rope", "swiglu", "flow")

WEIGHTS_AND_STATES = 48e9
BYTES_PER_IMAGE = 1.5e9
"""Of DiT-2.4B with float32 weights, gradients and moments; and of one image's activations with reference operations."""


@dataclass(frozen=True)
class Sizes:
    """What is run: the sizes that the goals are stated for, or tiny ones that show that everything runs."""

    dry: bool
    device: torch.device
    folder: Path
    tokens: int = 16384
    hidden: int = 2048
    head_dim: int = 64
    repeats: int = 30
    check_repeats: int = 20
    model: str = "dit-2.4b"
    batch: int = 64
    largest_model: str = "dit-9.8b"
    searched: Sequence[str] = ("dit-0.5b", "dit-2.4b", "dit-5.5b")
    optimizer_elements: int = 200_000_000

    @classmethod
    def of(cls, device: torch.device, folder: Path, *, dry: bool) -> Sizes:
        sizes = cls(dry, device, folder)
        if not dry:
            memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
            fitting = int((memory - WEIGHTS_AND_STATES) / BYTES_PER_IMAGE) // 8 * 8
            return replace(sizes, batch=max(8, min(64, fitting)))
        return replace(
            sizes,
            tokens=128,
            hidden=128,
            head_dim=32,
            repeats=2,
            check_repeats=2,
            model="dit-tiny",
            batch=2,
            largest_model="dit-tiny",
            searched=("dit-tiny",),
            optimizer_elements=1000,
        )

    def builder(self) -> Builder:
        return Builder(self.tokens, self.hidden, self.head_dim, self.device)


def where(sizes: Sizes) -> Data:
    return {"environment": environment(sizes.device), "report": rae_kernels.report(), "batch": sizes.batch}


def ceilings(sizes: Sizes) -> Data:
    """Twice, so that the spread shows."""
    return {"runs": [rates(sizes.device, small=sizes.dry) for _ in range(2)]}


def correctness(sizes: Sizes) -> Data:
    """An operation that fails does not keep the others from being checked."""
    rows: list[Data] = []
    for name, make in CASES.items():
        try:
            rows += kernels.check_case(make(sizes.builder()), sizes.check_repeats)
        except Exception as error:
            rows.append({"operation": name, "failed": f"{type(error).__name__}: {error}"[:500]})
    return {"checks": rows, "fallbacks": {" on ".join(k): v for k, v in fallbacks().items()}}


def optimizer(sizes: Sizes) -> Data:
    """The CUDA C++ kernel against the plain path: largest difference after three steps, the same bits twice, time."""
    count, device = sizes.optimizer_elements, sizes.device
    settings: Data = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "ema_decay": 0.999}

    def state(moments: torch.dtype) -> list[list[Tensor]]:
        generator = torch.Generator(device).manual_seed(0)
        weights, gradients, average = (torch.randn(count, device=device, generator=generator) for _ in range(3))
        moment = torch.zeros(count, device=device, dtype=moments)
        copy = torch.empty(count, device=device, dtype=torch.bfloat16)
        return [[t] for t in (weights, gradients * 1e-2, moment, moment.clone(), average, copy)]

    def after_three_steps(choice: Any, moments: torch.dtype, elements: int) -> list[Tensor]:
        tensors = [[tensor[:elements].clone() for tensor in group] for group in state(moments)]
        with rae_kernels.use(choice):
            for step in range(1, 4):
                adamw_ema_(*tensors, **settings, step=step, clip_factor=0.7)
        del tensors[1]  # gradients: what is in them afterwards is undefined
        return [tensor for group in tensors for tensor in group]

    found: Data = {}
    few = min(count, 10_000_000)
    for moments in (torch.float32, torch.bfloat16):
        ours, again = (after_three_steps("auto", moments, few) for _ in range(2))
        plain = after_three_steps("reference", moments, few)
        differences = [float((a.double() - b.double()).abs().max()) for a, b in zip(ours, plain, strict=True)]
        names = ("weight", "exp_avg", "exp_avg_sq", "ema", "copy")
        key = str(moments).removeprefix("torch.")
        found[key] = {
            "largest_difference": dict(zip(names, differences, strict=True)),
            "bit_identical": all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)),
        }
        tensors = state(moments)
        moved = 2 * size([t for group in tensors[:1] + tensors[2:5] for t in group]) + size(tensors[1] + tensors[5])
        copy = copy_bandwidth(device, 0.01 if sizes.dry else 2.0)
        work = functools.partial(adamw_ema_, *tensors, **settings, step=2, clip_factor=0.7)
        for choice in ("auto", "reference"):
            with rae_kernels.use(choice):
                timing = measure([work], device, repeats=sizes.repeats)
            found[key][choice] = timing.milliseconds() | {"fraction_of_copy": moved / timing.median / copy}
    return found


def bandwidth(sizes: Sizes) -> Data:
    """All ways; what torch.compile cannot do here is said and not hidden."""
    copy = copy_bandwidth(sizes.device, 0.01 if sizes.dry else 2.0)
    rows: list[Data] = []
    for name in CASES:
        for way in ("ours", "eager") if sizes.dry else ("ours", "eager", "compile"):
            try:
                rows += kernels.time_operation(name, sizes.builder, [way], copy, sizes.repeats)
            except Exception as error:
                rows.append({"operation": name, "way": way, "failed": f"{type(error).__name__}: {error}"[:500]})
    return {"copy_bytes_per_s": copy, "timings": rows}


def warps(sizes: Sizes) -> Data:
    """Every operation with each number of warps, beside the number that ships."""
    copy = copy_bandwidth(sizes.device, 0.01 if sizes.dry else 2.0)
    rows: list[Data] = []
    for number in (None, *WARPS):
        for name in CASES:
            try:
                with forced_warps(number):
                    found = kernels.time_operation(name, sizes.builder, ["ours"], copy, max(5, sizes.repeats // 2))
                rows += [row | {"warps": number or "shipped"} for row in found]
            except Exception as error:
                rows.append({"operation": name, "warps": number, "failed": f"{type(error).__name__}: {error}"[:300]})
        # The last section may run out of time.
        write_json(sizes.folder / "warps.json", rows)
        if sizes.dry and number:
            break
    return {"timings": rows}


@contextmanager
def forced_warps(number: int | None) -> Iterator[None]:
    """Launch every kernel with `number` warps; None leaves the shipped choice."""
    modules: list[Any] = []
    if number:
        modules = [import_module(f"rae_kernels.triton_impl.{family}") for family in TUNED_FAMILIES]
    shipped = [module.shape_of for module in modules]
    try:
        for module, shape_of in zip(modules, shipped, strict=True):
            module.shape_of = with_warps(shape_of, number)
        yield
    finally:
        for module, shape_of in zip(modules, shipped, strict=True):
            module.shape_of = shape_of


def with_warps(shape_of: Callable[..., Data], number: int | None) -> Callable[..., Data]:
    return lambda *args, **kwargs: shape_of(*args, **kwargs) | {"num_warps": number}


def attention(sizes: Sizes) -> Data:
    shapes, lengths = ([(2, 32)], [64]) if sizes.dry else (PUBLISHED_SHAPES, PUBLISHED_LENGTHS)
    total = 128 if sizes.dry else 16384
    return {"timings": list(bench_attention(shapes, lengths, total, sizes.device, max(2, sizes.repeats // 3)))}
