"""What the user reads."""

from __future__ import annotations

import pytest

from rae_scale.preflight.finding import CHECKS, Finding, merged, selected, size
from rae_scale.preflight.place import Roster, numbers
from rae_scale.preflight.report import to_json, to_text
from tests.preflight.made_up import ROSTER, place

FINDINGS = [
    Finding("shm", "ok", "500 GiB", ranks=(0, 1)),
    Finding("shm", "fail", "64 MiB", "it dies", "more of it", ranks=(2,)),
    Finding("shm", "fail", "64 MiB", "it dies", "more of it", ranks=(3,)),
    Finding("disk", "ok", "1 TB", ranks=(0, 1)),
    Finding("disk", "ok", "2 TB", ranks=(2,)),
    Finding("disk", "ok", "3 TB", ranks=(3,)),
    Finding("ranks", "ok", "all 4 came", ranks=(0, 1, 2, 3)),
]


def test_equal_findings_are_one_and_come_in_order() -> None:
    assert [(finding.check, finding.status, finding.ranks) for finding in merged(FINDINGS)] == [
        ("ranks", "ok", (0, 1, 2, 3)),
        ("shm", "fail", (2, 3)),
        ("shm", "ok", (0, 1)),
        ("disk", "ok", (0, 1, 2, 3)),
    ]
    assert merged(FINDINGS)[3].value == "1 TB; 2 TB and 1 other values"


def test_a_line_says_where_and_the_next_ones_why_and_what_to_do() -> None:
    text = to_text(merged(FINDINGS), ROSTER, 4).splitlines()
    assert text[0] == "4 of 4 ranks on 2 machines: node0 (ranks 0-1), node1 (ranks 2-3)"
    assert text[2].split() == ["FAIL", "shm", "node1", "(ranks", "2-3)", "64", "MiB"]
    assert [line.strip() for line in text[3:5]] == ["why: it dies", "fix: more of it"]
    assert text[-1] == "do not start: 3 ok, 0 to look at, 1 failed"
    assert to_text(merged(FINDINGS[:1]), ROSTER, 4).endswith("ready to start: 1 ok, 0 to look at, 0 failed")


def test_json() -> None:
    found = to_json(merged(FINDINGS), ROSTER, 4)
    assert found["ok"] is False
    assert found["machines"] == [{"host": "node0", "ranks": [0, 1]}, {"host": "node1", "ranks": [2, 3]}]
    assert found["findings"][1] == {
        "check": "shm",
        "status": "fail",
        "hosts": ["node1"],
        "ranks": [2, 3],
        "value": "64 MiB",
        "why": "it dies",
        "fix": "more of it",
    }


def test_machines_with_one_name_are_told_apart() -> None:
    twins = Roster([place(0), place(2, host="node0")])
    assert twins.who((2,)) == "node0 (10.0.0.1) (rank 2)"
    assert twins.leaders == [0, 2]
    assert twins.who((0, 2)) == "all"
    assert Roster([place(0)]).who((3,)) == "not here (rank 3)"


def test_many_ranks_are_written_short() -> None:
    assert numbers([5]) == "rank 5"
    assert numbers([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_sizes() -> None:
    assert (size(4e6), size(2.5e9)) == ("4.0 MB", "2.5 GB")


def test_checks_are_chosen_by_name() -> None:
    assert selected([], []) == set(CHECKS)
    assert selected(["shm", "disk"], ["disk"]) == {"shm"}
    with pytest.raises(ValueError, match="--skip='dsk' is no check; choose from ranks, config"):
        selected([], ["dsk"])
