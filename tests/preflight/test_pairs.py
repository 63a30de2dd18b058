"""Who exchanges with whom, and whom the times accuse."""

from __future__ import annotations

from itertools import combinations

import pytest

from rae_scale.preflight.pairs import judge_pairs, pair_rounds, tournament
from rae_scale.preflight.place import Roster
from tests.preflight.made_up import ROSTER, bad, only, place


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_everyone_meets_everyone_once(count: int) -> None:
    rounds = tournament(count)
    games = [tuple(sorted(game)) for games in rounds for game in games]
    assert sorted(games) == list(combinations(range(count), 2))
    assert all(len({player for game in games for player in game}) == 2 * len(games) for games in rounds)


@pytest.mark.parametrize("machines", [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], [[0, 1], [2]], [[0, 1, 2]]])
def test_rounds_use_each_rank_once_and_each_pair_once(machines: list[list[int]]) -> None:
    rounds = pair_rounds(machines)
    for pairs in rounds:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks))
    every = [pair for pairs in rounds for pair in pairs]
    assert len(every) == len(set(every))
    for one, other in combinations(machines, 2):
        assert all(pair in every for pair in zip(one, other, strict=False))
    assert all(pair in every for machine in machines for pair in combinations(machine, 2))


EIGHT = Roster(place(rank, host=f"n{rank // 2}", machine=f"m{rank // 2}") for rank in range(8))


def rates(roster: Roster, inside: float = 300e9, between: float = 40e9) -> dict[tuple[int, int], float]:
    found = {}
    for pairs in pair_rounds(roster.machines):
        for one, other in pairs:
            same = roster.places[one].machine == roster.places[other].machine
            found[one, other] = inside if same else between
    return found


def test_equal_links() -> None:
    assert not bad(judge_pairs(rates(EIGHT), EIGHT))


def test_a_rank_that_is_slow_with_all_others_is_named() -> None:
    measured = {pair: rate / 4 if 5 in pair and rate < 100e9 else rate for pair, rate in rates(EIGHT).items()}
    finding = only(judge_pairs(measured, EIGHT))
    assert finding.ranks == (5,)
    assert "network adapter" in finding.fix


def test_a_link_that_is_slow_by_itself_is_named_with_both_ends() -> None:
    finding = only(judge_pairs(rates(EIGHT) | {(2, 6): 9e9}, EIGHT))
    assert finding.ranks == (2, 6)
    assert "n1 to n3" in finding.value
    assert "9.00 GB/s" in finding.value


def test_one_pair_of_a_rank_accuses_both_ends() -> None:
    assert only(judge_pairs(rates(ROSTER) | {(1, 3): 4e9}, ROSTER)).ranks == (1, 3)


def test_one_pair_has_nothing_to_be_held_against() -> None:
    pair = Roster([place(0), place(2)])
    assert not bad(judge_pairs({(0, 2): 1.0}, pair))
