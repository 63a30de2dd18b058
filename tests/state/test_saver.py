"""Saving while training goes on: what is written, what it costs, and how it fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from toy_model import train_step

from rae_scale.engines import Engine
from rae_scale.parallel import Mesh
from rae_scale.state import CheckpointError, Retention, Saver, latest_checkpoint, load_checkpoint, save_checkpoint
from rae_scale.state import save as save_module
from rae_scale.state import staging as staging_module
from rae_scale.state.format import damaged_files

KEEP = Retention(2)
PATIENCE = 10.0  # seconds


@pytest.fixture
def saver(mesh: Mesh) -> Saver:
    return Saver(mesh, buffer_gb=1.0)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread for thread in threading.enumerate() if thread.name.startswith("save-")] == []


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before the event is set."""
    event, write = threading.Event(), save_module.write_rank

    def wait_first(*args: object) -> object:
        assert event.wait(PATIENCE)
        return write(*args)

    monkeypatch.setattr(save_module, "write_rank", wait_first)
    return event


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rae_scale.state.tensorfile.sync", full)


def test_training_goes_on_while_the_state_of_before_is_written(
    saver: Saver,
    engine: Engine,
    build: Callable[..., Engine],
    mesh: Mesh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {(p.kind, p.name): p.tensor.clone() for p in engine.pieces()}
    go_on = held_back(monkeypatch)
    saver.save(tmp_path, 2, engine, {"seed": 3}, KEEP)
    for step in (2, 3):
        train_step(engine, step, 0, 1, 1)
    assert latest_checkpoint(tmp_path) is None
    go_on.set()
    saver.wait()
    loaded = build()
    state = load_checkpoint(latest_checkpoint(tmp_path), loaded, mesh)
    assert (state["step"], state["optimizer_step"], state["seed"]) == (2, 2, 3)
    assert all(torch.equal(p.tensor, before[p.kind, p.name]) for p in loaded.pieces())
    assert not torch.equal(engine.module.connector.weight, loaded.module.connector.weight)


@pytest.mark.parametrize("buffer_gb", [0.0, 1e-9, 9e-6, 1.0])
def test_the_buffer_changes_no_byte_of_a_checkpoint(
    buffer_gb: float, engine: Engine, mesh: Mesh, tmp_path: Path
) -> None:
    expected = save_checkpoint(tmp_path / "plain", 2, engine, mesh, {}, keep_last=1)
    saver = Saver(mesh, buffer_gb)
    saver.save(tmp_path / "other", 2, engine, {}, KEEP)
    saver.wait()
    found = tmp_path / "other" / "checkpoints" / "step-00000002"
    assert {f.name: f.read_bytes() for f in found.iterdir()} == {f.name: f.read_bytes() for f in expected.iterdir()}
    total = sum(piece.tensor.numel() * 4 for piece in engine.pieces())
    assert total > 3 * 9e-6 * 1e9, "several times the smaller buffers"
    if buffer_gb == 1.0:
        assert saver.staging.allocated_bytes >= total
    elif buffer_gb:
        assert 0 < saver.staging.allocated_bytes <= max(4096, buffer_gb * 1e9)


def test_without_a_buffer_the_checkpoint_is_there_on_return_and_nothing_is_staged(
    engine: Engine, mesh: Mesh, tmp_path: Path
) -> None:
    saver = Saver(mesh, 0)
    saver.save(tmp_path, 2, engine, {}, KEEP)
    assert damaged_files(latest_checkpoint(tmp_path)) == []
    assert saver.staging is None


def test_a_save_waits_for_the_one_before(
    saver: Saver, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = held_back(monkeypatch)
    saver.save(tmp_path, 2, engine, {}, KEEP)
    threading.Timer(0.3, go_on.set).start()
    saver.save(tmp_path, 3, engine, {}, KEEP)
    assert (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").exists()
    saver.wait()
    assert latest_checkpoint(tmp_path).name == "step-00000003"


def test_only_what_is_to_be_kept_stays(saver: Saver, engine: Engine, tmp_path: Path) -> None:
    for step in (2, 3, 4, 5):
        saver.save(tmp_path, step, engine, {}, Retention(last=1, every=2))
    saver.wait()
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step*"))] == [
        "step-00000002",
        "step-00000004",
        "step-00000005",
    ]


@pytest.mark.parametrize("then", ["save", "wait"])
def test_a_failed_save_is_logged_at_once_and_raised_at_the_next_use(
    then: str,
    saver: Saver,
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saver.save(tmp_path, 2, engine, {}, KEEP)
    saver.wait()
    with monkeypatch.context() as patch:
        full_disk(patch)
        saver.save(tmp_path, 3, engine, {}, KEEP)
        thread = saver._thread
        assert thread is not None
        thread.join(PATIENCE)
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "step 3 could not be saved" in warning and "No space left on device" in warning
    with pytest.raises(CheckpointError, match=r"step 3 could not be saved in .*No space left on device"):
        saver.wait() if then == "wait" else saver.save(tmp_path, 4, engine, {}, KEEP)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"latest", "step-00000002"}
    # Raised once; a caller that goes on can save again.
    saver.save(tmp_path, 5, engine, {}, KEEP)
    saver.wait()
    assert latest_checkpoint(tmp_path).name == "step-00000005"


def test_a_writer_that_fails_early_does_not_hold_training_up(
    mesh: Mesh, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffer is full by then, and nobody will empty it."""
    saver = Saver(mesh, 1e-9)

    def fails(temporary: Path) -> None:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(save_module, "make_temporary", fails)
    saver.save(tmp_path, 2, engine, {}, KEEP)
    with pytest.raises(CheckpointError, match="Permission denied"):
        saver.wait()


def test_a_defect_keeps_its_own_error(
    saver: Saver, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise MemoryError("out of it")

    monkeypatch.setattr(save_module, "write_rank", fails)
    saver.save(tmp_path, 2, engine, {}, KEEP)
    with pytest.raises(MemoryError, match="out of it"):
        saver.wait()


def test_a_copy_that_fails_ends_the_writer_and_leaves_nothing_behind(
    saver: Saver, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.save(tmp_path, 2, engine, {}, KEEP)
    saver.wait()
    copy, calls = staging_module.copy_to_host, []

    def fails(place: torch.Tensor, part: torch.Tensor) -> None:
        calls.append(part)
        if len(calls) == 5:
            raise RuntimeError("CUDA error")
        copy(place, part)

    with monkeypatch.context() as patch:
        patch.setattr(staging_module, "copy_to_host", fails)
        with pytest.raises(RuntimeError, match="CUDA error"):
            saver.save(tmp_path, 3, engine, {}, KEEP)
        saver.close()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"latest", "step-00000002"}
    with pytest.raises(CheckpointError, match=r"tensors could not be copied \(RuntimeError: CUDA error\)"):
        saver.wait()


def test_closing_finishes_the_save_in_flight_and_raises_nothing(
    saver: Saver, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = held_back(monkeypatch)
    saver.save(tmp_path, 2, engine, {}, KEEP)
    threading.Timer(0.2, go_on.set).start()
    saver.close()
    assert damaged_files(latest_checkpoint(tmp_path)) == []
    full_disk(monkeypatch)
    saver.save(tmp_path, 3, engine, {}, KEEP)
    saver.close()
    saver.close()
