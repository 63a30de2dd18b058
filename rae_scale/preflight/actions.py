"""What a rank does when rank 0 orders it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rae_scale.config import Config
from rae_scale.parallel import init_distributed, shutdown_distributed
from rae_scale.parallel.mesh import choose_device
from rae_scale.parallel.same import code_files, settings_of
from rae_scale.preflight.board import Board
from rae_scale.preflight.clock import Clock, answer, ask
from rae_scale.preflight.crew import END, Action
from rae_scale.preflight.facts import Facts, gather_facts
from rae_scale.preflight.files import MARK
from rae_scale.preflight.measure import Computed, Reduced, compute, exchange_pairs, reduce
from rae_scale.preflight.place import Place, Roster

FACTS_SECONDS, SHORT_SECONDS, CLOCK_SECONDS = 120.0, 30.0, 60.0
GROUP_SECONDS, MEASURE_SECONDS, PAIRS_SECONDS = 180.0, 120.0, 300.0
FRESH_SECONDS = 10.0
"""A file server may show a new file to other machines only when what they remember of its folder is that old."""
RETRY = 0.2


class Actions:
    """One method per order. store: the process group's ranks find each other through it; None for one rank.

    clock: this machine's, seconds since 1970.
    """

    def __init__(
        self,
        config: Config,
        place: Place,
        roster: Roster,
        selection: set[str],
        store: dist.Store | None,
        clock: Clock = time.time,
    ) -> None:
        self.config, self.place, self.roster, self.selection = config, place, roster, selection
        self._store, self._clock = store, clock
        self._leads = place.rank in roster.leaders
        self._device: torch.device | None = None

    def table(self) -> dict[str, Action]:
        return {
            "facts": self.facts,
            "details": self.details,
            "mark": self.mark,
            "clock": self.clock,
            "group": self.group,
            "compute": self.compute,
            "reduce": self.reduce,
            "pairs": self.pairs,
            END: self.leave,
        }

    def facts(self, _: None) -> Facts:
        hosts = sorted({place.host for place in self.roster.places.values()})
        return gather_facts(self.config, self.place, self._leads, hosts, self.selection)

    def details(self, ranks: Sequence[int]) -> tuple[Mapping[str, str], Mapping[str, str]] | None:
        """Settings and hashes of source files, of `ranks` only."""
        return (settings_of(self.config), code_files()) if self.place.rank in ranks else None

    def mark(self, name: str) -> str | None:
        """Rank 0 has put a file `name` into run.dir: why this machine does not see it; empty if it does."""
        if not self._leads:
            return None
        path = Path(self.config.run.dir) / f"{MARK}{name}"
        deadline = time.monotonic() + FRESH_SECONDS
        while time.monotonic() < deadline:
            try:
                # Listing a folder makes a client ask the server anew.
                os.listdir(path.parent)
                return "" if path.read_text() == name else "its file holds something else"
            except OSError:
                time.sleep(RETRY)
        return "a file that rank 0 wrote is not there"

    def clock(self, leaders: Sequence[int]) -> Any:
        """On rank 0 the offsets of the clocks of `leaders`, which the others help to measure."""
        board = self.board()
        if self.place.rank == 0:
            return ask(board, leaders, self._clock)
        if self.place.rank in leaders:
            answer(board, self.place.rank, CLOCK_SECONDS, self._clock)
        return None

    def board(self) -> Board:
        assert self._store is not None, "there is one rank"
        return Board(self._store)

    def group(self, _: None) -> None:
        """Make the process group of all ranks."""
        assert self._store is not None, "there is one rank"
        # Longer than anything in here waits, which then can say what for.
        self._device = init_distributed(
            self.config.parallel,
            self.config.run.device,
            timeout_s=GROUP_SECONDS + PAIRS_SECONDS,
            store=dist.PrefixStore("group", self._store),
        )
        dist.barrier()

    def device(self) -> torch.device:
        """This process's; orders run in threads, each of which starts with the first GPU."""
        device = self._device or choose_device(self.config.run.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device

    def compute(self, _: None) -> Computed:
        return compute(self.device())

    def reduce(self, _: None) -> Reduced:
        return reduce(self.device())

    def pairs(self, rounds: Sequence[Sequence[tuple[int, int]]]) -> Mapping[str, float]:
        return exchange_pairs(self.device(), rounds)

    def leave(self, success: bool) -> None:
        """Destroying a group waits for work in it that may never end; after a failure the process just ends."""
        if success:
            shutdown_distributed()
