"""AdamW on the tensors that this rank holds: what eager and FSDP2 share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from rae_scale.config.schema import OptimConfig
from rae_scale.engines.optimizer import adamw, group_parameters, init_state
from rae_scale.engines.sharded import ShardedEngine
from rae_scale.engines.shards import Shard


class LocalEngine(ShardedEngine):
    """Optimizes flat views of the module's own parameter memory, so an update needs no copy back.

    A trainable parameter that got no gradient in a step is left alone in that step, as torch's optimizers do.
    """

    def _attach(self, optim: OptimConfig, module: nn.Module, group_of: Callable[[str], str]) -> None:
        """Describe `module`, whose parameters are in their final place, and build the optimizer over it."""
        groups = group_parameters(module, group_of, optim)
        group_of_name = {name: group for group, members in groups.items() for name, _ in members}
        self.module = module
        self.shards = []
        self._trainable: dict[str, list[tuple[nn.Parameter, Shard]]] = {group: [] for group in groups}
        for name, parameter in module.named_parameters():
            shard = self._shard(name, parameter, group_of_name.get(name))
            self.shards.append(shard)
            if shard.group is not None and shard.start < shard.stop:
                self._trainable[shard.group].append((parameter, shard))
        self.optimizer = adamw(
            {group: [shard.weight for _, shard in members] for group, members in self._trainable.items()}, optim
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

    def _gradients(self) -> dict[str, list[Tensor]]:
        for parameter, shard in self._members():
            if parameter.grad is not None:
                shard.weight.grad = self._local(parameter.grad).reshape(-1)
        return {
            group: [shard.weight.grad for _, shard in members if shard.weight.grad is not None]
            for group, members in self._trainable.items()
        }

    def _update(self) -> None:
        self.optimizer.step()
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for parameter, shard in self._members():
            parameter.grad = None
            shard.weight.grad = None
