"""`train(config)` end to end in one process, on the smallest world there is."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import SignalAt, TinyWorld, make_sample, poisoning, read_metrics, write_shards

from rae_scale.config import load_config
from rae_scale.state import latest_checkpoint, read_weights
from rae_scale.train import train
from rae_scale.train.callbacks.base import Callback
from rae_scale.train.loop import Run
from rae_scale.train.stages import GenerationStage

TIMINGS = ("_s", "_per_second", "tflops", "memory_bytes", "effective_time")


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics without those that depend on the machine's mood."""
    return [{k: v for k, v in line.items() if not k.endswith(TIMINGS)} for line in read_metrics(run_dir)]


def weights(run_dir: Path, kind: str = "weight") -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    return read_weights(checkpoint, kind=kind)


def assert_same_weights(first: Path, second: Path) -> None:
    for kind in ("weight", "ema"):
        ours, theirs = weights(first, kind), weights(second, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_loss_falls_and_every_step_is_logged(world: TinyWorld, tmp_path: Path) -> None:
    fast = {"llm": {"lr": 5e-3}, "dit": {"lr": 5e-3}}
    settings = {"optim__groups": fast, "optim__schedule": "constant", "optim__warmup_ratio": 0.2}
    train(world.config(tmp_path, run__max_steps=20, **settings))
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["loss_flow"] < 0.6 * lines[0]["loss_flow"]
    assert lines[-1]["loss_text"] < 0.5 * lines[0]["loss_text"]
    line = lines[0]
    assert line["loss"] == pytest.approx(line["loss_text"] + 2.0 * line["loss_flow"], rel=1e-5)
    assert line["grad_norm"] == pytest.approx((line["grad_norm_llm"] ** 2 + line["grad_norm_dit"] ** 2) ** 0.5)
    assert line["lr_dit"] == pytest.approx(5e-3 / 4)
    expected = {"images_per_second", "tokens_per_second", "tflops", "step_s", "data_wait_s", "memory_bytes", "skipped"}
    assert expected | {f"loss_flow_bin_{i}" for i in range(5)} <= line.keys()


def test_the_run_folder_says_what_ran(world: TinyWorld, tmp_path: Path) -> None:
    config = world.config(tmp_path, run__max_steps=1)
    train(config)
    assert load_config(tmp_path / "config.yaml") == config
    assert torch.__version__.startswith(json.loads((tmp_path / "version.json").read_text())["torch"])


def test_micro_batches_do_not_change_the_curve(world: TinyWorld, tmp_path: Path) -> None:
    train(world.config(tmp_path / "whole", run__max_steps=3))
    train(world.config(tmp_path / "micro", run__max_steps=3, data__micro_batch_size=2))
    for whole, micro in zip(read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "micro"), strict=True):
        assert micro["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert micro["loss_flow"] == pytest.approx(whole["loss_flow"], rel=1e-5)
        assert micro["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def with_callback(monkeypatch: pytest.MonkeyPatch, callback: Callback) -> None:
    from rae_scale.train import setup

    build = setup.build_callbacks
    monkeypatch.setattr(setup, "build_callbacks", lambda *args: [callback, *build(*args)])


def test_stop_by_a_signal_and_resume_is_running_straight_through(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"run__max_steps": 6, "optim__ema_decay": 0.9, "data__micro_batch_size": 4}
    train(world.config(tmp_path / "straight", **settings))
    with monkeypatch.context() as patch:
        with_callback(patch, SignalAt(step=2))
        train(world.config(tmp_path / "stopped", **settings))
    assert [line["step"] for line in read_metrics(tmp_path / "stopped")] == [1, 2]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(world.config(tmp_path / "stopped", **settings))
    assert curve(tmp_path / "stopped") == curve(tmp_path / "straight")
    assert_same_weights(tmp_path / "stopped", tmp_path / "straight")


class Dies(Exception):
    pass


class DieAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Run, metrics: dict[str, Any]) -> None:
        if run.step == self.step:
            raise Dies


def test_steps_after_the_last_checkpoint_are_redone_and_logged_once(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Position 28 makes step 4 a skipped one: after the checkpoint of step 2, so it is met twice by the run that dies.
    monkeypatch.setattr(GenerationStage, "prepare", poisoning(GenerationStage.prepare, position=28))
    settings = {"run__max_steps": 5, "run__save_every": 2, "optim__ema_decay": 0.9}
    train(world.config(tmp_path / "straight", **settings))
    with monkeypatch.context() as patch:
        with_callback(patch, DieAt(step=4))
        with pytest.raises(Dies):
            train(world.config(tmp_path / "killed", **settings))
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # what a kill in the middle of a write leaves
    train(world.config(tmp_path / "killed", **settings))
    assert curve(tmp_path / "killed") == curve(tmp_path / "straight")
    assert (tmp_path / "killed" / "skipped.jsonl").read_text() == (tmp_path / "straight" / "skipped.jsonl").read_text()
    assert_same_weights(tmp_path / "killed", tmp_path / "straight")


def test_a_finished_run_starts_again_without_a_step(world: TinyWorld, tmp_path: Path) -> None:
    train(world.config(tmp_path, run__max_steps=2))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    train(world.config(tmp_path, run__max_steps=2))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("micro_batch_size", [8, 2])
def test_a_loss_that_is_not_finite_skips_the_step(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int
) -> None:
    # Global position 13 is in the second step.
    monkeypatch.setattr(GenerationStage, "prepare", poisoning(GenerationStage.prepare, position=13))
    settings = {"data__micro_batch_size": micro_batch_size, "optim__ema_decay": 0.9, "run__save_every": 1}
    train(world.config(tmp_path, run__max_steps=3, run__keep_last=3, **settings))
    lines = read_metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    assert lines[1]["loss"] is None and lines[1]["grad_norm"] is None
    assert lines[2]["loss"] is not None
    (entry,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert entry["step"] == 2 and entry["positions"] == [8, 16]
    assert len(entry["sample_ids"]) == 1 and entry["sample_ids"][0].startswith("data:")
    for kind in ("weight", "ema"):
        before, after = (read_weights(tmp_path / "checkpoints" / f"step-0000000{n}", kind=kind) for n in (1, 2))
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_skipped_step_leaves_nothing_for_the_next(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Position 13 is in the third micro-batch of two: by then, two have left their gradients.
    monkeypatch.setattr(GenerationStage, "prepare", poisoning(GenerationStage.prepare, position=13))
    train(world.config(tmp_path / "whole", run__max_steps=3))
    train(world.config(tmp_path / "micro", run__max_steps=3, data__micro_batch_size=2))
    whole, micro = (read_metrics(tmp_path / name)[2] for name in ("whole", "micro"))
    assert micro["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


def test_gradients_that_are_not_finite_skip_the_step(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = GenerationStage.loss

    def explode(self: GenerationStage, module: Any, inputs: Any, totals: Any) -> Any:
        output = loss(self, module, inputs, totals)
        if 13 in inputs.batch.sample_index:
            output.loss.register_hook(lambda gradient: gradient * float("inf"))
        return output

    monkeypatch.setattr(GenerationStage, "loss", explode)
    train(world.config(tmp_path, run__max_steps=3))
    lines = read_metrics(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    assert lines[1]["loss"] is not None and lines[1]["grad_norm"] is None
    assert "gradients" in json.loads((tmp_path / "skipped.jsonl").read_text())["reason"]


def test_a_frozen_language_model_stays_and_its_queries_learn(world: TinyWorld, tmp_path: Path) -> None:
    # Three steps: gates and output layer start at zero, and open before anything reaches what lies behind them.
    settings = {"model__llm__train": False, "run__save_every": 1, "run__keep_last": 3, "stage": "finetune"}
    train(world.config(tmp_path, run__max_steps=3, **settings))
    first, last = (read_weights(tmp_path / "checkpoints" / f"step-0000000{n}", kind="weight") for n in (1, 3))
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert "conditioner.latent_queries" in changed and "connector.weight" in changed
    assert not any(name.startswith("conditioner.llm.") for name in changed)


def test_finetune_begins_from_the_weights_of_another_run(world: TinyWorld, tmp_path: Path) -> None:
    train(world.config(tmp_path / "pretrain", run__max_steps=2))
    settings = {"stage": "finetune", "run__init_from": str(tmp_path / "pretrain"), "run__max_steps": 1}
    # A learning rate of nothing to speak of: what is saved is what was loaded.
    tiny = {"llm": {"lr": 1e-30}, "dit": {"lr": 1e-30}}
    train(world.config(tmp_path / "finetune", optim__groups=tiny, **settings))
    ours, theirs = weights(tmp_path / "finetune"), weights(tmp_path / "pretrain")
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-20) for name in ours)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model__llm__connector": "mlp"}, "model.llm.connector was 'linear', is 'mlp'"),
        ({"data__global_batch_size": 4}, "data.global_batch_size was 8, is 4"),
        ({"run__seed": 7}, "run.seed was 0, is 7"),
        ({"stage": "finetune"}, "stage was 'pretrain', is 'finetune'"),
    ],
)
def test_another_model_or_data_order_is_not_resumed(
    world: TinyWorld, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    train(world.config(tmp_path, run__max_steps=1))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=named):
        train(world.config(tmp_path, run__max_steps=2, **change))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_other_data_are_not_resumed(world: TinyWorld, tmp_path: Path) -> None:
    write_shards(tmp_path / "other", [make_sample(number) for number in range(20)])
    train(world.config(tmp_path / "run", run__max_steps=1))
    with pytest.raises(ValueError, match="data fingerprint was"):
        train(world.config(tmp_path / "run", run__max_steps=2, data__sources=[{"path": str(tmp_path / "other")}]))


def test_resume_never_does_not_write_over_a_run(world: TinyWorld, tmp_path: Path) -> None:
    train(world.config(tmp_path, run__max_steps=1))
    with pytest.raises(ValueError, match=r"run.resume=never.*holds step-00000001"):
        train(world.config(tmp_path, run__resume="never"))
