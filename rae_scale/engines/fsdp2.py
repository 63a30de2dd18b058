"""torch's fully_shard: one communication unit per transformer block, the rest in the root's.

Precision bf16: weights, moments and their average are float32; what is gathered and computed with is bfloat16;
gradients are reduced in float32. Inputs are not cast, autocast does that where it is right (times stay float32).

Accumulation: gradients stay whole and local until the last micro-step and are reduced once, which saves a
reduce-scatter per micro-step and costs a whole float32 gradient per rank (4 bytes per trainable parameter) in between.
A step of one micro-batch does not pay that.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from rae_scale.config.schema import EngineConfig, OptimConfig
from rae_scale.engines.local import LocalEngine
from rae_scale.engines.shards import Shard
from rae_scale.parallel import Mesh, blocks_of, shutdown_distributed
from rae_scale.parallel.boxes import even_split
from rae_scale.parallel.mesh import one_process_group
from rae_scale.parallel.placement import Placement


class FSDP2Engine(LocalEngine):
    """Parameters are sharded over dp_shard (x sp) by rows, and copied over dp_replicate if that is more than 1."""

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
        self._made_process_group = one_process_group(mesh.device)
        self._fsdp_mesh = fsdp_mesh(mesh)
        shard_module(module, self._fsdp_mesh, cfg.precision)
        self._attach(optim, module, group_of)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.module.set_requires_gradient_sync(last)
        loss.backward()

    def discard(self) -> None:
        drop_unsharded_gradients(self.module)
        self._forget_gradients()

    def close(self) -> None:
        self._forget_gradients()
        if self._made_process_group:
            shutdown_distributed()

    @contextlib.contextmanager
    def using_ema(self) -> Iterator[None]:
        with super().using_ema():
            # Blocks gather themselves; what belongs to the root is gathered by the root's forward, which a call of a
            # part (`module.dit`) would pass by.
            self.module.unshard()
            try:
                yield
            finally:
                self.module.reshard()

    def _publish(self) -> None:
        super()._publish()
        # The root stays gathered after a forward; what it holds is older than the shards now.
        for unit in units_of(self.module):
            unit.reshard()

    def _copied_over(self, shard: Shard) -> tuple[str, ...]:
        replicas = ("dp_replicate",) if self._mesh.dp_replicate > 1 else ()
        return replicas + self._mesh.tp_if_whole(shard.placement)

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to_local()

    def _shard(self, name: str, parameter: nn.Parameter, group: str | None) -> Shard:
        row = math.prod(parameter.shape[1:])
        # fully_shard splits dimension 0 as torch.chunk does: equal parts, the last ones shorter or empty.
        rows = -(-parameter.shape[0] // self._fsdp_mesh.size(-1))
        start = min(self._fsdp_mesh.get_local_rank(-1) * rows, parameter.shape[0]) * row
        weight = self._local(parameter).view(-1)
        stop = start + weight.numel()
        owned = even_split(start, stop, *self._mesh.copy_of(self.placements[name]))
        return Shard(name, self.placements[name], start, stop, group, owned, {"weight": weight})


def fsdp_mesh(mesh: Mesh) -> DeviceMesh:
    """The mesh to shard over: one dimension, or (replicate, shard)."""
    if mesh.device_mesh is None:
        return init_device_mesh(mesh.device.type, (1,), mesh_dim_names=("shard",))
    return mesh.device_mesh["replicate", "shard"] if mesh.dp_replicate > 1 else mesh.device_mesh["shard"]


def shard_module(module: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Apply fully_shard to every block and to the root, with gradients summed over all ranks."""
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # This also moves each unit to the device of the mesh, one at a time, so a model need not fit there whole.
    for unit in [*blocks_of(module), module]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for unit in units_of(module):
        # A plain sum, where the default is an average. gloo has no scaled sum, hence the second call.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    if not next(module.parameters()).is_meta:
        # Decides now which module is the root. Left to the first forward, a part called by itself would become one.
        module._get_fsdp_state()._lazy_init()


def units_of(module: nn.Module) -> list[FSDPModule]:
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]


def drop_unsharded_gradients(module: nn.Module) -> None:
    """Forget the gradients of micro-steps that were not reduced yet, and a forward that got no backward."""
    if hasattr(module, "reset_iter_state"):
        module.reset_iter_state()
        return
    # torch < 2.15 has no public way to them.
    for unit in units_of(module):
        group = unit._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params if group else ():
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
        unit.reshard()
