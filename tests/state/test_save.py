"""A save that is interrupted anywhere leaves what was there, and a pointer to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from toy_model import train_step

from rae_scale.engines import Engine
from rae_scale.parallel import Mesh
from rae_scale.state import CheckpointError, latest_checkpoint, load_checkpoint, read_state, save_checkpoint
from rae_scale.state import save as save_module
from rae_scale.state.format import damaged_files


class Killed(BaseException):
    """Nothing catches it: the process ends here."""


@pytest.fixture
def saved(engine: Engine, mesh: Mesh, tmp_path: Path) -> Path:
    """A complete checkpoint of step 2; the engine has gone one step further."""
    path = save_checkpoint(tmp_path, 2, engine, mesh, {"seed": 3, "config": {"run": {"seed": 3}}}, keep_last=2)
    train_step(engine, 2, 0, 1, 1)
    return path


def names(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def test_a_checkpoint_is_what_the_format_says(saved: Path, tmp_path: Path) -> None:
    assert saved == tmp_path / "checkpoints" / "step-00000002"
    assert {path.name for path in saved.iterdir()} == {
        "rank-00000.safetensors",
        "index.json",
        "state.json",
        "manifest.json",
    }
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000002"
    assert damaged_files(saved) == []
    index = json.loads((saved / "index.json").read_text())["tensors"]
    assert index["conditioner.queries"]["shape"] == [6, 12]
    assert index["conditioner.queries"]["pieces"]["ema"] == [[[0, 0], [6, 12], "rank-00000.safetensors"]]
    assert set(index["conditioner.projector.bias"]["pieces"]) == {"weight"}
    with safe_open(saved / "rank-00000.safetensors", framework="pt") as file:
        assert file.get_slice("exp_avg/conditioner.queries/0,0").get_shape() == [6, 12]
    state = read_state(saved)
    assert (state["step"], state["optimizer_step"], state["seed"]) == (2, 2, 3)
    assert state["layout"] == {"dp_replicate": 1, "dp_shard": 1, "sp": 1, "tp": 1}
    assert state["versions"]["torch"] == torch.__version__


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert latest_checkpoint(tmp_path) is None


STAGES = ["make_temporary", "write_rank", "write_tensors", "describe", "write_json", "publish", "prune"]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_a_stage(
    stage: str, saved: Path, engine: Engine, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object, **kwargs: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(save_module, stage, killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 3, engine, mesh, {}, keep_last=1)
    check_survival(engine, mesh, tmp_path, expected=3 if stage == "prune" else 2)


def check_survival(engine: Engine, mesh: Mesh, run_dir: Path, expected: int) -> None:
    """The newest complete checkpoint is whole and found, and the next save clears up and succeeds."""
    latest = latest_checkpoint(run_dir)
    assert latest is not None
    assert damaged_files(latest) == []
    assert read_state(latest)["step"] == expected
    path = save_checkpoint(run_dir, 3, engine, mesh, {}, keep_last=1)
    assert latest_checkpoint(run_dir) == path
    assert names(run_dir) == {"latest", "step-00000003"}
    assert damaged_files(path) == []


@pytest.mark.parametrize("operation", ["rename", "replace"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [2, 3])
def test_killed_around_a_rename(
    operation: str,
    when: str,
    step: int,
    saved: Path,
    engine: Engine,
    mesh: Mesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when a checkpoint of the same step is being replaced."""
    original = getattr(os, operation)

    def killed(source: Path, target: Path) -> None:
        if when == "after":
            original(source, target)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, step, engine, mesh, {}, keep_last=1)
    latest = latest_checkpoint(tmp_path)
    assert latest is not None
    assert damaged_files(latest) == []
    check_survival(engine, mesh, tmp_path, expected=read_state(latest)["step"])


