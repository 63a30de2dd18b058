"""AdamW on the tensors that this rank holds: what eager and FSDP2 share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rae_scale.config.schema import OptimConfig
from rae_scale.engines.optimizer import GroupKey, adamw, group_parameters, init_state
from rae_scale.engines.sharded import ShardedEngine
from rae_scale.engines.shards import Shard


class LocalEngine(ShardedEngine):
    """Optimizes flat views of the module's own parameter memory, so an update needs no copy back.

    With `offload_optimizer` the float32 weights that are optimized are copies in host memory, beside the moments and
    the moving average: a step brings the gradient there and the new weights back.

    A trainable parameter that got no gradient in a step is left alone in that step, as torch's optimizers do.
    """

    def _attach(self, optim: OptimConfig, module: nn.Module, group_of: Callable[[str], str]) -> None:
        """Describe `module`, whose parameters are in their final place, and build the optimizer over it."""
        groups = group_parameters(module, group_of, optim, self.placements)
        key_of = {name: key for key, members in groups.items() for name, _ in members}
        self.module = module
        self.shards = []
        self._computed_with: dict[str, Tensor] = {}
        self._trainable: dict[GroupKey, list[tuple[nn.Parameter, Shard]]] = {key: [] for key in groups}
        for name, parameter in module.named_parameters():
            key = key_of.get(name)
            shard = self._shard(name, parameter, key.name if key else None)
            if self._offloads and key is not None:
                self._computed_with[name] = shard.weight
                shard.tensors["weight"] = in_host_memory(shard.weight)
            self.shards.append(shard)
            if key is not None and shard.start < shard.stop:
                self._trainable[key].append((parameter, shard))
        self.optimizer = adamw(
            {key: [shard.weight for _, shard in members] for key, members in self._trainable.items()}, optim
        )
        for _, shard in self._members():
            init_state(self.optimizer, shard.weight)
            shard.tensors["exp_avg"] = self.optimizer.state[shard.weight]["exp_avg"]
            shard.tensors["exp_avg_sq"] = self.optimizer.state[shard.weight]["exp_avg_sq"]
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

    def _update(self) -> None:
        for members in self._flat_gradients.values():
            for shard, gradient in members:
                shard.weight.grad = in_host_memory(gradient) if self._offloads else gradient
        self.optimizer.step()
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
        for parameter, shard in self._members():
            parameter.grad = None
            shard.weight.grad = None


def in_host_memory(tensor: Tensor) -> Tensor:
    """A copy of `tensor`, page-locked if it comes from a GPU: only that can be copied beside the computation."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach())
