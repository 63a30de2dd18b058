"""When a run is started again: while it gets on, and a bounded number of times when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rae_scale.launch.requeue import REQUEUE, Ended, Restarts, Verdict, after, read_end
from tests.launch.conftest import write_status


def test_how_it_ended(tmp_path: Path) -> None:
    assert read_end(tmp_path) == Ended("", 0)
    write_status(tmp_path, "failed", 5, attempt=2, reason="rank 1: out of memory")
    assert str(read_end(tmp_path)) == "failed at step 5 of 9: rank 1: out of memory"
    write_status(tmp_path, "running", 5)
    assert str(read_end(tmp_path)) == "killed at step 5 of 9"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "running"}', '{"state": 1, "step": null}'])
def test_what_is_no_status_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert read_end(tmp_path).state == ""


def test_failures_are_counted_while_it_gets_no_further(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path, 2)
    assert restarts.judge(Ended("failed", 5)) is Verdict.RESTART
    assert restarts.judge(Ended("running", 5)) is Verdict.RESTART
    assert restarts.judge(Ended("failed", 6)) is Verdict.RESTART  # Further: counted from one again.
    assert restarts.judge(Ended("failed", 6)) is Verdict.RESTART
    # In a later job, too.
    assert Restarts(tmp_path, 2).judge(Ended("", 0)) is Verdict.GIVE_UP


def test_a_stop_or_an_end_is_no_failure(tmp_path: Path) -> None:
    restarts = Restarts(tmp_path, 1)
    restarts.judge(Ended("failed", 0))
    assert restarts.judge(Ended("requeue", 3)) is Verdict.REQUEUE
    assert restarts.judge(Ended("failed", 3)) is Verdict.RESTART
    assert restarts.judge(Ended("finished", 9)) is Verdict.FINISHED
    assert json.loads((tmp_path / "restarts.json").read_text()) == {"step": 9, "failures": 0}


def test_one_launch_of_several_keeps_the_count(tmp_path: Path) -> None:
    follower = Restarts(tmp_path, 1, keeps_count=False)
    assert follower.judge(Ended("failed", 0)) is Verdict.RESTART
    assert follower.judge(Ended("failed", 0)) is Verdict.GIVE_UP
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("status", "state", "expected"),
    [
        (0, "finished", 0),
        (REQUEUE, "requeue", REQUEUE),
        (1, "failed", REQUEUE),
        (137, "running", REQUEUE),
        # It died before it could say so itself: what stands there is an earlier job's.
        (1, "requeue", REQUEUE),
    ],
)
def test_what_a_batch_job_does_then(tmp_path: Path, status: int, state: str, expected: int) -> None:
    write_status(tmp_path, state, 5)
    assert after(status, tmp_path, 1) == expected


@pytest.mark.parametrize("state", ["failed", "running", "requeue", "finished"])
def test_a_batch_job_that_gets_no_further_ends(tmp_path: Path, state: str) -> None:
    write_status(tmp_path, state, 5)
    assert [after(3, tmp_path, 2) for _ in range(4)] == [REQUEUE, REQUEUE, 3, 3]
