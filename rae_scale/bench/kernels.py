"""Every memory-bound operation: right, the same every time, and how near to the speed of a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

import rae_kernels
from rae_kernels.dispatch import Choice
from rae_scale.bench.cases import CASES, Builder, Case, Tensors
from rae_scale.bench.timing import Timing, measure, number_of_sets

Way = Literal["ours", "eager", "compile"]
"""Our operators; their reference functions call by call; the same under torch.compile."""

CHOICE: dict[Way, Choice] = {"ours": "auto", "eager": "reference", "compile": "reference"}

ERROR_FLOOR = 1e-6
"""Relative errors below are float32's own, and no sign of anything."""

TIMING_COLUMNS = {
    "operation": "{operation}",
    "way": "{way}",
    "pass": "{pass}",
    "ms": "{median_ms:.4f}",
    "10 - 90 %": "{low_ms:.4f} - {high_ms:.4f}",
    "MB": "{megabytes:.1f}",
    "GB/s": "{gigabytes_per_s:.0f}",
    "of copy": "{fraction_of_copy:.1%}",
}
CHECK_COLUMNS = {
    "operation": "{operation}",
    "tensor": "{tensor}",
    "error": "{error:.2e}",
    "PyTorch's error": "{baseline_error:.2e}",
    "within twice": "{within_twice}",
    "same bits": "{bit_identical}",
}


def build(names: Iterable[str], builder: Builder) -> Iterator[Case]:
    """ValueError if there is no such case."""
    for name in names:
        if name not in CASES:
            raise ValueError(f"--only={name}: there is no such operation; choose from {', '.join(CASES)}")
        yield CASES[name](builder)


def check_case(case: Case, repeats: int = 20) -> list[dict[str, Any]]:
    """Per result and gradient: error of our operator and of its reference function in the same types, both against
    float64, and whether it has the same bits in every one of `repeats` calls."""
    exact = case.in_float64().all_results("reference")
    baseline = case.all_results("reference")
    first = case.all_results("auto")
    equal = dict.fromkeys(first, True)
    for _ in range(repeats - 1):
        for name, again in case.all_results("auto").items():
            equal[name] &= torch.equal(again, first[name])
    rows = []
    for name, ours in first.items():
        error, allowed = relative_error(ours, exact[name]), relative_error(baseline[name], exact[name])
        rows.append(
            {
                "operation": case.name,
                "tensor": name,
                "error": error,
                "baseline_error": allowed,
                # Written so that NaN fails.
                "within_twice": bool(error <= 2 * allowed + ERROR_FLOOR),
                "repeats": repeats,
                "bit_identical": equal[name],
            }
        )
    return rows


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is exact."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def time_operation(
    name: str, make: Callable[[], Builder], ways: Sequence[Way], copy_bandwidth: float, repeats: int
) -> list[dict[str, Any]]:
    """A row for each way and direction of one operation. make: a builder, each time the same."""
    builder = make()
    first = CASES[name](builder)
    device = builder.device
    count = number_of_sets(first.forward_bytes, device)
    cases = [first, *(CASES[name](builder) for _ in range(count - 1))]
    rows = []
    for way in ways:
        for direction, timing, moved in directions(cases, way, device, repeats):
            rows.append(
                {
                    "operation": name,
                    "way": way,
                    "pass": direction,
                    **{f"{key}_ms": value for key, value in timing.milliseconds().items()},
                    "megabytes": moved / 1e6,
                    "gigabytes_per_s": moved / timing.median / 1e9,
                    "fraction_of_copy": moved / timing.median / copy_bandwidth,
                    "input_sets": count,
                }
            )
    return rows


def directions(
    cases: Sequence[Case], way: Way, device: torch.device, repeats: int
) -> Iterator[tuple[str, Timing, int]]:
    """Forward with what it keeps for backward, and backward."""
    with rae_kernels.use(CHOICE[way]):
        run = torch.compile(cases[0].run, dynamic=False) if way == "compile" else cases[0].run

        def forward_of(case: Case) -> Callable[[], Tensors]:
            inputs = tuple(case.inputs.values())
            return lambda: run(*inputs)

        yield "forward", measure([forward_of(case) for case in cases], device, repeats=repeats), cases[0].forward_bytes
        if not cases[0].differentiable:
            return

        def backward_of(case: Case) -> Callable[[], Tensors]:
            results = forward_of(case)()
            return lambda: case.backward(results)

        work = [backward_of(case) for case in cases]
        yield "backward", measure(work, device, repeats=repeats), cases[0].backward_bytes
