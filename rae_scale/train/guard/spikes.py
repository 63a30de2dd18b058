"""Which steps are skipped although their loss is a number: those that stand out from the steps before them.

A spike is more than `fault.spike_factor` times the median of the last kept losses, or `fault.grad_spike_factor` times
that of the gradient norms. A median does not follow the spikes themselves, and only kept steps count.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from rae_scale.config.schema import FaultConfig

LEAST_KEPT = 16
"""Fewer kept steps than this say little about what is usual; a shorter window has to be full."""


class Spikes:
    """The recent past of a run. Its state belongs into checkpoints: a resumed run judges as the one before did.

    Every rank is told the same numbers, so every rank has the same limits.
    """

    def __init__(self, cfg: FaultConfig) -> None:
        self.factors = {"loss": cfg.spike_factor, "grad_norm": cfg.grad_spike_factor}
        self.kept: dict[str, deque[float]] = {name: deque(maxlen=cfg.spike_window) for name in self.factors}
        self.least = min(LEAST_KEPT, cfg.spike_window)
        self.skips_in_row = 0

    def watches(self, name: str) -> bool:
        """Whether there is a factor for "loss" or "grad_norm"."""
        return self.factors[name] > 0

    def limit(self, name: str) -> float:
        """What the "loss" or the "grad_norm" of the next step must not exceed; inf if anything goes."""
        values = self.kept[name]
        if not self.watches(name) or len(values) < self.least:
            return math.inf
        return self.factors[name] * median(values)

    def keep(self, loss: float, grad_norm: float) -> None:
        """A step was made."""
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if self.watches(name):
                self.kept[name].append(value)
        self.skips_in_row = 0

    def skip(self) -> None:
        """A step changed nothing, for whatever reason."""
        self.skips_in_row += 1

    def state(self) -> dict[str, Any]:
        """JSON-able; floats survive it bit by bit."""
        return {"skips_in_row": self.skips_in_row, **{name: list(values) for name, values in self.kept.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`; {} is that of a run which has not begun."""
        self.skips_in_row = state.get("skips_in_row", 0)
        for name, values in self.kept.items():
            values.clear()
            values.extend(state.get(name, []))
