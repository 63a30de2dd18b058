"""After too many skipped steps in a row a run goes back to a checkpoint and on with other data, killed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty import Dies, add_callback, curve, faulty_loss
from tiny_world import SignalAt, TinyWorld, read_metrics

from rae_scale.state import CheckpointError, latest_checkpoint, read_state, read_weights
from rae_scale.state.format import MANIFEST
from rae_scale.train import setup, train
from rae_scale.train.callbacks import Callback
from rae_scale.train.guard import rollback, skipped_data
from rae_scale.train.guard.skipped_data import Rollback, SkippedData
from rae_scale.train.stages import GenerationStage

BATCH = 8
SETTINGS: dict[str, Any] = {
    "run__max_steps": 9,
    "run__save_every": 2,
    "run__keep_last": 9,
    "optim__ema_decay": 0.9,
    "fault__max_skips_in_row": 2,
    "fault__spike_factor": 5.0,
    "fault__spike_window": 3,
}
TROUBLE = {5 * BATCH: "loss nan", 6 * BATCH + 3: "gradient nan"}
"""Batches 5 and 6 fail, so steps 6 and 7 are skipped: back to step 4, and batches 4 to 6 are never seen again."""


class Batches(Callback):
    """Which step trained on which global batch, as counted from 0: the last time that it was done."""

    def __init__(self) -> None:
        self.of: dict[int, int] = {}

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        self.of[run.step - 1] = run.skipped_data.batch_of(run.step - 1)


def run_with(
    world: TinyWorld, folder: Path, monkeypatch: pytest.MonkeyPatch, *callbacks: Callback, **more: Any
) -> None:
    with monkeypatch.context() as patch:
        for callback in callbacks:
            patch.setattr(setup, "build_callbacks", add_callback(callback, setup.build_callbacks))
        train(world.config(folder, **SETTINGS | more))


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenerationStage, "loss", faulty_loss(TROUBLE))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...]]]:
    """(key of the noise, positions of the samples) of each micro-batch that was trained on."""
    prepare, seen = GenerationStage.prepare, []

    def recorded(self: Any, batch: Any, step: int) -> Any:
        seen.append((step, tuple(batch.sample_index.tolist())))
        return prepare(self, batch, step)

    monkeypatch.setattr(GenerationStage, "prepare", recorded)
    return seen


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that two runs must have in common to be the same."""
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    state = read_state(checkpoint)
    weights = {kind: read_weights(checkpoint, kind=kind) for kind in ("weight", "ema")}
    return {
        "curve": curve(read_metrics(run_dir)),
        "skipped.jsonl": (run_dir / "skipped.jsonl").read_text(),
        "skipped_data.json": (run_dir / "skipped_data.json").read_text(),
        "state": {name: state[name] for name in ("step", "batch", "skipped", "rollbacks", "spikes", "optimizer_step")},
        "checkpoints": sorted(path.name for path in (run_dir / "checkpoints").iterdir()),
        "weights": weights,
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    weights, expected = ours.pop("weights"), theirs["weights"]
    assert ours == {name: value for name, value in theirs.items() if name != "weights"}
    for kind, tensors in weights.items():
        assert all(torch.equal(tensor, expected[kind][name]) for name, tensor in tensors.items())


@pytest.mark.usefixtures("trouble")
def test_back_to_the_checkpoint_before_and_on_with_later_data(
    world: TinyWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: list[tuple[int, tuple[int, ...]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    batches = Batches()
    run_with(world, tmp_path, monkeypatch, batches)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 10))
    assert batches.of == {0: 0, 1: 1, 2: 2, 3: 3, 4: 7, 5: 8, 6: 9, 7: 10, 8: 11}
    # Data and noise are those of the batch, whichever step has it.
    assert [key for key, _ in seen] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert all(positions == tuple(range(BATCH * key, BATCH * key + BATCH)) for key, positions in seen)
    assert json.loads((tmp_path / "skipped_data.json").read_text()) == {
        "rollbacks": [{"from_step": 7, "to_step": 4, "first_batch": 4, "end_batch": 7}]
    }
    # What led to it stays on record.
    entries = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["batch"]) for entry in entries] == [(6, 5), (7, 6)]
    assert all(entry["sample_ids"] for entry in entries)
    assert any("steps 6 to 7 were skipped" in record.message for record in caplog.records)
    checkpoints = {path.name: read_state(path) for path in (tmp_path / "checkpoints").glob("step-*")}
    assert sorted(checkpoints) == [f"step-0000000{step}" for step in (2, 4, 6, 8, 9)]
    assert {name: state["rollbacks"] for name, state in checkpoints.items()} == {
        f"step-0000000{step}": int(step > 4) for step in (2, 4, 6, 8, 9)
    }
    assert checkpoints["step-00000009"]["batch"] == 12 and checkpoints["step-00000009"]["skipped"] == 0


