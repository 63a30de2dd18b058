"""What counts as slower: the rule on made-up numbers, in both directions, and what is not compared at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rae_scale.bench.baseline import compare, verdict
from rae_scale.bench.record import Measure, read_record
from tests.bench.made_up import record, row, seconds


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ((1.00, 0.99, 1.01), (1.10, 1.09, 1.11), "slower"),
        ((1.00, 0.99, 1.01), (1.02, 1.015, 1.025), "same"),  # apart, but below the threshold
        ((1.00, 0.80, 1.20), (1.15, 1.10, 1.30), "same"),  # beyond the threshold, but within the noise
        ((1.00, 0.99, 1.01), (1.10, 1.01, 1.20), "same"),  # intervals that touch
        ((1.10, 1.09, 1.11), (1.00, 0.99, 1.01), "faster"),
        ((1.02, 1.015, 1.025), (1.00, 0.99, 1.01), "same"),
        ((1.15, 1.10, 1.30), (1.00, 0.80, 1.20), "same"),
        ((1.00, 0.99, 1.01), (1.00, 0.99, 1.01), "same"),
    ],
)
def test_rule(then: tuple[float, float, float], now: tuple[float, float, float], expected: str) -> None:
    assert verdict(seconds(*now), seconds(*then), threshold=0.03) == expected


def test_threshold_is_of_the_earlier_median() -> None:
    then, now = seconds(1.0, 1.0, 1.0), seconds(1.2, 1.2, 1.2)
    assert verdict(now, then, 0.19) == "slower" and verdict(now, then, 0.21) == "same"
    assert verdict(then, now, 0.19) == "faster" and verdict(then, now, 0.21) == "same"


def test_memory_has_no_spread_and_is_compared_by_the_threshold() -> None:
    then, now = Measure.count(1000), Measure.count(1100)
    assert verdict(now, then, 0.03) == "slower" and verdict(now, then, 0.2) == "same"
    assert verdict(then, then, 0.0) == "same"


def test_rows_are_matched_by_their_settings_and_the_others_are_named() -> None:
    fast, slow = seconds(1.0, 0.99, 1.01), seconds(2.0, 1.99, 2.01)
    then = record(row(1, step=fast), row(2, step=fast), row(3, step=fast))
    now = record(row(3, step=slow), row(2, step=fast), row(4, step=slow), torch="2.16.0")
    found = compare(now, then)
    assert [(change.row, change.verdict) for change in found.changes] == [
        ("micro_batch_size 3", "slower"),
        ("micro_batch_size 2", "same"),
    ]
    assert [change.row for change in found.regressions] == ["micro_batch_size 3"]
    assert (found.only_now, found.only_then) == (["micro_batch_size 4"], ["micro_batch_size 1"])
    text = str(found)
    assert "| micro_batch_size 3 | step | 1000.000 ms (990.000 - 1010.000) |" in text and "| +100.0% | slower |" in text
    assert "different since then: torch 2.15.0, now 2.16.0" in text and "1 regression(s) in 2 measure(s)" in text


def test_what_fails_now_and_did_not_is_a_regression() -> None:
    fine, broken = row(1, step=seconds(1, 1, 1)), row(1, failed="out of memory")
    assert [change.verdict for change in compare(record(broken), record(fine)).regressions] == ["fails now"]
    assert not compare(record(fine), record(broken)).changes
    assert not compare(record(broken), record(broken)).regressions


def test_another_device_power_limit_or_benchmark_is_refused() -> None:
    mine = record(row(1, step=seconds(1, 1, 1)))
    with pytest.raises(ValueError, match=r"measured with device 'NVIDIA H200', this is 'NVIDIA H100 80GB HBM3'"):
        compare(mine, record(*mine.rows, device="NVIDIA H200"))
    with pytest.raises(ValueError, match=r"measured with power_limit_w 350.0, this is 700.0"):
        compare(mine, record(*mine.rows, power_limit_w=350.0))
    with pytest.raises(ValueError, match=r"the baseline is of `bench comm`, this is `bench step`"):
        compare(mine, record(*mine.rows, benchmark="comm"))


def test_without_a_row_in_common_the_difference_is_named() -> None:
    with pytest.raises(ValueError, match=r"no row of the baseline .* differ in config.micro: 2 then, 1 now"):
        compare(record(row(1, step=seconds(1, 1, 1))), record(row(2, step=seconds(1, 1, 1))))


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    for content, message in (
        ("| a table |", "is no JSON file"),
        ("{}", "is no record of a benchmark"),
        (json.dumps(record().to_json() | {"schema": 0}), "has schema 0, and this release reads 1"),
        (json.dumps({"schema": 1, "rows": []}), "lacks fields of a record"),
        (json.dumps({"schema": 1, "rows": [{}]}), "lacks fields of a record"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_record(path)
