"""Workers: the same bytes, and errors that arrive with their unit. What kills them is in test_killed.py."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from rae_scale.data.build import BuildOptions, Part, build
from rae_scale.data.build.failure import Failure
from rae_scale.data.build.folder import PARTIAL_NAME
from rae_scale.data.build.pool import run_local
from rae_scale.data.build.units import Unit
from rae_scale.data.record import BadSample
from tests.data.build.conftest import SHARD_BYTES, contents

OPTIONS = BuildOptions(shard_bytes=SHARD_BYTES)
UNIT = Unit(1, "unit-1", Path("in-1.tar"))


def test_one_worker_is_this_process() -> None:
    found: list[tuple[Unit, int]] = []
    run_local(lambda unit: os.getpid(), [UNIT, UNIT], 1, lambda unit, result: found.append((unit, result)))
    assert found == [(UNIT, os.getpid())] * 2


def test_workers_write_the_same_bytes_and_say_what_went_wrong(corpus, tmp_path: Path) -> None:
    inputs = corpus(4)
    out = tmp_path / "out"
    build(inputs, tmp_path / "straight", OPTIONS)
    build(inputs, out, OPTIONS, part=Part(0, 4))
    lock = out / PARTIAL_NAME / "00002-in-2.lock"
    lock.mkdir()
    with pytest.raises(ValueError, match=r"00002-in-2: .*Is a directory"):
        build(inputs, out, OPTIONS, workers=2)
    assert not multiprocessing.active_children()
    lock.rmdir()
    built: list[str] = []
    report = build(inputs, out, OPTIONS, workers=2, on_unit=lambda unit, done: built.append(unit.name))
    assert sorted(built) == ["00000-in-0", "00001-in-1", "00002-in-2", "00003-in-3"]
    assert report.counts.kept == 16
    assert contents(out) == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(28, "No space left on device"), ValueError, "unit-1: .*No space left"),
        (BadSample("not", "picklable"), ValueError, "unit-1: not: picklable"),
        (KeyError("a defect"), RuntimeError, "(?s)unit-1: 'a defect'.*Traceback.*raise error"),
    ],
)
def test_a_failure_names_its_unit(error: Exception, kind: type[Exception], message: str) -> None:
    try:
        raise error
    except Exception as caught:
        failure = Failure.of(UNIT, caught)
    with pytest.raises(kind, match=message):
        raise failure.error()
