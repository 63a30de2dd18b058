from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from rae_scale.data.quarantine import BadRecord, Quarantine, TooManyBadSamples


def bad(position: int = 0, reason: str = "undecodable image") -> BadRecord:
    return BadRecord("shards", "shard.00000.mds", 3, "key", position, reason, "detail ü")


def test_records_are_appended_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    for rank in range(2):  # two ranks share the file
        Quarantine(path, 0.5).add(10, [bad(rank), bad(rank + 10)])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [asdict(bad(position)) for position in (0, 10, 1, 11)]


def test_no_bad_sample_leaves_no_file(tmp_path: Path) -> None:
    Quarantine(tmp_path / "quarantine.jsonl", 0.0).add(10, [])
    assert list(tmp_path.iterdir()) == []


def test_too_many_stop_the_run_and_are_still_listed(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.01)
    quarantine.add(1000, [bad()] * 9 + [bad(reason="no image")])
    quarantine.add(100, [bad()])  # 11 of 1100
    with pytest.raises(TooManyBadSamples) as caught:
        quarantine.add(0, [bad()])
    message = str(caught.value)
    assert "12 of 1100 samples" in message
    assert "undecodable image 11, no image 1" in message
    assert "data.max_bad_fraction=0.01" in message
    assert len(quarantine.path.read_text().splitlines()) == 12


def test_the_first_thousand_samples_count_as_a_thousand(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", 0.01)
    quarantine.add(16, [bad()] * 10)
    with pytest.raises(TooManyBadSamples):
        quarantine.add(16, [bad()])


def test_a_limit_of_zero_stops_at_the_first(tmp_path: Path) -> None:
    with pytest.raises(TooManyBadSamples):
        Quarantine(tmp_path / "quarantine.jsonl", 0.0).add(16, [bad()])
