"""The operation benchmark: its bytes, its verdicts, and that every case runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rae_scale.bench import kernels
from rae_scale.bench.cases import CASES, Builder, Case
from rae_scale.bench.timing import measure, summary

CPU = torch.device("cpu")


def builder() -> Builder:
    return Builder(tokens=512, hidden=384, head_dim=64, device=CPU)


def roofline():
    path = Path(__file__).resolve().parents[2] / "kernels/bench/roofline.py"
    spec = importlib.util.spec_from_file_location("roofline", path)
    module = sys.modules["roofline"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name", ["norm_modulate", "gated_residual_norm_modulate", "gated_residual", "swiglu", "qk_rope"]
)
def test_bytes_are_those_of_the_roofline(name: str) -> None:
    """But for weights and tables, which the roofline leaves out."""
    case = CASES[name](builder())
    of_roofline = {"qk_rope": "qk_norm_rope"}.get(name, name)
    expected = roofline().fused_traffic(4, recompute_swiglu=False)[of_roofline]
    elements = 512 * (1024 if name == "swiglu" else 384)
    assert case.forward_bytes == pytest.approx(elements * expected.forward, rel=0.07)
    assert case.backward_bytes == pytest.approx(elements * expected.backward, rel=0.07)


def test_modulation_is_read_in_place() -> None:
    shift = CASES["norm_modulate"](builder()).inputs["shift"]
    assert shift.stride(-2) == 6 * shift.shape[-1]


def test_a_right_operation_passes() -> None:
    rows = kernels.check_case(CASES["gated_residual_norm_modulate"](builder()), repeats=2)
    assert [row["tensor"] for row in rows] == [
        "result 0", "result 1", "dx", "dy", "dgate", "dweight", "dshift", "dscale",
    ]  # fmt: skip
    assert all(row["within_twice"] and row["bit_identical"] for row in rows)


class Wrong:
    """An operation that can be told to be wrong where the choice is not the reference."""

    def __init__(self, spoil) -> None:
        self.spoil = spoil

    def __call__(self, x: Tensor) -> tuple[Tensor]:
        from rae_kernels.dispatch import chosen

        out = x * 2
        return (out if chosen() == "reference" else self.spoil(out),)


def case_of(spoil) -> Case:
    x = torch.randn(64, 64).requires_grad_()
    return Case("wrong", Wrong(spoil), {"x": x}, (), (), (torch.randn(64, 64),))


def test_what_is_wrong_not_a_number_or_not_the_same_twice_shows() -> None:
    by_name = {row["tensor"]: row for row in kernels.check_case(case_of(lambda out: out * 1.01), repeats=2)}
    assert not by_name["result 0"]["within_twice"] and not by_name["dx"]["within_twice"]
    assert by_name["result 0"]["bit_identical"]
    (row, _) = kernels.check_case(case_of(lambda out: out * float("nan")), repeats=2)
    assert not row["within_twice"]
    (row, _) = kernels.check_case(case_of(lambda out: out + 1e-3 * torch.rand(())), repeats=3)
    assert not row["bit_identical"]


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_timed_forward_and_backward(name: str) -> None:
    rows = kernels.time_operation(name, builder, ("ours", "eager"), copy_bandwidth=1e9, repeats=2)
    passes = ["forward"] if name == "flow_interpolate" else ["forward", "backward"]
    assert [(row["way"], row["pass"]) for row in rows] == [(w, p) for w in ("ours", "eager") for p in passes]
    for row in rows:
        assert row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["fraction_of_copy"] == pytest.approx(row["gigabytes_per_s"] / 1.0)


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="--only=attention: there is no such operation; choose from norm_modulate"):
        list(kernels.build(["attention"], builder()))


def test_timing_is_median_and_deciles_and_inputs_take_turns() -> None:
    assert summary([3.0, 1.0, 2.0, 100.0, 2.0])[0] == 2.0
    calls: list[int] = []
    measure([lambda: calls.append(0), lambda: calls.append(1)], CPU, repeats=4, warm_up=2)
    assert calls == [0, 1, 0, 1, 0, 1]
