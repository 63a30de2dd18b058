"""Waiting for data, and giving it up."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rae_scale.train.watch import take


def test_items_come_in_order_and_errors_come_through() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the storage is gone")

    source = items()
    assert [take(source, lambda: False) for _ in range(2)] == [1, 2]
    with pytest.raises(OSError, match="the storage is gone"):
        take(source, lambda: False)


def test_what_never_comes_is_given_up_only_when_asked() -> None:
    never, asked = threading.Event(), iter([False, False, True])

    def items() -> Iterator[int]:
        never.wait()
        yield 1

    assert take(items(), lambda: next(asked)) is None
    assert next(asked, "all were asked") == "all were asked"
    never.set()


class Dataset:
    """As `MicroBatches`, but its storage never answers."""

    micro_steps = 1

    def __getitem__(self, index: int) -> int:
        threading.Event().wait()
        return index

    def close(self) -> None: ...


@pytest.mark.long
def test_a_worker_whose_storage_hangs_does_not_outlive_its_loader(tmp_path: Path) -> None:
    from rae_scale.data.loader import Loader
    from rae_scale.data.quarantine import Quarantine

    loader: Loader[int] = Loader(Dataset(), Quarantine(tmp_path / "bad", 0.5), 0, 2, int)  # type: ignore[arg-type]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    assert take(loader, lambda: True) is None
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