def test_killed_between_taking_the_old_one_away_and_naming_the_new_one(
    saved: Path, engine: Engine, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    calls = []

    def second_is_killed(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_is_killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 2, engine, mesh, {}, keep_last=1)
    assert not saved.exists()
    check_survival(engine, mesh, tmp_path, expected=2)


def test_a_full_disk_is_reported_and_leaves_nothing_behind(
    saved: Path, engine: Engine, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rae_scale.state.tensorfile.sync", full)
        with pytest.raises(CheckpointError, match=r"step 3 could not be saved in .*No space left on device"):
            save_checkpoint(tmp_path, 3, engine, mesh, {}, keep_last=2)
    assert names(tmp_path) == {"latest", "step-00000002"}
    assert latest_checkpoint(tmp_path) == saved


def test_a_folder_that_other_nodes_cannot_see_is_reported(
    saved: Path, engine: Engine, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_module, "make_temporary", lambda temporary: None)
    with pytest.raises(CheckpointError, match=r"put run.dir on a file system that all nodes share"):
        save_checkpoint(tmp_path, 3, engine, mesh, {}, keep_last=2)


def test_only_the_last_ones_stay(engine: Engine, mesh: Mesh, tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save_checkpoint(tmp_path, step, engine, mesh, {}, keep_last=2)
    assert names(tmp_path) == {"latest", "step-00000010", "step-00000011"}


def test_half_of_a_removed_checkpoint_is_none(
    saved: Path, engine: Engine, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 3, engine, mesh, {}, keep_last=1)
    assert not (saved / "manifest.json").exists()
    check_survival(engine, mesh, tmp_path, expected=3)


def test_multiples_of_a_step_stay_for_ever_beside_the_last_ones(engine: Engine, mesh: Mesh, tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 23, 24):
        save_checkpoint(tmp_path, step, engine, mesh, {}, keep_last=2, keep_every=10)
    assert names(tmp_path) == {"latest", *(f"step-000000{step}" for step in (10, 20, 23, 24))}
    # A multiple counts as one of the last while it is.
    save_checkpoint(tmp_path, 30, engine, mesh, {}, keep_last=2, keep_every=10)
    assert names(tmp_path) == {"latest", *(f"step-000000{step}" for step in (10, 20, 24, 30))}
    save_checkpoint(tmp_path, 31, engine, mesh, {}, keep_last=1)
    assert names(tmp_path) == {"latest", "step-00000031"}, "0 keeps none"


def test_steps_are_numbers_and_other_names_are_not_touched(engine: Engine, mesh: Mesh, tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path, 99_999_999, engine, mesh, {}, keep_last=1)
    for name in ("step-00000007-copy", "damaged-step-00000008", "step-8"):
        shutil.copytree(saved, saved.with_name(name))
    newest = save_checkpoint(tmp_path, 100_000_000, engine, mesh, {}, keep_last=2)
    save_checkpoint(tmp_path, 7, engine, mesh, {}, keep_last=2)
    assert names(tmp_path) == {
        "latest",
        "step-00000007",
        newest.name,
        "step-00000007-copy",
        "damaged-step-00000008",
        "step-8",
    }
    (tmp_path / "checkpoints" / "latest").unlink()
    assert latest_checkpoint(tmp_path) == newest


def test_what_was_just_written_stays_whatever_else_there_is(engine: Engine, mesh: Mesh, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 50, engine, mesh, {}, keep_last=1)
    path = save_checkpoint(tmp_path, 4, engine, mesh, {}, keep_last=1)
    assert names(tmp_path) == {"latest", "step-00000004"}
    assert latest_checkpoint(tmp_path) == path


def test_saving_a_step_again_replaces_it(
    saved: Path, engine: Engine, build: Callable[..., Engine], mesh: Mesh, tmp_path: Path
) -> None:
    assert save_checkpoint(tmp_path, 2, engine, mesh, {"again": True}, keep_last=2) == saved
    assert names(tmp_path) == {"latest", "step-00000002"}
    loaded = build()
    assert load_checkpoint(saved, loaded, mesh)["again"]
    assert loaded.optimizer_step == 3


def test_a_checkpoint_without_its_manifest_does_not_count(saved: Path, tmp_path: Path) -> None:
    newer = shutil.copytree(saved, saved.with_name("step-00000009"))
    (tmp_path / "checkpoints" / "latest").unlink()
    assert latest_checkpoint(tmp_path) == newer
    (newer / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) == saved
