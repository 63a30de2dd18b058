"""The step benchmark at tiny sizes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rae_scale.bench import step
from rae_scale.bench.results import cell, table, write_json
from rae_scale.bench.setup import StepSetup
from rae_scale.bench.step_report import bench_step, compare

CPU = torch.device("cpu")
TINY = StepSetup(model="dit-tiny", batch=3)


def test_every_parameter_gets_a_gradient_and_moves() -> None:
    """A new DiT's gates are closed: the branches behind them would compute with zeros."""
    with step.step_of(TINY, "ours", CPU) as stepping:
        module, inputs = stepping.engine.module, stepping.inputs(3, 0)
        inputs["drop"][0] = True  # the vector that stands for no condition
        stepping.engine.backward(stepping.forward(inputs), last=True)
        dead = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
        assert dead == []
        before = [parameter.clone() for parameter in module.parameters()]
        assert not stepping.engine.step(stepping.lrs).skipped
        assert all((a != b).any() for a, b in zip(before, module.parameters(), strict=True))


def test_all_ways_compute_the_same_loss() -> None:
    losses = []
    for way in ("ours", "eager"):
        with step.step_of(TINY, way, CPU) as stepping:
            losses.append(stepping.forward(stepping.inputs(3, 0)).item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_report_says_time_rate_memory_and_ratio(tmp_path: Path) -> None:
    setup = StepSetup("dit-tiny", 3, overrides=("engine.precision=fp32",))
    trace = tmp_path / "trace.json"
    report = bench_step(setup, CPU, against=["eager"], repeats=2, peak_tflops=1.0, trace=trace, small=True)
    ours, eager = report.data["ways"]
    assert ours["images_per_s"] == pytest.approx(3 / ours["median_ms"] * 1e3)
    assert ours["mfu"] == pytest.approx(ours["tflops"])  # of 1 TFLOP/s
    assert 0 < ours["activation_gb"] < eager["activation_gb"]
    assert eager["speedup"] == pytest.approx(eager["median_ms"] / ours["median_ms"])
    assert report.data["settings"]["sections"]["engine"]["precision"] == "fp32"
    assert "against eager" in report.text and "| our kernels |" in report.text
    assert trace.is_file()
    report.write(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"step.json", "step.md"}


def test_with_the_language_model_both_are_trained() -> None:
    setup = StepSetup("dit-tiny", 2, with_llm=True, llm="qwen2-tiny", text_tokens=8)
    with step.step_of(setup, "ours", CPU) as stepping:
        module, inputs = stepping.engine.module, stepping.inputs(2, 0)
        stepping.engine.backward(stepping.forward(inputs), last=True)
        assert all(p.grad is not None and p.grad.any() for p in module.conditioner.llm.parameters())
        assert stepping.flops(2) == 2 * stepping.flops(1) > 0


def test_another_number_of_tokens_is_another_grid() -> None:
    with step.step_of(StepSetup("dit-tiny", 1, tokens=64), "ours", CPU) as stepping:
        assert stepping.inputs(1, 0)["x_t"].shape[1] == 64
        assert math.isfinite(stepping.forward(stepping.inputs(1, 0)).item())


@pytest.mark.parametrize("fitting", [0, 1, 2, 3, 7, 8, 9, 31, 100])
def test_search_for_the_largest_is_exact_for_small_numbers_and_near_for_large(fitting: int) -> None:
    asked: list[int] = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= fitting

    found = step.largest(fits, limit=4096)
    assert fitting - fitting // 32 <= found <= fitting
    assert max(asked) <= 2 * max(1, fitting)
    assert step.largest(lambda number: True, limit=10) == 10


def test_what_cannot_be_is_refused_with_the_setting() -> None:
    with pytest.raises(ValueError, match="--find-micro-batch fills a GPU's memory"):
        step.largest_micro_batch(TINY, CPU)
    with pytest.raises(ValueError, match="--model='dit-1b' names no DiT; choose one of dit-demo"):
        StepSetup("dit-1b").config()
    with pytest.raises(ValueError, match="--tokens=200 is no square grid"):
        bench_step(StepSetup("dit-tiny", tokens=200), CPU, small=True)


def test_a_way_without_memory_is_reported_and_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "time_step", refuse)
    row = step.bench_way(TINY, "eager", CPU, {})
    assert row == {"way": "eager", "failed": "out of memory"}
    rows = [{"way": "ours", "median_ms": 2.0, "activation_gb": 1.0}, row]
    compare(rows)
    assert "speedup" not in row
    assert "| eager |  |" in table(rows, step.COLUMNS)


def test_cells_of_a_table_that_a_row_lacks_are_empty(tmp_path: Path) -> None:
    assert cell({"a": 1.25}, "{a:.1f}") == "1.2" and cell({}, "{a:.1f}") == "" and cell({"a": None}, "{a:.1f}") == ""
    write_json(tmp_path / "a/b.json", {"a": 1})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
