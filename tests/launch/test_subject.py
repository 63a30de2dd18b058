"""What is launched, and fitting its layout to the processes that there are."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_scale.launch.subject import OTHER_COMMANDS, check_size, fit, read_subject
from tests.launch.conftest import Write


def test_a_training_has_its_folder_and_grace(run_file: Write, tmp_path: Path) -> None:
    subject = read_subject(["train", str(run_file()), "fault.save_timeout_s=100", "fault.stop_grace_s=20"])
    assert subject.folder == tmp_path / "run"
    assert subject.grace_s == 180


def test_other_commands_have_none() -> None:
    assert read_subject(["data", "shapes"]).folder == OTHER_COMMANDS


@pytest.mark.parametrize(
    ("command", "message"),
    [([], "nothing to launch"), (["launch", "train"], "launch itself"), (["train", "--dry-run"], "needs a run file")],
)
def test_no_command(command: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_subject(command)


@pytest.mark.parametrize(("processes", "dp_shard"), [(1, 1), (2, 2), (8, 8)])
def test_fit_changes_dp_shard_alone(run_file: Write, processes: int, dp_shard: int) -> None:
    subject = fit(read_subject(["train", str(run_file(dp_shard=4)), "run.seed=3"]), processes)
    config = subject.config
    assert config is not None
    assert config.parallel.world_size == processes
    assert config.parallel.dp_shard == dp_shard
    assert config.data.global_batch_size == 8
    assert config.run.seed == 3
    check_size(subject, processes)


def test_fit_keeps_the_other_axes(run_file: Write) -> None:
    subject = fit(read_subject(["train", str(run_file(dp_shard=1, dp_replicate=2))]), 8)
    assert subject.config is not None
    assert (subject.config.parallel.dp_replicate, subject.config.parallel.dp_shard) == (2, 4)


def test_fit_refuses_what_does_not_divide(run_file: Write) -> None:
    subject = read_subject(["train", str(run_file(dp_shard=1, dp_replicate=2))])
    with pytest.raises(ValueError, match=r"3 processes do not divide by the 2 of parallel\.dp_replicate=2.*use 2 proc"):
        fit(subject, 3)
    with pytest.raises(ValueError, match="use 2 or a multiple"):
        fit(subject, 1)


def test_fit_never_changes_the_batch(run_file: Write) -> None:
    with pytest.raises(ValueError, match=r"3 processes cannot keep data.global_batch_size=8.*multiple of 3"):
        fit(read_subject(["train", str(run_file())]), 3)


def test_fit_needs_a_training() -> None:
    with pytest.raises(ValueError, match="leave --fit out"):
        fit(read_subject(["data", "shapes"]), 2)


def test_the_layout_has_the_processes(run_file: Write) -> None:
    with pytest.raises(ValueError, match=r"4 process.*= 2; add --fit"):
        check_size(read_subject(["train", str(run_file(dp_shard=2))]), 4)
