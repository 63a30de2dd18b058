"""What the training loop and the checkpoints know of an engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from rae_scale.parallel.boxes import Box

Kind = Literal["weight", "exp_avg", "exp_avg_sq", "ema"]
"""What is known of a parameter: its float32 weight, AdamW's two moments, the moving average of the weight."""

Read = Callable[[Kind, str, Box], Tensor | None]
"""(kind, parameter name, box) -> float32 tensor of the box's shape; None: there is no such kind of this parameter."""


@dataclass(frozen=True)
class StepResult:
    """grad_norm, group_norms: before clipping, of the gradient summed over micro-steps and ranks.
    skipped: the norm was not finite or beyond the limit, so nothing was changed; the norms say what they were.
    """

    grad_norm: float
    group_norms: dict[str, float]
    skipped: bool


@dataclass(frozen=True)
class Piece:
    """A box of the logical tensor of `shape`.

    tensor: of the box's shape, sharing the engine's memory until the next step, not always contiguous; float32, but
            bfloat16 where an engine keeps a frozen parameter or the moments in that.
    """

    kind: Kind
    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor


@dataclass(frozen=True)
class Copy:
    """What this rank holds of a parameter and other ranks hold too, bit by bit the same after every step.

    part:   which elements; ranks with equal kind, name and part hold equal tensors.
    over:   axes of the mesh along which they do: "dp_replicate", "dp" (all of `Mesh.dp_group`) or "tp".
    tensor: the engine's memory, read only, until the next step.
    """

    kind: Kind
    name: str
    part: tuple[str | int, ...]
    over: tuple[str, ...]
    tensor: Tensor


class Engine(Protocol):
    """Owns a module's weights, gradients and optimizer state, split over processes in its own way.

    One step is: forward through `module` and `backward` for each micro-batch, then `step`, or `discard` to give up.
    All ranks call the same methods in the same order.
    """

    module: nn.Module
    """Call it for the forward pass. Its parameters are the engine's business: they may be shards, or absent."""

    shapes: Mapping[str, tuple[int, ...]]
    """Name and logical shape of every parameter, frozen ones included; equal on all ranks."""

    @property
    def optimizer_step(self) -> int:
        """How many updates were made. Skipped steps do not count."""
        ...

    def autocast(self) -> AbstractContextManager[None]:
        """The precision that forward runs in."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients. `loss` is this rank's share of the global sum: gradients are summed, not averaged, over
        micro-steps and data-parallel ranks. `last`: no further micro-step follows in this step."""
        ...

    def step(self, lrs: Mapping[str, float], norm_limit: float = math.inf) -> StepResult:
        """Clip to the global norm, update each group with its learning rate, update the moving average.

        Gradients whose norm is not finite or above `norm_limit` are discarded, on all ranks alike."""
        ...

    def discard(self) -> None:
        """Drop what was accumulated since the last step; parameters, moments and moving average stay bitwise."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """What this rank is to save: over all ranks, each element of each tensor exactly once."""
        ...

    def copies(self) -> Iterator[Copy]:
        """What this rank has in common with others; ranks that share an axis yield the same in the same order."""
        ...

    def load_pieces(self, read: Read, optimizer_step: int) -> None:
        """Replace the state. Where `read` returns None, moments start at 0 and the moving average at the weights.

        Raises:
            ValueError: `read` has no weight for a parameter.
        """
        ...

    def using_ema(self) -> AbstractContextManager[None]:
        """For evaluation without gradients: the weights are their moving average inside, and bitwise themselves after.

        Parts of `module` may be called by themselves inside, which sharded engines allow nowhere else. Without a
        moving average the weights stay what they are. Do not step, save or load inside.
        """
        ...

    def close(self) -> None:
        """Release what the engine made. Neither it nor its module can be used afterwards."""
        ...
