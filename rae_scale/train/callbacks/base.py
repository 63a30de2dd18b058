"""Events of a training run, in the order in which they happen. What is optional about training is a callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from rae_scale.train.loop import Run

Metrics = dict[str, float | int | None]
"""The scalars of one step; None where nothing was measured (the flow loss of a step without answer images)."""


class Callback:
    """Override the events of interest. Callbacks run in the order in which the run lists them.

    `main_only` callbacks exist on the main rank alone and must not communicate; the others run on every rank.
    """

    main_only: bool = True

    def on_train_start(self, run: Run) -> None:
        """Before the first step, after a resume; `run.step` steps are done."""

    def on_step_start(self, run: Run) -> None:
        """Before a global step takes its data; `run.step` steps are done. A rollback happens here."""

    def on_skip(self, run: Run, entry: dict[str, Any]) -> None:
        """The step under way changed nothing: its line for `skipped.jsonl`. Main rank only."""

    def on_rollback(self, run: Run) -> None:
        """Training was put back to `run.step`; later steps will be done again, with other data."""

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        """After every global step, `run.step` now counts it. Skipped steps end too."""

    def on_samples(self, run: Run, images: Tensor, prompts: Sequence[str]) -> None:
        """Pictures [N, 3, S, S] in [0, 1] of `prompts` were sampled. Main rank only."""

    def on_train_end(self, run: Run) -> None:
        """After the last step, also when a signal ended the run early. Not after an error."""

    def close(self) -> None:
        """Release what is open. Always called once, after an error too."""
