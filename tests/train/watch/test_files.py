"""What a run's folder says: status, flags, journal, heartbeats and each rank's log."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from rae_scale.train.watch.flags import Flags, clear_flags
from rae_scale.train.watch.heartbeat import FOLDER, Heartbeat, read_heartbeats, write_heartbeat
from rae_scale.train.watch.journal import append_event, begin_attempt, last_words, new_event, read_events
from rae_scale.train.watch.ranklog import RankLog
from rae_scale.train.watch.status import Status, read_status


def flags(folder: Path, rank: int, attempt: int = 1) -> Flags:
    return Flags(folder, attempt, rank)


def heartbeat(rank: int = 0, attempt: int = 1, **changes: Any) -> Heartbeat:
    values: dict[str, Any] = {"step": 7, "phase": "step", "since": 0.0, "time_out": 1.0, "time": time.time() + 60}
    return Heartbeat(rank, "node", 1, attempt, **(values | {"seconds": {"compute": 3.0}} | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    clear_flags(tmp_path)
    (tmp_path / FOLDER).mkdir()
    return tmp_path


def test_flags_of_one_attempt_reach_all_its_ranks_and_no_later_attempt(folder: Path) -> None:
    flags(folder, 3).raise_flag("stop")
    flags(folder, 3).raise_flag("stop")
    flags(folder, 12).raise_flag("failed")
    assert flags(folder, 0).raised() == {"stop": [3], "stalled": [], "failed": [12]}
    assert not any(flags(folder, 0, attempt=2).raised().values())
    assert not any(flags(folder, 0, attempt=11).raised().values())
    clear_flags(folder)
    assert not any(flags(folder, 0).raised().values())


def test_the_first_rank_says_how_an_attempt_ended(folder: Path) -> None:
    main, other = (Status(folder, flags(folder, rank), 2, 100) for rank in (0, 1))
    main.running(40)
    assert read_status(folder)["state"] == "running"  # type: ignore[index]
    assert other.end("failed", 57, "rank 1: disk on fire")
    assert not main.end("failed", 57, "rank 0: connection reset by peer")
    status = read_status(folder)
    assert status is not None and status.pop("time") == pytest.approx(time.time(), abs=60)
    assert status == {
        "state": "failed",
        "step": 57,
        "max_steps": 100,
        "reason": "rank 1: disk on fire",
        "world_size": 2,
        "attempt": 1,
    }
    assert not list(folder.glob(".*"))


def test_a_run_that_has_not_begun_has_no_status(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None


def test_heartbeats_of_another_attempt_do_not_count(folder: Path) -> None:
    for beat in (heartbeat(0), heartbeat(1, attempt=2), heartbeat(2)):
        write_heartbeat(folder, beat)
    assert sorted(read_heartbeats(folder, range(4), attempt=1)) == [0, 2]


def test_the_next_attempt_writes_the_end_of_one_that_was_killed(folder: Path) -> None:
    begin_attempt(folder, world_size=2)
    append_event(folder, new_event("ready", 1, 5, {"start": 1.0}))
    beat = heartbeat()
    write_heartbeat(folder, beat)
    assert last_words(folder, read_events(folder)) is not None
    begin_attempt(folder, world_size=4)
    kinds = [(event["event"], event["attempt"], event["step"]) for event in read_events(folder)]
    assert kinds == [("begin", 1, None), ("ready", 1, 5), ("lost", 1, 7), ("begin", 2, None)]
    lost = read_events(folder)[2]
    assert (lost["time"], lost["seconds"]) == (beat.time, {"compute": 3.0})


def test_an_attempt_that_has_ended_needs_no_last_words(folder: Path) -> None:
    begin_attempt(folder)
    append_event(folder, new_event("end", 1, 9, {}, state="requeue"))
    write_heartbeat(folder, heartbeat())
    assert last_words(folder, read_events(folder)) is None


def test_a_line_that_was_torn_is_left_out_and_spoils_no_other(folder: Path) -> None:
    begin_attempt(folder)
    with (folder / "events.jsonl").open("a") as file:
        file.write('{"event": "save", "seconds": {"compute": 1}')
    append_event(folder, new_event("end", 1, 9, {}))
    assert [event["event"] for event in read_events(folder)] == ["begin", "end"]


def test_a_rank_log_holds_what_was_said_before_it_had_a_file(tmp_path: Path) -> None:
    log, logger = RankLog(), logging.getLogger("test_rank_log")
    logger.setLevel(logging.INFO)
    logger.addHandler(log)
    logger.info("early")
    log.open(tmp_path / "logs" / "1" / "rank-00000.log")
    logger.warning("late")
    try:
        raise RuntimeError("boom")
    except RuntimeError as error:
        log.exception("ends", error)
    logger.removeHandler(log)
    log.close()
    text = (tmp_path / "logs" / "1" / "rank-00000.log").read_text()
    assert text.index("INFO test_rank_log: early") < text.index("WARNING test_rank_log: late")
    assert "Traceback" in text and "RuntimeError: boom" in text


def test_a_rank_log_on_a_full_disk_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RankLog()
    log.open(Path("/dev/full"))
    for number in range(3):
        log.handle(logging.LogRecord("x", logging.INFO, "", 0, f"line {number}", (), None))
    assert capsys.readouterr().err.count("No space left") == 1
    log.file = None
    log.close()


def test_events_are_plain_json_lines(folder: Path) -> None:
    begin_attempt(folder, host="node")
    (line,) = (folder / "events.jsonl").read_text().splitlines()
    assert json.loads(line)["host"] == "node"
