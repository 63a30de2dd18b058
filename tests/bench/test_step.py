"""The step benchmark at tiny sizes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rae_scale.bench import step
from rae_scale.bench.record import Measure, Row
from rae_scale.bench.record_report import to_markdown
from rae_scale.bench.results import cell, write_json
from rae_scale.bench.session import Session
from rae_scale.bench.setup import Step, StepSetup, step_flops
from rae_scale.bench.step_report import STEP, bench_step, compare_ways
from rae_scale.parallel import Mesh

CPU = torch.device("cpu")
ALONE = Session(CPU, 1)
TINY = StepSetup(model="dit-tiny", batch=3)


def test_every_parameter_gets_a_gradient_and_moves() -> None:
    """A new DiT's gates are closed: the branches behind them would compute with zeros."""
    with step.step_of(TINY, "ours", Mesh(CPU)) as stepping:
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
        with step.step_of(TINY, way, Mesh(CPU)) as stepping:
            losses.append(stepping.forward(stepping.inputs(3, 0)).item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_report_says_time_rate_memory_and_ratio(tmp_path: Path) -> None:
    setup = StepSetup("dit-tiny", 3, overrides=("engine.precision=fp32",))
    trace = tmp_path / "trace.json"
    record = bench_step(setup, ALONE, against=["eager"], repeats=2, peak_tflops=1.0, trace=trace, small=True)
    ours, eager = record.rows
    assert ours.values["images_per_s"] == pytest.approx(3 / ours.measures["step"].median)
    assert ours.values["mfu"] == pytest.approx(ours.values["tflops"])  # of 1 TFLOP/s
    assert 0 < ours.values["activation_gb"] < eager.values["activation_gb"]
    ratio = eager.measures["step"].median / ours.measures["step"].median
    assert eager.values["speed_of_ours"] == pytest.approx(ratio) and "speed_of_ours" not in ours.values
    assert [row.settings["kernels"] for row in record.rows] == ["ours", "eager"]
    facts = ours.facts
    assert (facts["precision"], facts["kernels"], facts["world_size"]) == ("fp32", "ours", 1)
    assert facts["flops"] == {
        "formula": "models.flops: dit_cost",
        "per_image": step_flops(setup)[1],
        "encoder_counted": False,
    }
    text = to_markdown(STEP, record)
    assert "kernels eager: ours is" in text and "| our kernels |" in text and "encoder not counted" in text
    assert trace.is_file()


def test_micro_batches_make_the_step_of_the_whole_batch() -> None:
    """The same gradient norm, in as many forward passes as the settings say."""
    norms = []
    for micro in (4, 2):
        setup = StepSetup("dit-tiny", 4, overrides=("engine.precision=fp32", f"data.micro_batch_size={micro}"))
        stepping = Step(setup, Mesh(CPU))
        assert (stepping.batch, stepping.micro_steps) == (micro, 4 // micro)
        whole = stepping.inputs(4, 0)
        parts = [{n: x[start : start + micro] for n, x in whole.items()} for start in range(0, 4, micro)]
        for number, part in enumerate(parts, start=1):
            stepping.engine.backward(stepping.forward(part), last=number == len(parts))
        norms.append(stepping.engine.step(stepping.lrs).grad_norm)
        stepping.engine.close()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_settings_that_a_step_does_not_heed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"run.seed changes nothing that `bench step` measures"):
        step.settings(TINY.with_overrides(["run.seed=3"]), "ours")
    with pytest.raises(ValueError, match=r"parallel.tp=2, parallel.sp=1 without --with-llm"):
        step.settings(TINY.with_overrides(["engine.name=fsdp2", "parallel.tp=2"]), "ours")
    compiled = step.settings(TINY, "compile")["config"]["engine"]["compile"]
    assert compiled == "blocks" and step.settings(TINY, "eager")["config"]["engine"]["compile"] == "none"


def test_with_the_language_model_both_are_trained() -> None:
    setup = StepSetup("dit-tiny", 2, with_llm=True, llm="qwen2-tiny", text_tokens=8)
    with step.step_of(setup, "ours", Mesh(CPU)) as stepping:
        module, inputs = stepping.engine.module, stepping.inputs(2, 0)
        stepping.engine.backward(stepping.forward(inputs), last=True)
        assert all(p.grad is not None and p.grad.any() for p in module.conditioner.llm.parameters())
    alone = StepSetup("dit-tiny", 2)
    assert step_flops(setup)[1] > step_flops(alone)[1] > 0
    assert step_flops(setup.with_overrides(["model.llm.train=false"]))[1] < step_flops(setup)[1]


def test_another_number_of_tokens_is_another_grid() -> None:
    with step.step_of(StepSetup("dit-tiny", 1, tokens=64), "ours", Mesh(CPU)) as stepping:
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
        bench_step(StepSetup("dit-tiny", tokens=200), ALONE, small=True)
    with pytest.raises(ValueError, match="--tokens changes the DiT alone"):
        bench_step(StepSetup("dit-tiny", tokens=64, with_llm=True, llm="qwen2-tiny"), ALONE, small=True)
    with pytest.raises(ValueError, match="--profile looks at one setting"):
        bench_step(TINY, ALONE, [(), ()], trace=Path("x"), small=True)


def test_a_way_without_memory_is_a_row_and_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "time_step", refuse)
    record = bench_step(TINY, ALONE, against=["eager"], small=True)
    assert [row.failed for row in record.rows] == ["out of memory"] * 2
    rows = [Row({"kernels": "ours"}, {}, measures={"step": Measure(2, 2, 2, 1)}), record.rows[1]]
    compare_ways(rows)
    assert "speed_of_ours" not in rows[1].values
    assert "| kernels eager |" in to_markdown(STEP, record) and "out of memory |" in to_markdown(STEP, record)


def test_cells_of_a_table_that_a_row_lacks_are_empty(tmp_path: Path) -> None:
    assert cell({"a": 1.25}, "{a:.1f}") == "1.2" and cell({}, "{a:.1f}") == "" and cell({"a": None}, "{a:.1f}") == ""
    write_json(tmp_path / "a/b.json", {"a": 1})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]
