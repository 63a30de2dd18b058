"""What all engines do alike once their layout is described as shards."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from rae_scale.config.schema import EngineConfig, OptimConfig
from rae_scale.engines.base import Copy, Piece, Read, StepResult
from rae_scale.engines.gradients import clip_factor, group_norms, total_norm
from rae_scale.engines.optimizer import GroupKey
from rae_scale.engines.shards import Shard, add_ema, exchange_ema
from rae_scale.parallel import Mesh
from rae_scale.parallel.placement import Placement


class ShardedEngine(ABC):
    """The `Engine` protocol over `shards`. A subclass sets `module` and `shards`, then calls `_ready`."""

    module: nn.Module
    shards: list[Shard]

    def __init__(self, cfg: EngineConfig, optim: OptimConfig, placements: Mapping[str, Placement], mesh: Mesh) -> None:
        self.device = mesh.device
        self.precision = cfg.precision
        self.max_grad_norm = optim.max_grad_norm
        self.ema_decay = optim.ema_decay
        self.placements = placements
        self.shapes: Mapping[str, tuple[int, ...]] = {name: place.shape for name, place in placements.items()}
        self._mesh = mesh
        self._offloads = cfg.offload_optimizer
        self._optimizer_step = 0

    def _ready(self) -> None:
        if self.ema_decay is not None:
            add_ema(self.shards)

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    @abstractmethod
    def discard(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def _gradients(self) -> dict[GroupKey, list[Tensor]]:
        """This rank's parts of the accumulated gradient by parameter group, in the memory that `_update` reads."""

    @abstractmethod
    def _update(self, lrs: Mapping[str, float], factor: float) -> None:
        """One optimizer step with `factor` times the gradients, which are gone afterwards, and one of the moving
        average; the module computes with the new weights."""

    @abstractmethod
    def _publish(self) -> None:
        """Let the module compute with what was written into the shards."""

    @abstractmethod
    def _copied_over(self, shard: Shard) -> tuple[str, ...]:
        """The axes of the mesh along which ranks hold the same elements as this `shard`."""

    @property
    def optimizer_step(self) -> int:
        return self._optimizer_step

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def step(self, lrs: Mapping[str, float], norm_limit: float = math.inf) -> StepResult:
        gradients = self._gradients()
        norms = group_norms(gradients, self._mesh)
        norm = total_norm(norms)
        if not math.isfinite(norm) or norm > norm_limit:
            self.discard()
            return StepResult(norm, norms, skipped=True)
        self._update(lrs, clip_factor(norm, self.max_grad_norm))
        self._optimizer_step += 1
        return StepResult(norm, norms, skipped=False)

    def pieces(self) -> Iterator[Piece]:
        for shard in self.shards:
            yield from shard.pieces()

    def copies(self) -> Iterator[Copy]:
        for shard in self.shards:
            over = self._copied_over(shard)
            part = (shard.placement.index if shard.placement.is_split else 0, shard.start, shard.stop)
            for kind, tensor in shard.tensors.items() if over else ():
                yield Copy(kind, shard.name, part, over, tensor)

    @torch.no_grad()
    def load_pieces(self, read: Read, optimizer_step: int) -> None:
        for shard in self.shards:
            for kind in shard.tensors:
                for box, view in shard.views(kind):
                    found = read(kind, shard.name, box)
                    if found is None and kind == "ema":
                        found = read("weight", shard.name, box)
                    if found is not None:
                        view.copy_(found)
                    elif kind == "weight":
                        raise ValueError(
                            f"there is no weight for parameter {shard.name}: load a checkpoint of this model"
                        )
                    else:
                        view.zero_()
        self._optimizer_step = optimizer_step
        self.discard()
        self._publish()

    @contextlib.contextmanager
    def using_ema(self) -> Iterator[None]:
        self._exchange_ema()
        try:
            yield
        finally:
            self._exchange_ema()

    def _exchange_ema(self) -> None:
        if self.ema_decay is not None:
            exchange_ema(self.shards)
            self._publish()
