"""Who is missing, too many or of another opinion is named, on all ranks that came, within the time-out."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
from harness import free_port

from rae_scale.parallel.ranks import Ranks
from rae_scale.preflight.board import Board
from rae_scale.preflight.place import Place
from rae_scale.preflight.rendezvous import (
    Unreachable,
    Verdict,
    hear,
    judge,
    judge_attendance,
    open_store,
    register,
    tell,
)
from tests.preflight.boards import Boards
from tests.preflight.made_up import only, place


def attend(own: Place, seconds: float, configured: int, board: Board) -> Verdict:
    number = register(board, own)
    if own.rank != 0:
        return hear(board, own, number, seconds)
    verdict = judge(board, own.world_size, configured, seconds)
    tell(board, verdict, number)
    return verdict


def verdicts(places: list[Place], seconds: float = 10, configured: int = 4) -> tuple[list[Verdict], float]:
    """What each hears, and how long it took."""
    started = time.monotonic()
    with Boards() as boards:
        heard = boards.run([partial(attend, own, seconds, configured) for own in places])
    assert all(verdict == heard[0] for verdict in heard), "all ranks hear the same"
    return heard, time.monotonic() - started


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rae_scale.preflight.rendezvous.GRACE", 0.5)


def test_all_come() -> None:
    heard, _ = verdicts([place(rank) for rank in range(4)])
    assert heard[0].ok
    assert sorted(each.rank for each in heard[0].places) == [0, 1, 2, 3]


def test_one_rank_never_comes() -> None:
    heard, seconds = verdicts([place(0), place(1), place(2)], seconds=1)
    finding = only(heard[0].findings)
    assert finding.ranks == (3,)
    assert finding.value == "rank 3 of 4 did not come within 1 s (node1 runs other ranks)"
    assert seconds < 20


def test_a_whole_machine_never_comes() -> None:
    finding = only(judge_attendance([place(0), place(1)], 4, 4, 60))
    assert finding.value == "ranks 2-3 of 4 did not come within 60 s"
    assert finding.ranks == (2, 3)


def test_two_processes_with_one_rank() -> None:
    second = replace(place(1), host="node9", machine="m9", pid=999)
    heard, seconds = verdicts([place(0), place(1), second, place(2)], seconds=30)
    duplicate, missing = heard[0].findings
    assert duplicate.ranks == (1,)
    assert "node0 (pid 101, 10.0.0.0)" in duplicate.value
    assert "node9 (pid 999, 10.0.0.0)" in duplicate.value
    assert missing.ranks == (3,)
    # It does not wait the whole time for what cannot be right any more.
    assert seconds < 25


def test_one_rank_believes_in_another_world_size() -> None:
    heard, _ = verdicts([place(0), place(1), place(2, world_size=8), place(3)], seconds=30)
    finding = only(heard[0].findings)
    assert finding.ranks == (2,)
    assert "believes in 8 ranks (torchrun), the others in 4" in finding.value


def test_the_configuration_asks_for_another_world_size() -> None:
    finding = only(judge_attendance([place(rank) for rank in range(4)], 4, 8, 60))
    assert "4 processes were started, but the configuration asks for 8" in finding.value


def test_two_ranks_with_one_gpu() -> None:
    finding = only(judge_attendance([place(0), place(1, local_rank=0), place(2), place(3)], 4, 4, 60))
    assert finding.ranks == (0, 1)
    assert "have local rank 0 on node0" in finding.value


def ranks_at(port: int, rank: int) -> Ranks:
    return Ranks(rank, rank, 2, 2, "127.0.0.1", port, "torchrun", "WORLD_SIZE")


@pytest.fixture
def listening() -> Iterator[int]:
    """The port of something that answers nobody."""
    with socket.socket() as taken:
        # A store of an earlier test may have had the port.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        yield int(taken.getsockname()[1])


def test_the_port_is_taken(listening: int) -> None:
    with pytest.raises(Unreachable) as error:
        open_store(ranks_at(listening, 0), 1)
    assert f"port {listening} is taken by pid {os.getpid()} (" in error.value.finding.value


def test_something_else_answers_in_place_of_rank_0(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rae_scale.preflight.rendezvous.PROBE", 0.5)
    with pytest.raises(Unreachable, match="is not rank 0 of a run"):
        open_store(ranks_at(listening, 1), 0.5)


def test_rank_0_never_comes() -> None:
    port = free_port()
    with pytest.raises(Unreachable, match=f"nothing listens on port {port}") as error:
        open_store(ranks_at(port, 1), 0.5)
    assert "MASTER_ADDR=127.0.0.1 is this machine itself" in error.value.finding.fix


def test_rank_0_has_no_address() -> None:
    ranks = replace(ranks_at(free_port(), 1), master_addr="no-such-host.invalid")
    with pytest.raises(Unreachable, match=r"'no-such-host.invalid' has no address"):
        open_store(ranks, 0.5)


def test_rank_0_ends_before_it_has_judged() -> None:
    with Boards() as boards:
        board = boards.board()
        number = register(board, place(1))
        boards.close()
        with pytest.raises(Unreachable, match="rank 0 has ended"):
            hear(board, place(1), number, 10)
