"""What a training step takes of a GPU's memory, phase by phase, before it runs.

Model states come from `train.layout_sizes`, activations from a trace (`trace.py`), and what an engine holds for a while
from `engine_memory.py`. All of it is what tensors take: not in it are the context of CUDA and the buffers of NCCL, nor
the gaps between tensors; a margin stands for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rae_scale.config import Config
from rae_scale.plan.encoder_memory import frozen_encoder
from rae_scale.plan.engine_memory import Account, Step, engine_account
from rae_scale.plan.parts import States, states_of, units_of, whole_parameters
from rae_scale.plan.samples import LABELLED_TOKENS, usual_samples
from rae_scale.plan.trace import Kernels, key_of, trace
from rae_scale.plan.unroll import unroll

GAPS = 0.05
"""Of what tensors take: what PyTorch's caching allocator leaves unused between them."""
RUNTIME = 1_500_000_000
"""Bytes of a GPU that are no tensors: CUDA's context and kernels, NCCL's buffers, cuBLAS's workspaces."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the rank that holds most.

    phases: what a step takes at the worst moment of each phase, by component.
    margin: on top of the peak, for what is no tensor and for the gaps between them: an assumption, not a measurement.
    host:   of main memory per rank, beside the program's own.
    """

    phases: dict[str, dict[str, int]]
    margin: int
    host: dict[str, int]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """Of tensors, without the margin."""
        return sum(self.phases[self.peak_phase].values())


def plan_memory(
    config: Config,
    *,
    micro_batch: int,
    text_tokens: float | None = None,
    labelled_tokens: float = LABELLED_TOKENS,
    kernels: Kernels = "auto",
) -> MemoryPlan:
    """Plan `config` with `micro_batch` samples per rank and forward pass.

    text_tokens, labelled_tokens: of a sample, image slots included; None takes `usual_samples`.
    kernels: auto, our operators; reference, plain PyTorch. With `run.device=cpu` the operators are the formulas that
        stand in for kernels there.
        A compiled block is taken to keep what a block of our operators keeps, and `engine.fp8` to change nothing: its
        8-bit copies are gone when a product is done.

    Raises:
        ValueError: the model cannot be laid out over these ranks, or settings name no model.
    """
    tokens = math.ceil(usual_samples(config).tokens if text_tokens is None else text_tokens)
    key = key_of(config, micro_batch, tokens, math.ceil(labelled_tokens), kernels)
    traced = trace(key)
    local = config.data.global_batch_size // (config.parallel.dp_replicate * config.parallel.dp_shard)
    step = Step(
        config,
        units_of(config.stage, config.model, config.parallel.tp),
        traced.stacks,
        unroll(traced),
        accumulates=micro_batch < local,
        whole=whole_parameters(config),
    )
    states, host = placed(config, states_of(config))
    weights, running = frozen_encoder(config, micro_batch)
    account = Account(states, weights, running)
    engine_account(step, account)
    return MemoryPlan(account.phases, int(GAPS * account.peak) + RUNTIME, host)


def placed(config: Config, states: States) -> tuple[States, dict[str, int]]:
    """What stays on the GPU, and what is in host memory: with `engine.offload_optimizer` the float32 weights that AdamW
    updates, its moments, the moving average and a copy of the gradients; and the copies of a checkpoint that is being
    written, which hold on to no more than `run.save_buffer_gb`.
    """
    engine = config.engine
    saved = (states.masters + states.optimizer + states.ema) // config.parallel.dp_replicate
    host = {"checkpoint": min(saved, int(config.run.save_buffer_gb * 1e9))}
    if not engine.offload_optimizer:
        return states, host
    host |= {
        "weights": states.masters,
        "gradients": states.part,
        "optimizer": states.optimizer,
        "ema": states.ema,
    }
    # FSDP2 keeps float32 weights to gather from, beside those that are updated.
    weights = states.weights if engine.name == "fsdp2" else states.weights - states.masters
    return replace(states, weights=weights, optimizer=0, ema=0), host
