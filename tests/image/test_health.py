from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rae_scale.train.watch.heartbeat import Heartbeat, write_heartbeat

NOW = 1_000_000.0
DEAD = 2**22 + 1  # above the largest id that Linux gives


def beat(folder: Path, rank: int, **changes: Any) -> None:
    """As a rank writes it: the check knows the files by their names alone, since it must not import torch."""
    content = {"rank": rank, "host": "here", "pid": os.getpid(), "attempt": 1, "step": 5, "phase": "train"}
    content |= {"since": NOW - 20, "time_out": 600.0, "time": NOW - 10, "seconds": {}}
    (folder / "heartbeats").mkdir(exist_ok=True)
    write_heartbeat(folder, Heartbeat(**content | changes))


@pytest.mark.parametrize(
    ("beats", "status", "healthy", "why"),
    [
        ([], None, True, "no heartbeat from this host yet"),
        ([{}, {}], "running", True, "2 ranks, the last sign of life 10 s ago"),
        ([{"time": NOW - 300}, {"time": NOW - 400}], "running", False, "no rank of this host .* for 300 s"),
        ([{}, {"time": NOW - 400}], "running", False, "rank 1, process .*, is silent for 400 s"),
        ([{}, {"time": NOW - 400, "pid": DEAD}], "running", True, "the last sign of life 10 s ago"),
        ([{}, {"time": NOW - 400, "host": "there"}], "running", True, "1 ranks"),
        ([{"time": NOW - 400, "host": "there"}], "running", True, "no heartbeat from this host yet"),
        ([{"time": NOW - 400}], "requeue", True, "the run has ended: requeue"),
    ],
)
def test_a_container_is_as_healthy_as_its_ranks(
    beats: list[dict[str, Any]], status: str | None, healthy: bool, why: str, tmp_path: Path, health: ModuleType
) -> None:
    for rank, changes in enumerate(beats):
        beat(tmp_path, rank, **changes)
    if status:
        (tmp_path / "status.json").write_text(json.dumps({"state": status}))
    found, said = health.judge(tmp_path, "here", NOW, 120)
    assert found is healthy
    assert re.search(why, said), said


def test_a_file_that_is_being_replaced_is_no_alarm(tmp_path: Path, health: ModuleType) -> None:
    beat(tmp_path, 0)
    (tmp_path / "heartbeats/rank-00001.json").write_text("")
    (tmp_path / "status.json").write_text("[")
    assert health.judge(tmp_path, "here", NOW, 120) == (True, "1 ranks, the last sign of life 10 s ago")


def test_exit_codes_are_what_docker_expects(
    tmp_path: Path, health: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health.socket, "gethostname", lambda: "here")
    beat(tmp_path, 0, time=0)
    assert health.main({"RAE_RUN_DIR": str(tmp_path)}) == 1
    assert health.main({"RAE_RUN_DIR": str(tmp_path), "RAE_HEALTH_AGE_S": "1e12"}) == 0
    assert health.main({}) == 0
    assert "names no run" in capsys.readouterr().out.splitlines()[-1]
