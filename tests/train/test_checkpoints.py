"""Checkpoints of a training: written beside it, kept as asked for, and passed over when damaged."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import TinyWorld, read_metrics

from rae_scale.config import ConfigError
from rae_scale.state import CheckpointError, Saver, latest_checkpoint, read_weights
from rae_scale.state import recover as recover_module
from rae_scale.state import save as save_module
from rae_scale.state.format import damaged_files
from rae_scale.train import setup, train
from rae_scale.train.callbacks.base import Callback
from rae_scale.train.loop import Run

SETTINGS: dict[str, Any] = {"run__max_steps": 4, "run__save_every": 1, "run__keep_last": 9, "optim__ema_decay": 0.9}


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


def step_names(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


def assert_same_weights(first: Path, second: Path) -> None:
    for kind in ("weight", "ema"):
        ours, theirs = (read_weights(latest_checkpoint(path), kind=kind) for path in (first, second))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir)]


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_how_checkpoints_are_written_changes_nothing_else(world: TinyWorld, tmp_path: Path) -> None:
    for name, buffer in (("beside", 1.0), ("full", 1e-5), ("within", 0.0)):
        train(world.config(tmp_path / name, run__save_buffer_gb=buffer, **SETTINGS))
        assert checkpoints(tmp_path / name) == step_names(1, 2, 3, 4)
        assert losses(tmp_path / name) == losses(tmp_path / "beside")
        assert_same_weights(tmp_path / name, tmp_path / "beside")
    assert [thread for thread in threading.enumerate() if thread.name.startswith("save-")] == []


def test_a_buffer_below_nothing_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"save_buffer_gb"):
        world.config(tmp_path, run__save_buffer_gb=-1.0)


def test_training_goes_on_while_a_checkpoint_is_written(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, on_step_2 = save_module.write_rank, threading.Event()

    def held_back(*args: Any) -> Any:
        assert on_step_2.wait(20), "step 2 waits for the checkpoint of step 1"
        return write(*args)

    class Watch(Callback):
        main_only = False

        def on_step_end(self, run: Run, metrics: dict[str, Any]) -> None:
            if run.step == 2:
                on_step_2.set()

    build = setup.build_callbacks
    monkeypatch.setattr(save_module, "write_rank", held_back)
    monkeypatch.setattr(setup, "build_callbacks", lambda *args: [Watch(), *build(*args)])
    train(world.config(tmp_path, **SETTINGS))
    assert checkpoints(tmp_path) == step_names(1, 2, 3, 4)


def test_last_ones_and_multiples_stay(world: TinyWorld, tmp_path: Path) -> None:
    train(world.config(tmp_path, **SETTINGS | {"run__max_steps": 5, "run__keep_last": 1, "run__keep_every": 2}))
    assert checkpoints(tmp_path) == step_names(2, 4, 5)


class Dies(Exception):
    pass


class DieAt(Callback):
    main_only = False

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Run, metrics: dict[str, Any]) -> None:
        if run.step == self.step:
            raise Dies


def test_an_error_in_training_does_not_lose_the_checkpoint_in_flight(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, publish, died = setup.build_callbacks, save_module.publish, threading.Event()

    def late(*args: Any) -> None:
        died.wait(0.5)  # the error comes first
        publish(*args)

    monkeypatch.setattr(save_module, "publish", late)
    monkeypatch.setattr(setup, "build_callbacks", lambda *args: [*build(*args), DieAt(1)])
    with pytest.raises(Dies):
        train(world.config(tmp_path, **SETTINGS))
    assert checkpoints(tmp_path) == step_names(1)
    assert damaged_files(latest_checkpoint(tmp_path)) == []


def test_a_checkpoint_that_cannot_be_written_ends_the_training_at_the_next(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rae_scale.state.tensorfile.sync", full)
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved in .*No space left on device"):
        train(world.config(tmp_path, **SETTINGS | {"run__save_every": 2, "fault__on_save_failure": "stop"}))
    assert len(losses(tmp_path)) == 4
    with pytest.raises(CheckpointError, match=r"step 1 could not be saved"):
        train(world.config(tmp_path / "last", **SETTINGS | {"run__max_steps": 1}))


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(world.config(tmp_path / "straight", **SETTINGS))
    run_dir = tmp_path / "damaged"
    train(world.config(run_dir, **SETTINGS))
    flip_last_byte(run_dir / "checkpoints" / "step-00000004" / "rank-00000.safetensors")
    hashed = []
    original = recover_module.damaged_files
    monkeypatch.setattr(
        recover_module, "damaged_files", lambda folder, *share: hashed.append(folder.name) or original(folder, *share)
    )
    monkeypatch.setattr("rae_scale.state.load.damaged_files", None)  # once is enough
    train(world.config(run_dir, **SETTINGS))
    assert hashed == step_names(4, 3)
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "step-00000004/rank-00000.safetensors is damaged" in warning
    assert checkpoints(run_dir) == ["damaged-step-00000004", *step_names(1, 2, 3, 4)]
    assert losses(run_dir) == losses(tmp_path / "straight")
    monkeypatch.undo()
    assert_same_weights(run_dir, tmp_path / "straight")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(world: TinyWorld, tmp_path: Path) -> None:
    train(world.config(tmp_path, **SETTINGS | {"run__max_steps": 2}))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step-0000000{step}" / "index.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* can be continued.*step-00000001"):
            train(world.config(tmp_path, **SETTINGS))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_other_settings_are_no_damage(world: TinyWorld, tmp_path: Path) -> None:
    train(world.config(tmp_path, **SETTINGS | {"run__max_steps": 2}))
    with pytest.raises(ValueError, match=r"data.global_batch_size was 8, is 4"):
        train(world.config(tmp_path, data__global_batch_size=4, **SETTINGS))
    assert checkpoints(tmp_path) == step_names(1, 2)


def test_the_buffer_setting_reaches_the_saver(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    init = Saver.__init__

    def spy(self: Saver, mesh: Any, buffer_gb: float) -> None:
        given.append(buffer_gb)
        init(self, mesh, buffer_gb)

    monkeypatch.setattr(Saver, "__init__", spy)
    train(world.config(tmp_path, run__max_steps=1, run__save_buffer_gb=2.5))
    assert given == [2.5]
