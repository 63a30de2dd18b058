"""The checkpoint benchmark in one process: what it measures, what it leaves, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rae_scale.bench import checkpoint
from rae_scale.bench.checkpoint import CHECKPOINT, Clock, bench_checkpoint, filesystem, write_plain
from rae_scale.bench.record_report import to_markdown
from rae_scale.bench.session import Session
from rae_scale.bench.setup import Step, StepSetup
from rae_scale.state.format import rank_file

ALONE = Session(torch.device("cpu"), 1)
SETUP = StepSetup("dit-tiny", 1)


def test_every_operation_is_timed_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("stays")
    points = [("run.save_buffer_gb=0",), ("run.save_buffer_gb=1",)]
    record = bench_checkpoint(SETUP, ALONE, points, folder=tmp_path, files=2, repeats=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    for row in record.rows:
        assert set(row.measures) == {"save", "plain", "stall", "saved", "verify", "load", "reshard"}
        assert all(measure.repeats == 2 for measure in row.measures.values())
        assert row.measures["stall"].median <= row.measures["saved"].median
        rate = row.values["gigabytes"] / row.measures["save"].median
        assert row.values["save_gb_s"] == pytest.approx(rate)
        assert row.settings["files"] == 2 and row.settings["filesystem"] == filesystem(tmp_path)
    text = to_markdown(CHECKPOINT, record)
    assert "plain write GB/s" in text and "| save_buffer_gb 0 |" in text


def test_weights_moments_and_average_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four float32 numbers per parameter with a moving average, three without; and the moments are a step's."""
    sizes = []

    def look(step: Step, clock: Clock, path: Path, resharded: Path, files: int) -> None:
        stored = load_file(path / rank_file(0))
        assert any(tensor.any() for name, tensor in stored.items() if "exp_avg" in name)
        real(step, clock, path, resharded, files)

    real = checkpoint.time_reading
    monkeypatch.setattr(checkpoint, "time_reading", look)
    for override in ("optim.ema_decay=0.9", "optim.ema_decay=null"):
        setup = SETUP.with_overrides([override])
        row = bench_checkpoint(setup, ALONE, folder=tmp_path, files=1, repeats=1).rows[0]
        sizes.append(row.values["gigabytes"])
    assert sizes[0] / sizes[1] == pytest.approx(4 / 3, rel=0.02)


def test_plain_files_have_the_size_and_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(checkpoint.os, "fsync", lambda descriptor: synced.append(descriptor))
    monkeypatch.setattr(checkpoint, "CHUNK", 1000)
    for size in (0, 999, 1000, 2500):
        write_plain(tmp_path / "plain", size)
        assert (tmp_path / "plain").stat().st_size == size
    assert len(synced) == 8  # each file, and the folder's list of names


def test_the_file_system_is_that_of_the_innermost_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n/dev/b {tmp_path}-other xfs rw 0 0\n")
    monkeypatch.setattr(checkpoint, "MOUNTS", mounts)
    assert filesystem(tmp_path) == "nfs4" and filesystem(Path("/")) == "ext4"
    monkeypatch.setattr(checkpoint, "MOUNTS", tmp_path / "none")
    assert filesystem(tmp_path) is None


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--folder=.*missing is no folder"):
        bench_checkpoint(SETUP, ALONE, folder=tmp_path / "missing")
