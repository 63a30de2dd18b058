from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rae_scale.data.quarantine import BadRecord, Quarantine, TooManyBadSamples


def bad(position: int = 0, reason: str = "undecodable image") -> BadRecord:
    return BadRecord("shards", "shard.00000.mds", 3, "key", position, reason, "detail ü")


def in_lost_shard(position: int, shard: str = "shard.00000.mds", lost: float = 0.004) -> BadRecord:
    record = bad(position, "bad shard")
    return replace(record, shard=shard, shard_lost=True, samples=3200, lost=lost)


def listed(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_appended_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    for rank in range(2):  # two ranks share the file
        Quarantine(path, 0.5).add(10, [bad(rank), bad(rank + 10)])
    lines = listed(path)
    assert [line["position"] for line in lines] == [0, 10, 1, 11]
    assert lines[0] == {
        "source": "shards",
        "shard": "shard.00000.mds",
        "index": 3,
        "key": "key",
        "position": 0,
        "reason": "undecodable image",
        "detail": "detail ü",
        "samples": 1,
        "shard_lost": False,
        "lost": 0.0,
    }


def test_no_bad_sample_leaves_no_file(tmp_path: Path) -> None:
    Quarantine(tmp_path / "quarantine.jsonl", 0.0).add(10, [])
    assert list(tmp_path.iterdir()) == []


def test_every_position_is_either_used_or_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.5)
    quarantine.add(8, [bad(1), bad(1), in_lost_shard(1), in_lost_shard(4)])  # four attempts at two positions
    quarantine.add(8, [])
    assert (quarantine.seen, quarantine.used, quarantine.replaced) == (16, 14, 2)
    quarantine.close()
    assert "of 16 samples 14 were used and 2 replaced (undecodable image 2, bad shard 2)" in caplog.text


def test_each_reason_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.5)
    quarantine.add(8, [bad(1), bad(2), bad(3, "no image")])
    quarantine.add(8, [bad(9)])
    assert [record.args[2] for record in caplog.records] == ["undecodable image", "no image"]


def test_a_lost_shard_is_listed_once_by_all_ranks_and_restarts(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    for rank in range(3):
        quarantine = Quarantine(path, 0.5)
        quarantine.add(100, [in_lost_shard(100 * rank + n) for n in range(50)])
        quarantine.add(100, [in_lost_shard(1000 + 100 * rank + n, "shard.00007.mds") for n in range(50)])
        assert quarantine.replaced == quarantine.reasons["bad shard"] == 100
    lines = listed(path)
    assert [(line["shard"], line["samples"]) for line in lines] == [
        ("shard.00000.mds", 3200),
        ("shard.00007.mds", 3200),
    ]
    assert [(line["index"], line["key"], line["position"]) for line in lines] == [(None, None, 0), (None, None, 1000)]


def test_lost_shards_count_by_what_the_data_lose_not_by_when_their_samples_come(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.01)
    quarantine.add(1000, [in_lost_shard(position) for position in range(400)])  # a bunch of them: 0.4 % of the data
    quarantine.add(1000, [in_lost_shard(1000 + n, "shard.00001.mds") for n in range(400)])
    with pytest.raises(TooManyBadSamples, match=r"2 bad shards hold 0.80% of the data.*max_bad_fraction=0.01"):
        quarantine.add(1000, [bad(2000 + position) for position in range(7)])


def test_too_many_stop_the_run_and_are_still_listed(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.01)
    quarantine.add(1000, [*map(bad, range(9)), bad(9, reason="no image")])
    quarantine.add(100, [bad(1000)])  # 11 of 1100
    with pytest.raises(TooManyBadSamples) as caught:
        quarantine.add(0, [bad(1001)])
    message = str(caught.value)
    assert "12 of 1100 samples" in message
    assert "undecodable image 11, no image 1" in message
    assert "data.max_bad_fraction=0.01" in message
    assert len(listed(quarantine.path)) == 12


def test_the_first_thousand_samples_count_as_a_thousand(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.01)
    quarantine.add(16, [*map(bad, range(10))])
    with pytest.raises(TooManyBadSamples):
        quarantine.add(16, [bad(16)])


def test_a_limit_of_zero_stops_at_the_first(tmp_path: Path) -> None:
    with pytest.raises(TooManyBadSamples):
        Quarantine(tmp_path / "quarantine.jsonl", 0.0).add(16, [bad()])


def test_a_full_disk_changes_neither_the_count_nor_what_is_listed_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.symlink_to("/dev/full")
    quarantine = Quarantine(path, 0.01)
    quarantine.add(1000, [*map(bad, range(9)), in_lost_shard(9, lost=0.0001)])
    assert quarantine.replaced == 10
    path.unlink()
    with pytest.raises(TooManyBadSamples):
        quarantine.add(8, [bad(1000), bad(1001)])
    assert [line["position"] for line in listed(path)] == [*range(10), 1000, 1001]


def test_what_never_had_room_is_said_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.symlink_to("/dev/full")
    quarantine = Quarantine(path, 0.5)
    quarantine.add(8, [bad(0), bad(1)])
    quarantine.close()
    assert "cannot be written; 2 lines are lost" in caplog.text


def test_lines_that_were_torn_or_are_foreign_do_not_hide_a_listed_shard(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_bytes(b'{"source": "sha\n[]\n' + in_lost_shard(3).line())
    Quarantine(path, 0.5).add(10, [in_lost_shard(4)])
    assert path.read_bytes().count(b"shard_lost") == 1
