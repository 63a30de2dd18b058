"""SIGKILL of the builder, or of its workers, at points spread over all that they do in the folder."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from rae_scale.data.build import BuildOptions, build
from rae_scale.data.prepare import PrepareOptions
from tests.data.build.conftest import KILLED, contents

OPTIONS = BuildOptions(shard_bytes=2**20, prepare=PrepareOptions(verify="header"))
FLAGS = ("--shard-megabytes", 1, "--verify", "header")
# How often a process opens, makes, renames or removes something in the folder before the index has its name (a worker:
# before it is done with two units).
POINTS = {"builder": 59, "worker": 28}


@pytest.fixture
def inputs(corpus, image) -> list[Path]:
    """Pictures of half a mebibyte, two to a shard."""
    return corpus(3, lambda seed: image(seed=seed) + bytes(500_000))


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.long)])
def test_a_killed_builder_is_finished_with_the_same_bytes(inputs, builder, tmp_path: Path, count: int) -> None:
    build(inputs, tmp_path / "straight", OPTIONS)
    for point in random.Random(count).sample(range(1, POINTS["builder"]), count):
        out = tmp_path / f"killed-at-{point}"
        killed = builder(*inputs, "--out", out, "--workers", 1, *FLAGS, kill_at=point, below=out)
        assert killed.returncode == KILLED, point
        assert not (out / "index.json").exists()
        build(inputs, out, OPTIONS)
        assert contents(out) == contents(tmp_path / "straight"), point


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.long)])
def test_a_build_outlives_its_workers(inputs, builder, tmp_path: Path, count: int) -> None:
    build(inputs, tmp_path / "straight", OPTIONS)
    for point in random.Random(count).sample(range(1, POINTS["worker"]), count):
        out = tmp_path / f"killed-at-{point}"
        done = builder(*inputs, "--out", out, "--workers", 2, *FLAGS, kill_at=point, role="worker", below=out)
        assert done.returncode == 0, done.stderr
        assert "was killed by signal SIGKILL while it worked on 0000" in done.stderr, point
        assert contents(out) == contents(tmp_path / "straight"), point


@pytest.mark.long
def test_a_killed_builder_leaves_no_workers(inputs, builder, tmp_path: Path) -> None:
    """`builder` returns when all of them have ended. The next build may begin before that."""
    out = tmp_path / "out"
    killed = builder(*inputs, "--out", out, "--workers", 2, *FLAGS, kill_at=9, below=out)
    assert killed.returncode == KILLED
    build(inputs, out, OPTIONS)
    build(inputs, tmp_path / "straight", OPTIONS)
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.long
def test_workers_of_a_killed_builder_do_not_finish_their_units() -> None:
    code = """
import os, signal, time
from rae_scale.data.build import pool
pool.wait = lambda busy: os.kill(os.getpid(), signal.SIGKILL)
pool.run_local(time.sleep, [1000, 2000], 2, print)
"""
    # Ends when the workers have: they share its standard error.
    killed = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60, check=False)
    assert killed.returncode == KILLED


@pytest.mark.long
def test_workers_that_are_always_killed_end_the_build(inputs, builder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = builder(*inputs, "--out", out, "--workers", 2, *FLAGS, kill_at=9, role="worker", below=out, once=False)
    assert ended.returncode == 2
    assert "rae-scale: error: worker " in ended.stderr
    assert "as did 2 others; if it was out of memory" in ended.stderr
    build(inputs, out, OPTIONS)
    build(inputs, tmp_path / "straight", OPTIONS)
    assert contents(out) == contents(tmp_path / "straight")
