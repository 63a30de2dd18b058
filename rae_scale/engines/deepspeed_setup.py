"""Importing DeepSpeed so that it neither builds what we do not use nor talks about what it is doing."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from rae_scale.config.schema import EngineConfig
from rae_scale.parallel import Mesh
from rae_scale.parallel.mesh import group_over

NESTED_AUTOCAST = "torch.autocast is enabled outside DeepSpeed"


def import_deepspeed(device: torch.device) -> Any:
    """The deepspeed module, set up for `device` and for processes that no launcher started."""
    # Read at import, and only then. Without it DeepSpeed picks CUDA wherever it sees a GPU.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator().device_name()
    if accelerator != device.type:
        raise ValueError(
            f"DeepSpeed runs on {accelerator} (DS_ACCELERATOR={os.environ['DS_ACCELERATOR']!r}) but run.device is "
            f"{device.type}; unset DS_ACCELERATOR"
        )
    if device.type == "cpu":
        # On first use DeepSpeed compiles a shared-memory all-reduce (40 s, a C++ compiler, 69 MB per process left in
        # /dev/shm) that serves inference only. Its table of usable kernels is how it decides: in an empty one it
        # finds none.
        deepspeed.ops.__compatible_ops__ = {}
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    # The engine switches autocast on inside the module's forward, below DeepSpeed, which turns off ours around it.
    logger.addFilter(drop_nested_autocast)
    return deepspeed


def drop_nested_autocast(record: logging.LogRecord) -> bool:
    return NESTED_AUTOCAST not in record.getMessage()


def deepspeed_config(cfg: EngineConfig, device: torch.device, trainable: int) -> dict[str, Any]:
    """What DeepSpeed is asked for. Clipping, schedule and skipping are ours; its batch sizes are bookkeeping only."""
    zero: dict[str, Any] = {
        "stage": cfg.zero_stage,
        # Elements. DeepSpeed's 5e8 would reserve 2 GB for a model of any size.
        "reduce_bucket_size": min(trainable, 200_000_000),
    }
    if cfg.zero_hpz > 1:
        zero["zero_hpz_partition_size"] = cfg.zero_hpz
    if cfg.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**62,
        "zero_optimization": zero,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        # torch's fused AdamW also runs on a CPU; DeepSpeed's own would have to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
    }
    if cfg.precision == "bf16" and cfg.zero_stage == 3:
        config["bf16"] = {"enabled": True}
    return config


@contextlib.contextmanager
def hpz_group(size: int, mesh: Mesh) -> Iterator[dist.ProcessGroup | None]:
    """Hand DeepSpeed the ranks that share a second copy of the parameters: `size` neighbours in their data-parallel
    group; None for a size of 1.

    It takes them from a global of its own. Left to itself, it would make them of neighbours in the world, which with
    tensor parallelism hold parts of different tensors.
    """
    from deepspeed.utils import groups

    neighbours = None
    if size > 1:
        ranks = torch.arange(mesh.world_size).view(-1, size, mesh.tp)  # [blocks, neighbours, tp]
        neighbours = group_over(ranks.transpose(1, 2).flatten(0, 1))
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = neighbours
    try:
        yield neighbours
    finally:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
