"""DeepSpeed ZeRO, stages 1 to 3. DeepSpeed shards, gathers and reduces; everything that decides is ours.

Precision bf16 means autocast in every stage, with float32 weights, moments and gradient reduction. Stages 1 and 2 keep
the whole model in float32 on each rank. Stage 3 keeps and gathers bfloat16 parts beside the float32 ones that AdamW
updates, which halves what it sends; frozen parameters then exist in bfloat16 only.

Accumulation: stage 1 reduces once per step, stages 2 and 3 in every micro-step, since they keep no whole gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rae_scale.config.schema import EngineConfig, OptimConfig
from rae_scale.engines.base import Copy, Read
from rae_scale.engines.deepspeed_setup import deepspeed_config, hpz_group, import_deepspeed
from rae_scale.engines.gradients import scale
from rae_scale.engines.optimizer import GroupKey, adamw, group_parameters, set_learning_rates, set_step
from rae_scale.engines.sharded import ShardedEngine
from rae_scale.engines.shards import Shard, update_ema
from rae_scale.engines.zero_layout import describe, gradients_of
from rae_scale.parallel.mesh import Mesh, one_process_group
from rae_scale.parallel.mpu import MpuView
from rae_scale.parallel.placement import Placement


class ZeroEngine(ShardedEngine):
    """DeepSpeed's engine under our protocol."""

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
        self.stage = cfg.zero_stage
        self._functional_linear = nn.functional.linear
        self._made_process_group = one_process_group(mesh.device)
        self._deepspeed = import_deepspeed(mesh.device)
        mpu = MpuView(mesh)
        self._group = mpu.get_data_parallel_group()

        groups = group_parameters(module, group_of, optim, placements)
        named = dict(module.named_parameters())
        rounded = cfg.precision == "bf16" and self.stage == 3
        initial = {name: parameter.detach() for name, parameter in named.items()} if rounded else {}
        # DeepSpeed turns autocast off around the module unless it manages it, and then reduces gradients in bfloat16.
        module.forward = functools.partial(self._forward, module.forward)
        trainable = sum(parameter.numel() for members in groups.values() for _, parameter in members)
        config = deepspeed_config(cfg, mesh.device, trainable)
        with hpz_group(cfg.zero_hpz, mesh) as neighbours:
            if self.stage == 3:
                self._partition(module, config, mpu, neighbours, torch.bfloat16 if rounded else torch.float32)
            self.module, *_ = self._deepspeed.initialize(
                model=module,
                optimizer=adamw({key: [p for _, p in members] for key, members in groups.items()}, optim),
                config=config,
                mpu=mpu,
            )
        self._zero = self.module.optimizer
        self.optimizer = self._zero.optimizer
        self.shards = describe(self._zero, self.stage, named, self._group, placements, mesh)
        self._named = named
        if rounded:
            self._set_masters(initial)
        self._ready()

    def _partition(
        self,
        module: nn.Module,
        config: dict[str, Any],
        mpu: MpuView,
        neighbours: dist.ProcessGroup | None,
        dtype: torch.dtype,
    ) -> None:
        """Bring the module to the device as stage 3 holds it. DeepSpeed would first move it there whole: a model that
        needs sharding does not fit."""
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        self._deepspeed.zero.Init(
            module=module,
            data_parallel_group=self._group,
            dtype=dtype,
            config_dict_or_path=config,
            mpu=mpu,
            zero_param_parallel_group=neighbours,
        )
        for name, buffer in list(module.named_buffers()):
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, buffer.to(self.device))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over the ranks; ours is a sum.
        self.module.backward(loss * dist.get_world_size(self._group))

    def discard(self) -> None:
        self._zero.zero_grad()
        self._forget_reduced()

    def close(self) -> None:
        self.module.destroy()
        # Stage 3 replaces it for the whole process, by one that keeps no gathered weight for backward.
        nn.functional.linear = self._functional_linear
        if self._made_process_group:
            self._deepspeed.comm.destroy_process_group()

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.autocast():
            return forward(*args, **kwargs)

    @torch.no_grad()
    def _set_masters(self, initial: dict[str, Tensor]) -> None:
        """Start from the module's float32 weights, not from their bfloat16 roundings."""
        for shard in self.shards:
            if shard.group is not None:
                shard.weight.copy_(initial[shard.name].view(-1)[shard.start : shard.stop])

    def _gradients(self) -> dict[GroupKey, list[Tensor]]:
        return gradients_of(self._zero, self.stage)

    def _update(self, lrs: Mapping[str, float], factor: float) -> None:
        scale(self._gradients(), factor)
        set_learning_rates(self.optimizer, lrs)
        self.module.step()
        self._forget_reduced()
        if self.ema_decay is not None:
            update_ema(self.shards, self.ema_decay)

    def _copied_over(self, shard: Shard) -> tuple[str, ...]:
        # Partitions are of all data-parallel ranks, replicas included; frozen parameters only in stage 3.
        whole = shard.group is None and self.stage < 3 and self._mesh.dp_world * self._mesh.sp > 1
        return (("dp",) if whole else ()) + self._mesh.tp_if_whole(shard.placement)

    def copies(self) -> Iterator[Copy]:
        yield from super().copies()
        if self.stage == 3 or self._mesh.dp_world * self._mesh.sp == 1:
            return
        # What stages 1 and 2 compute with: gathered from the partitions in each step, whole on every rank.
        for name, parameter in self._named.items():
            placement = self.placements[name]
            if parameter.requires_grad:
                part = ("gathered", placement.index if placement.is_split else 0)
                yield Copy("weight", name, part, ("dp", *self._mesh.tp_if_whole(placement)), parameter.detach())

    def load_pieces(self, read: Read, optimizer_step: int) -> None:
        super().load_pieces(read, optimizer_step)
        set_step(self.optimizer, optimizer_step)

    def _forget_reduced(self) -> None:
        zero = self._zero
        if self.stage == 3:
            zero.averaged_gradients = {}
            # A parameter that gets no gradient in the next step would be updated with this step's otherwise.
            zero.grad_partitions_flat_buffer.zero_()
            if self._offloads:
                for partition in zero.fp32_partitioned_groups_flat:
                    partition.grad.zero_()
            return
        for index in zero.averaged_gradients:
            zero.averaged_gradients[index] = None
            zero.all_grad_tensors[index] = None

    def _publish(self) -> None:
        zero = self._zero
        if self.stage < 3:
            zero.update_lp_params()
            return
        # Small parameters stay gathered between steps: let go of what is old, the next forward gathers it anew.
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
