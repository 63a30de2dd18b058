"""A rank that is stuck takes the run down in time, with everybody's stacks and the culprit's name, and it restarts."""

from __future__ import annotations

import json
import pickle
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import end, free_port, run_ranks, start_rank
from tiny_world import TinyWorld, read_metrics, train_rank

from rae_scale.state import latest_checkpoint, read_weights
from rae_scale.train.watch.watchdog import STALLED

from .stuck import alone, in_training

TIME_OUT, MARGIN = 2.0, 10.0
STEPS = 4
SETTINGS = {
    "run__max_steps": STEPS,
    "run__save_every": 1,
    "engine__name": "fsdp2",
    "parallel__dp_shard": 2,
    "fault__train_timeout_s": TIME_OUT,
    "fault__heartbeat_s": 0.5,
}


def run_to_the_end(
    function: Callable[..., None], world_size: int, folder: Path, *args: Any, but: int = 0
) -> tuple[list[int | None], float]:
    """The exit statuses of `function`'s ranks, None of those that still run when all `but` so many have ended, and how
    long after the moment at which one got stuck that was."""
    folder.mkdir()
    (folder / "args.pickle").write_bytes(pickle.dumps(args))
    port = free_port()
    ranks = [start_rank(function, rank, world_size, port, folder, 300) for rank in range(world_size)]
    try:
        left = wait(ranks, but, deadline=time.monotonic() + 150)
        ended = time.time()
    finally:
        for rank in ranks:
            end(rank)
    since = float((Path(args[0]["run"]["dir"]) / "stuck-since").read_text())
    return left, ended - since


def wait(ranks: list[subprocess.Popen[bytes]], but: int, deadline: float) -> list[int | None]:
    while sum(rank.poll() is None for rank in ranks) > but:
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.05)
    return [rank.poll() for rank in ranks]


def read_stacks(run: Path) -> list[str]:
    return [path.read_text() for path in sorted((run / "stalls" / "1").iterdir())]


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())  # type: ignore[no-any-return]


def test_one_process_without_progress_ends_in_time_and_says_where_it_was(world: TinyWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = world.tree(run, fault__train_timeout_s=0.5, fault__heartbeat_s=0.2)
    statuses, seconds = run_to_the_end(alone, 1, tmp_path / "ranks", tree, "sleep_for_ever")
    assert statuses == [STALLED]
    assert 0.25 <= seconds < 0.5 + MARGIN  # `seconds` begins a moment after the step does
    (stacks,) = read_stacks(run)
    assert "Thread MainThread" in stacks and "in sleep_for_ever" in stacks and "step 3, step for" in stacks
    left = status(run)
    assert (left["state"], left["step"]) == ("failed", 2)
    assert left["reason"].startswith("stalled in phase step: ")
    assert "no progress for" in (run / "logs" / "1" / "rank-00000.log").read_text()


@pytest.mark.long
def test_a_process_that_holds_the_global_lock_ends_in_time_too(world: TinyWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = world.tree(run, fault__train_timeout_s=TIME_OUT, fault__heartbeat_s=0.2)
    statuses, seconds = run_to_the_end(alone, 1, tmp_path / "ranks", tree, "sleep_with_the_global_lock")
    assert statuses == [1]  # the interpreter's timer knows no other
    assert TIME_OUT <= seconds < TIME_OUT + MARGIN
    assert "in sleep_with_the_global_lock" in (run / "logs" / "1" / "rank-00000.log").read_text()


@pytest.mark.long
@pytest.mark.dist
def test_one_rank_asleep_for_ever_ends_all_with_their_stacks_and_the_restart_is_bitwise(
    world: TinyWorld, tmp_path: Path
) -> None:
    run, straight = tmp_path / "run", tmp_path / "straight"
    tree = world.tree(run, **SETTINGS)
    statuses, seconds = run_to_the_end(in_training, 2, tmp_path / "ranks", tree, "sleep_for_ever")
    assert statuses == [STALLED, STALLED]
    assert TIME_OUT <= seconds < TIME_OUT + MARGIN
    waiting, asleep = read_stacks(run)
    assert "torch/distributed" in waiting and "in sleep_for_ever" in asleep
    left = status(run)
    assert (left["state"], left["step"], left["attempt"]) == ("failed", 2, 1)
    assert "rank 1 on" in left["reason"] and "not where the others wait" in left["reason"]
    assert "rank 0 on" not in left["reason"]

    for number, settings in enumerate((tree, world.tree(straight, **SETTINGS))):
        (tmp_path / str(number)).mkdir()
        run_ranks(train_rank, 2, tmp_path / str(number), args=(settings,))
    assert (status(run)["state"], status(run)["attempt"]) == ("finished", 2)
    assert [line["loss"] for line in read_metrics(run)] == [line["loss"] for line in read_metrics(straight)]
    ours, theirs = (read_weights(latest_checkpoint(folder) or folder) for folder in (run, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.long
@pytest.mark.dist
def test_a_rank_without_a_heartbeat_is_named_by_the_others(world: TinyWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = world.tree(run, **SETTINGS)
    statuses, seconds = run_to_the_end(in_training, 2, tmp_path / "ranks", tree, "stop_the_process", but=1)
    assert statuses == [STALLED, None]  # whoever started it kills the one that is stopped
    assert TIME_OUT <= seconds < TIME_OUT + MARGIN
    assert len(read_stacks(run)) == 1
    reason = status(run)["reason"]
    assert "rank 1 on" in reason and "without a heartbeat" in reason
    assert "rank 0 on" not in reason  # it has waited for the stacks of rank 1, for longer than heartbeats count


@pytest.mark.long
@pytest.mark.dist
def test_the_error_of_one_rank_is_the_reason_and_not_what_the_others_make_of_it(
    world: TinyWorld, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    tree = world.tree(run, **SETTINGS)
    statuses, _ = run_to_the_end(in_training, 2, tmp_path / "ranks", tree, "raise_an_error")
    assert statuses == [1, 1]
    assert status(run)["reason"] == "rank 1: RuntimeError: only here"
    assert "RuntimeError: only here" in (run / "logs" / "1" / "rank-00001.log").read_text()
