"""Workers that die, with children that do nothing in the place of PyTorch's."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import pytest

from rae_scale.data import workers
from rae_scale.data.workers import MAX_DEATHS, WorkerDied, Workers


def wait_and_leave(told: Connection, status: int) -> None:
    told.recv()
    os._exit(status)


class Loader:
    """As a DataLoader: hands over item numbers, made by two children; the first is told how to die before an item."""

    deaths: list[tuple[int, int]]  # before item number, by signal (or with status, if below 0)
    error: type[Exception]

    def __init__(self, dataset: None, sampler: Iterator[int], **settings: Any) -> None:
        self.numbers = sampler

    def __iter__(self) -> Iterator[int]:
        fork = multiprocessing.get_context("fork")
        told, self.tell = fork.Pipe(duplex=False)
        status = -self.deaths[0][1] if self.deaths else 0
        self.first = fork.Process(target=wait_and_leave, args=(told, status))
        for child in (self.first, fork.Process(target=signal.pause)):
            child.start()
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # PyTorch's would raise
        return self.items()

    def items(self) -> Iterator[int]:
        for number in self.numbers:
            if self.deaths and self.deaths[0][0] == number:
                _, how = self.deaths.pop(0)
                if how > 0:
                    os.kill(self.first.pid, how)  # type: ignore[arg-type]
                elif how < 0:
                    self.tell.send(None)
                if how:
                    self.first.join()
                raise self.error("DataLoader worker (pid(s) 1) exited unexpectedly")
            yield number


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """start(deaths, error) -> Workers whose items are 100, 101, ..."""
    opened = []

    def make(deaths: list[tuple[int, int]], error: type[Exception] = RuntimeError) -> Workers[int]:
        monkeypatch.setattr(Loader, "deaths", deaths, raising=False)
        monkeypatch.setattr(Loader, "error", error, raising=False)
        monkeypatch.setattr(workers, "DataLoader", Loader)
        opened.append(Workers(None, lambda taken: count(100 + taken), num_workers=1))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for each in opened:
        each.close()
    assert multiprocessing.active_children() == []


# A worker can die while it sends, too: its socket is then closed or gone.
@pytest.mark.parametrize("error", [RuntimeError, ConnectionRefusedError, EOFError])
def test_a_killed_worker_is_replaced_and_no_item_is_lost(start, caplog, error: type[Exception]) -> None:
    items = start([(103, signal.SIGKILL), (103, signal.SIGKILL), (105, signal.SIGKILL)], error)
    assert [next(items) for _ in range(8)] == list(range(100, 108))
    assert len(caplog.records) == 3
    assert len(multiprocessing.active_children()) == 2
    assert "was killed (SIGKILL). If nobody did, the machine ran out of memory" in caplog.text


def test_an_item_that_kills_every_worker_ends_it_with_the_cause(start) -> None:
    items = start([(102, signal.SIGKILL)] * MAX_DEATHS)
    assert [next(items), next(items)] == [100, 101]
    with pytest.raises(WorkerDied, match=r"worker \d+ was killed \(SIGKILL\).*and lower data.num_workers"):
        next(items)


@pytest.mark.parametrize(("how", "said"), [(signal.SIGXCPU, "by signal SIGXCPU"), (-3, "with status 3")])
def test_a_worker_that_ends_by_itself_is_a_defect_and_not_replaced(start, how: int, said: str) -> None:
    items = start([(101, how)])
    assert next(items) == 100
    with pytest.raises(WorkerDied, match=said):
        next(items)


def test_errors_of_living_workers_come_through(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DEATH_SECONDS", 0.01)
    items = start([])
    monkeypatch.setattr(Loader, "deaths", [(100, 0)])
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        next(items)


def test_closed_workers_are_not_started_again(start) -> None:
    items = start([])
    items.close()
    with pytest.raises(ValueError, match="closed"):
        next(items)
    assert multiprocessing.active_children() == []


def test_the_handler_of_dead_children_stays_as_it_was(start) -> None:
    def handler(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        start([])
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)
