"""Ranks as threads of the test, each with a connection of its own to one store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from harness import free_port

from rae_scale.preflight.board import Board

T = TypeVar("T")
SECONDS = timedelta(seconds=20)


class Boards:
    """`with Boards() as boards: boards.run([function_of_rank_0, function_of_rank_1])`."""

    def __enter__(self) -> Boards:
        self.port = free_port()
        self._server: dist.TCPStore | None = dist.TCPStore(
            "127.0.0.1", self.port, is_master=True, timeout=SECONDS, wait_for_workers=False
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """As if the process of rank 0 had ended."""
        self._server = None

    def board(self) -> Board:
        return Board(dist.TCPStore("127.0.0.1", self.port, is_master=False, timeout=SECONDS, wait_for_workers=False))

    def run(self, functions: list[Callable[[Board], T]]) -> list[T]:
        """What each of `functions` returns for a board of its own, all at the same time."""
        with ThreadPoolExecutor(len(functions)) as threads:
            return list(threads.map(lambda function: function(self.board()), functions))
