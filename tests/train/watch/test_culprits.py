"""Who is to blame for a stall, from heartbeats alone."""

from __future__ import annotations

from typing import Any

import pytest

from rae_scale.train.watch.culprits import describe, find_culprits, time_left
from rae_scale.train.watch.heartbeat import Heartbeat

NOW = 1000.0


def beat(rank: int, **changes: Any) -> Heartbeat:
    values: dict[str, Any] = {"step": 12, "phase": "step", "since": NOW - 70, "time_out": 60, "time": NOW - 1}
    values |= {"where": "mesh.py:118 any", "waiting": True, **changes}
    return Heartbeat(rank, f"node-{rank // 2}", 1, 1, seconds={}, **values)


def beats(count: int = 4, **odd: dict[str, Any]) -> dict[int, Heartbeat]:
    return {rank: beat(rank, **odd.get(f"rank_{rank}", {})) for rank in range(count)}


@pytest.mark.parametrize(
    ("odd", "kind", "ranks"),
    [
        ({"rank_2": {"time": NOW - 40}}, "silent", (2,)),
        ({"rank_1": {"phase": "data"}}, "behind", (1,)),
        ({"rank_1": {"step": 11}, "rank_3": {"step": 11, "phase": "save"}}, "behind", (3,)),  # 1 waits for 3
        ({"rank_3": {"waiting": False, "where": "generation.py:88 prepare"}}, "elsewhere", (3,)),
        ({}, "ranks", ()),
    ],
)
def test_the_rank_that_is_not_like_the_others_is_named(odd: Any, kind: str, ranks: tuple[int, ...]) -> None:
    culprits = find_culprits(beats(**odd), range(4), NOW, stale_s=32)
    assert getattr(culprits, kind) == culprits.ranks == ranks


def test_a_rank_without_any_heartbeat_is_silent() -> None:
    assert find_culprits(beats(3), range(4), NOW, stale_s=32).silent == (3,)


def test_a_dead_rank_is_blamed_before_those_that_are_behind() -> None:
    odd = {"rank_0": {"time": NOW - 40}, "rank_1": {"phase": "data"}}
    assert find_culprits(beats(**odd), range(4), NOW, stale_s=32).ranks == (0,)


def test_a_rank_in_a_longer_phase_has_time_left() -> None:
    found = beats(rank_1={"phase": "save", "time_out": 600})
    culprits = find_culprits(found, range(4), NOW, stale_s=32)
    assert time_left(found, culprits, NOW) == 600 - 70
    found = beats(rank_1={"phase": "save", "time_out": 60})
    assert time_left(found, find_culprits(found, range(4), NOW, stale_s=32), NOW) == -10
    assert time_left(beats(), find_culprits(beats(), range(4), NOW, stale_s=32), NOW) == 0


def test_the_text_names_rank_host_place_and_what_the_others_do() -> None:
    found = beats(rank_3={"phase": "data", "where": "loader.py:7 read", "waiting": False})
    text = describe(find_culprits(found, range(4), NOW, stale_s=32), found, NOW)
    assert "rank 3 on node-1 (step 13, data for 70 s, loader.py:7 read): behind the others" in text
    assert "3 rank(s): step 13, step, mesh.py:118 any" in text


def test_hundreds_of_culprits_are_counted_and_not_listed() -> None:
    found = beats(200)
    text = describe(find_culprits(found, range(500), NOW, stale_s=32), found, NOW)
    assert "and 292 more without a heartbeat" in text and len(text.splitlines()) < 15
