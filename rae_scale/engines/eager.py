"""One process and the plain module: the reference that the sharded engines are held to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from rae_scale.config.schema import EngineConfig, OptimConfig
from rae_scale.engines.local import LocalEngine
from rae_scale.engines.shards import Shard
from rae_scale.parallel import Mesh
from rae_scale.parallel.placement import Placement


class EagerEngine(LocalEngine):
    """float32 weights; bf16 precision is autocast over them."""

    def __init__(
        self,
        cfg: EngineConfig,
        optim: OptimConfig,
        module: nn.Module,
        group_of: Callable[[str], str],
        placements: Mapping[str, Placement],
        mesh: Mesh,
    ) -> None:
        super().__init__(cfg, optim, placements, mesh)
        self._attach(optim, module.to(mesh.device), group_of)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def discard(self) -> None:
        self._forget_gradients()

    def close(self) -> None:
        self._forget_gradients()

    def _copied_over(self, shard: Shard) -> tuple[str, ...]:
        return ()

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor

    def _shard(self, name: str, parameter: nn.Parameter, group: str | None) -> Shard:
        numel = parameter.numel()
        weight = parameter.detach().view(-1)
        return Shard(name, self.placements[name], 0, numel, group, (0, numel), {"weight": weight})
