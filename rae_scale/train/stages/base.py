"""What the training loop needs of a stage: a module, what normalises its losses, and its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from rae_scale.data.collate import Batch
from rae_scale.train.meters import Value

Totals = Mapping[str, float]
"""What `Stage.counts` returns, summed over the micro-batches and ranks of one global step."""


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro-batch.

    loss:       [], this rank's share of the global loss: shares add up over micro-batches and ranks, so no mean of
                means can creep in and the gradient does not depend on the layout.
    per_sample: [B], detached, to name the samples whose loss is not finite.
    sums:       metric name -> (sum, count); the logged value is the global sum over the global count. Every rank
                returns the same names in every micro-batch.
    """

    loss: Tensor
    per_sample: Tensor
    sums: Mapping[str, tuple[Value, Value]] = field(default_factory=dict)


class Stage(Protocol):
    """One training objective. `prepare` runs without gradients, `loss` calls the engine's wrapped `module`."""

    module: nn.Module

    def group_of(self, parameter_name: str) -> str:
        """The optimiser group of a parameter of `module`."""
        ...

    def counts(self, batch: Batch) -> dict[str, float]:
        """Local sums that normalise the losses: numbers of labelled tokens, of answer images."""
        ...

    def prepare(self, batch: Batch, step: int) -> Any:
        """Everything that needs no gradient: frozen encoders, noise. `step` (0 is the first) keys the noise."""
        ...

    def loss(self, module: nn.Module, inputs: Any, totals: Totals) -> LossOutput: ...

    def flops(self, batch: Batch) -> float:
        """Model FLOPs of training on this micro-batch (`rae_scale/models/flops.py`)."""
        ...