class DieAfter(Callback):
    """Dies when `step` steps are done for the `time`-th time."""

    main_only = False

    def __init__(self, step: int, time: int = 1) -> None:
        self.step, self.left = step, time

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        if run.step == self.step:
            self.left -= 1
            if not self.left:
                raise Dies


@pytest.mark.usefixtures("trouble")
@pytest.mark.parametrize(
    "death",
    [
        pytest.param("intact_checkpoint", marks=pytest.mark.long),
        pytest.param("drop_abandoned", marks=pytest.mark.long),
        pytest.param("remove_checkpoint", marks=pytest.mark.long),
        pytest.param("load_checkpoint", marks=pytest.mark.long),
        pytest.param("reopen_batches", marks=pytest.mark.long),
        pytest.param("streak", marks=pytest.mark.long),
        pytest.param("signal", marks=pytest.mark.long),
        "later",
    ],
)
def test_a_run_that_dies_anywhere_around_a_rollback_ends_the_same(
    death: str, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(world, tmp_path / "straight", monkeypatch)
    run_dir = tmp_path / "killed"

    def dies(*args: Any, **kwargs: Any) -> None:
        raise Dies

    def dies_half_way(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        raise Dies

    if death == "signal":  # between the two steps that are skipped: the count goes on after the resume
        run_with(world, run_dir, monkeypatch, SignalAt(6))
        assert not (run_dir / "skipped_data.json").exists()
        assert read_state(latest_checkpoint(run_dir))["spikes"]["skips_in_row"] == 1
    else:
        with monkeypatch.context() as patch, pytest.raises(Dies):
            callbacks = []
            if death == "streak":
                callbacks = [DieAfter(6)]
            elif death == "later":  # in step 6 again, after the rollback
                callbacks = [DieAfter(6, 2)]
            elif death == "remove_checkpoint":
                patch.setattr(skipped_data, death, dies_half_way)
            else:
                patch.setattr(rollback, death, dies)
            run_with(world, run_dir, monkeypatch, *callbacks)
    run_with(world, run_dir, monkeypatch)
    assert_same(outcome(run_dir), outcome(tmp_path / "straight"))


@pytest.mark.usefixtures("trouble")
def test_what_was_given_up_is_not_come_back_to(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before it is removed, and then the checkpoint that the rollback went to is damaged."""
    run_with(world, tmp_path / "straight", monkeypatch)
    run_dir = tmp_path / "killed"

    def dies(*args: Any) -> None:
        raise Dies

    with monkeypatch.context() as patch, pytest.raises(Dies):
        patch.setattr(rollback, "drop_abandoned", dies)
        run_with(world, run_dir, monkeypatch)
    assert (run_dir / "checkpoints" / "step-00000006").is_dir()
    (run_dir / "checkpoints" / "step-00000004" / "index.json").unlink()
    run_with(world, run_dir, monkeypatch)
    ours, theirs = outcome(run_dir), outcome(tmp_path / "straight")
    assert "damaged-step-00000004" in ours["checkpoints"]
    assert_same(ours | {"checkpoints": theirs["checkpoints"]}, theirs)


def test_trouble_that_goes_on_leads_further_back_and_ends_the_run(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GenerationStage, "loss", faulty_loss({BATCH * batch: "loss nan" for batch in range(5, 30)}))
    with pytest.raises(ValueError, match=r"rolled back 2 time\(s\) already and fault.max_rollbacks=2"):
        run_with(world, tmp_path, monkeypatch, fault__max_rollbacks=2)
    rollbacks = json.loads((tmp_path / "skipped_data.json").read_text())["rollbacks"]
    assert [(entry["from_step"], entry["to_step"]) for entry in rollbacks] == [(7, 4), (6, 2)]
    assert [(entry["first_batch"], entry["end_batch"]) for entry in rollbacks] == [(4, 7), (2, 9)]
    # A restart fails likewise, at once.
    with pytest.raises(ValueError, match=r"rolled back 2 time\(s\) already"):
        run_with(world, tmp_path, monkeypatch, fault__max_rollbacks=2)


@pytest.mark.usefixtures("trouble")
def test_without_an_older_checkpoint_the_run_fails_and_says_what_to_do(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"(?s)steps 6 to 7 were skipped.*run.save_every=0"):
        run_with(world, tmp_path, monkeypatch, run__save_every=0)
    assert not (tmp_path / "skipped_data.json").exists()


@pytest.mark.usefixtures("trouble")
def test_the_checkpoint_of_the_last_kept_step_is_better_than_none(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(world, tmp_path, monkeypatch, run__save_every=5)
    (entry,) = json.loads((tmp_path / "skipped_data.json").read_text())["rollbacks"]
    assert (entry["to_step"], entry["first_batch"], entry["end_batch"]) == (5, 5, 7)


@pytest.mark.usefixtures("trouble")
def test_without_a_limit_nothing_is_rolled_back(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(world, tmp_path, monkeypatch, fault__max_skips_in_row=0)
    assert [line["skipped"] for line in read_metrics(tmp_path)] == [0, 0, 0, 0, 0, 1, 2, 2, 2]
    assert not (tmp_path / "skipped_data.json").exists()


def test_the_batch_of_a_step_follows_from_what_is_left_out() -> None:
    skipped = SkippedData([Rollback(7, 4, 4, 7), Rollback(9, 6, 8, 12)])
    assert skipped.ranges == [(4, 7), (8, 12)]
    batches = [skipped.batch_of(step) for step in range(8)]
    assert batches == [0, 1, 2, 3, 7, 12, 13, 14]
    assert batches == [batch for batch in range(15) if not skipped.leaves_out(batch)]
    # A later rollback that goes further back swallows the earlier one's range.
    skipped.rollbacks.append(Rollback(8, 2, 2, 15))
    assert skipped.ranges == [(2, 15)] and [skipped.batch_of(step) for step in range(4)] == [0, 1, 15, 16]


def test_checkpoints_of_a_branch_that_was_given_up_are_known() -> None:
    skipped = SkippedData([Rollback(7, 4, 4, 7), Rollback(9, 6, 8, 12)])
    assert skipped.abandons(5, 0) and not skipped.abandons(4, 0)
    assert skipped.abandons(7, 1) and not skipped.abandons(6, 1)
    assert not skipped.abandons(7, 2)


@pytest.mark.usefixtures("trouble")
def test_without_the_list_no_later_checkpoint_is_continued(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(world, tmp_path, monkeypatch)
    (tmp_path / "skipped_data.json").unlink()
    with pytest.raises(ValueError, match=r"made after 1 rollback\(s\), but skipped_data.json in .* lists 0"):
        run_with(world, tmp_path, monkeypatch)


def test_a_damaged_list_is_no_list(world: TinyWorld, tmp_path: Path) -> None:
    for content in ("{", "{}", '{"rollbacks": [{"from_step": 1}]}'):
        (tmp_path / "skipped_data.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"skipped_data.json.* damaged"):
            train(world.config(tmp_path, **SETTINGS))
