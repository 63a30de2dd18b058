"""AdamW on the tensors that this rank holds: what eager and FSDP2 share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from rae_scale.config.schema import OptimConfig
from rae_scale.engines.gradients import scale
from rae_scale.engines.optimizer import GroupKey, group_parameters
from rae_scale.engines.sharded import ShardedEngine
from rae_scale.engines.shards import MOMENTS, Shard, update_ema
from rae_scale.ops import adamw_ema_


class LocalEngine(ShardedEngine):
    """Optimizes flat views of the module's own parameter memory, so an update needs no copy back. On a GPU clipping,
    AdamW and the moving average are one pass over the memory of an optimizer group.

    With `offload_optimizer` the float32 weights that are optimized are copies in host memory, beside the moments and
    the moving average: a step brings the gradient there and the new weights back.

    A trainable parameter that got no gradient in a step is left alone in that step, as torch's optimizers do.
    """

    def _attach(self, optim: OptimConfig, module: nn.Module, group_of: Callable[[str], str]) -> None:
        """Describe `module`, whose parameters are in their final place, and build the optimizer over it."""
        groups = group_parameters(module, group_of, optim, self.placements)
        self._settings = optim.groups
        moments = torch.bfloat16 if optim.moments == "bf16" else torch.float32
        key_of = {name: key for key, members in groups.items() for name, _ in members}
        self.module = module
        self.shards = []
        self._computed_with: dict[str, Tensor] = {}
        self._trainable: dict[GroupKey, list[tuple[nn.Parameter, Shard]]] = {key: [] for key in groups}
        self._numbers: dict[str, int] = {}
        for number, (name, parameter) in enumerate(module.named_parameters()):
            self._numbers[name] = number
            key = key_of.get(name)
            shard = self._shard(name, parameter, key.name if key else None)
            if self._offloads and key is not None:
                self._computed_with[name] = shard.weight
                shard.tensors["weight"] = in_host_memory(shard.weight)
            self.shards.append(shard)
            if key is not None and shard.start < shard.stop:
                self._trainable[key].append((parameter, shard))
        for _, shard in self._members():
            for kind in MOMENTS:
                shard.tensors[kind] = torch.zeros_like(shard.weight, dtype=moments)
        self._ready()

    @abstractmethod
    def _shard(self, name: str, parameter: nn.Parameter, group: str | None) -> Shard:
        """The range of `parameter` that this rank holds."""

    @abstractmethod
    def _local(self, tensor: Tensor) -> Tensor:
        """The memory of a parameter or gradient on this rank."""

    def _members(self) -> Iterator[tuple[nn.Parameter, Shard]]:
        for members in self._trainable.values():
            yield from members

    def _gradients(self) -> dict[GroupKey, list[Tensor]]:
        self._flat_gradients = {
            key: [(shard, self._local(p.grad).reshape(-1)) for p, shard in members if p.grad is not None]
            for key, members in self._trainable.items()
        }
        return {key: [gradient for _, gradient in members] for key, members in self._flat_gradients.items()}

    def _update(self, lrs: Mapping[str, float], factor: float) -> None:
        if self._offloads:  # where the gradients are, it is cheaper than in host memory
            scale(self._gradients(), factor)
            factor = 1.0
        updated = set()
        for key, members in self._flat_gradients.items():
            shards = [shard for shard, _ in members]
            updated |= {shard.name for shard in shards}
            settings = self._settings[key.name]
            adamw_ema_(
                [shard.weight for shard in shards],
                [in_host_memory(gradient) if self._offloads else gradient for _, gradient in members],
                [shard.tensors["exp_avg"] for shard in shards],
                [shard.tensors["exp_avg_sq"] for shard in shards],
                [shard.tensors["ema"] for shard in shards if "ema" in shard.tensors],
                lr=lrs[key.name],
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
                step=self._optimizer_step + 1,
                clip_factor=factor,
                ema_decay=self.ema_decay or 0.0,
                # Moments are rounded alike wherever an element lies, so copies of a parameter stay equal.
                parameters=[self._numbers[shard.name] for shard in shards],
                first_elements=[shard.start for shard in shards],
            )
        if self.ema_decay is not None:
            update_ema([shard for shard in self.shards if shard.name not in updated], self.ema_decay)
        self._forget_gradients()
        self._copy_back()

    def _publish(self) -> None:
        self._copy_back()

    @torch.no_grad()
    def _copy_back(self) -> None:
        """The weights that are optimized, to where the module computes with them."""
        for _, shard in self._members():
            if self._offloads:
                self._computed_with[shard.name].copy_(shard.weight, non_blocking=True)

    def _forget_gradients(self) -> None:
        self._flat_gradients = {}
        for parameter, _ in self._members():
            parameter.grad = None


def in_host_memory(tensor: Tensor) -> Tensor:
    """A copy of `tensor`, page-locked if it comes from a GPU: only that can be copied beside the computation."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach())
