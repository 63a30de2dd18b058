"""Activation memory of a training step, block by block, told by the operators of a model of few blocks without values.

The real passes make the model parallel and checkpoint it, the real stage computes its loss, and hollow tensors
(`hollow.py`) and torch's fake process group stand in for memory and for the other processes. Blocks of a stack are
alike: what the second of them does in forward, and the first in backward, each further one does.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rae_scale import ops
from rae_scale.config import Config
from rae_scale.config.schema import FlowConfig, LossConfig, ModelConfig, ParallelConfig
from rae_scale.data.collate import Batch
from rae_scale.models.packed_llm import packed_attention
from rae_scale.models.packing import TextLayout
from rae_scale.parallel import apply_activation_checkpointing, parallelize
from rae_scale.parallel.fake import fake_ranks
from rae_scale.plan.encoders import EncoderShape, encoder_shape
from rae_scale.plan.hollow import Hollow, NoValues
from rae_scale.plan.kept import kept
from rae_scale.plan.skeleton import planned_module
from rae_scale.plan.timeline import Interval, Timeline, mark_boundaries
from rae_scale.train.parts import GENERATION_STAGES
from rae_scale.train.stages import DecoderStage, EncoderStage, GenerationStage, Stage

Kernels = Literal["auto", "reference"]
BLOCKS = 2
"""Of each stack are traced."""
STACKS = {
    "conditioner.llm.model.layers": "language model",
    "dit.blocks": "DiT",
    "dit.head.blocks": "DDT head",
    "text.blocks": "text tower",
    "vision.blocks": "encoder",
    "blocks": "decoder",
}


@dataclass(frozen=True)
class Key:
    """All that a rank's activations depend on.

    gathers: parameters are handed to the layers in the type that they are gathered in, not in float32.
    on_cpu:  our operators are the formulas that stand in for kernels, and attention is the CPU's.
    tokens, labelled: of a sample's text, image slots included.
    """

    stage: Any
    model: ModelConfig
    tp: int
    sp: int
    bf16: bool
    gathers: bool
    checkpointing: str
    saved_ops: tuple[tuple[Any, int], ...]
    kernels: Kernels
    on_cpu: bool
    micro_batch: int
    tokens: int
    labelled: int


def key_of(config: Config, micro_batch: int, tokens: int, labelled: int, kernels: Kernels) -> Key:
    engine, parallel = config.engine, config.parallel
    return Key(
        stage=config.stage,
        model=config.model,
        tp=parallel.tp,
        sp=parallel.sp,
        bf16=engine.precision == "bf16",
        gathers=engine.name == "fsdp2" or (engine.name == "zero" and engine.zero_stage == 3),
        checkpointing=engine.activation_checkpointing,
        saved_ops=tuple(sorted(engine.saved_ops.items())),
        kernels=kernels,
        on_cpu=config.run.device == "cpu",
        micro_batch=micro_batch,
        tokens=tokens,
        labelled=labelled,
    )


@dataclass(frozen=True)
class Trace:
    """intervals: of a step of the model of few blocks, in order. stacks: blocks of each stack in the real model."""

    intervals: tuple[Interval, ...]
    stacks: Mapping[str, int]


@cache
def trace(key: Key) -> Trace:
    """`make_trace`, or what it gave an earlier process."""
    return kept(make_trace, key, Trace)


def make_trace(key: Key) -> Trace:
    """Run a step of the model of few blocks, without values."""
    few, depths = few_blocks(key.stage, key.model)
    with fake_ranks(ParallelConfig(sp=key.sp, tp=key.tp), 0) as mesh, ops.use(key.kernels):
        module = copy.deepcopy(few)
        if not key.on_cpu:
            use_gpu_attention(module)
        parallelize(module, mesh)
        apply_activation_checkpointing(module, key.checkpointing, dict(key.saved_ops))
        stacks = {name: module.get_submodule(path) for path, name in STACKS.items() if name in depths}
        if key.gathers and key.bf16:
            module.to(torch.bfloat16)
        without_values(module)
        timeline = Timeline(module, opens=key.on_cpu)
        mark_boundaries(timeline, stacks)
        with timeline.recording(), NoValues():
            step(key, module, timeline)
    return Trace(tuple(timeline.intervals), depths)


def step(key: Key, module: nn.Module, timeline: Timeline) -> None:
    shape = encoder_shape(key.model.encoder)
    stage, batch = stage_of(key, module, shape), batch_of(key, shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=key.bf16):
        with torch.no_grad():
            inputs = stage.prepare(batch, 0)
        timeline.mark("forward")
        totals = {"labelled_tokens": 1.0, "answer_images": 1.0, "images": 1.0}
        output = stage.loss(module, inputs, totals)
    timeline.mark("backward")
    output.loss.backward()
    timeline.mark("end")


@cache
def few_blocks(stage: Any, model: ModelConfig) -> tuple[nn.Module, Mapping[str, int]]:
    """The model, without memory, with a few blocks of each stack; and how many it has of them. Not to be changed."""
    module, _ = planned_module(Config(stage=stage, model=model))
    names = dict(module.named_modules())
    depths = {}
    for path, name in STACKS.items():
        if path in names:
            blocks = names[path]
            assert isinstance(blocks, nn.ModuleList)
            depths[name] = len(blocks)
            del blocks[BLOCKS:]
    return module, depths


def use_gpu_attention(module: Any) -> None:
    """On a GPU, packed sequences are not padded: what is kept are queries, keys, values, and the output."""
    llm = getattr(getattr(module, "conditioner", None), "llm", None)
    for layer in llm.model.layers if llm is not None else ():
        layer.self_attn.packed_attention = gpu_packed_attention


def gpu_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, sequences: ops.Sequences, mask: Tensor | None, scale: float
) -> Tensor:
    """`PackedAttention` with what the CUDA kernels take: the CPU's fused kernel, on one sequence, takes the same."""
    if mask is not None or q.dtype == torch.float32 or torch.get_autocast_dtype("cpu") == torch.float32:
        return packed_attention(q, k, v, sequences, mask, scale)
    q, k, v = (x.to(torch.bfloat16).transpose(1, 2) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)[0].transpose(
        1, 2
    )


def without_values(module: nn.Module) -> None:
    """Make the tensors of a module hollow, in place. Tied parameters stay tied."""
    made: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    made[tensor] = Hollow.like(tensor)
                table[name] = made[tensor]


def stage_of(key: Key, module: Any, shape: EncoderShape) -> Stage:
    def encode(pixels: Tensor) -> Tensor:
        return torch.empty(len(pixels), shape.num_tokens, shape.channels)

    if key.stage in GENERATION_STAGES:
        encoder: Any = SimpleNamespace(num_tokens=shape.num_tokens, channels=shape.channels)
        stage = GenerationStage(module, encoder, FlowConfig(), seed=0)
        stage.encode = encode
        return stage
    if key.stage == "decoder":
        return DecoderStage(module, cast(Any, encode), LossConfig())
    return EncoderStage(module, LossConfig())


def batch_of(key: Key, shape: EncoderShape) -> Batch:
    """Samples of equal length, each of which has its image generated."""
    size, length = key.micro_batch, key.tokens
    ids = torch.zeros(size, length, dtype=torch.int64)
    ends = [length * (number + 1) for number in range(size)]
    labelled = tuple(end - 1 - place for end in ends for place in reversed(range(1, key.labelled + 1)))
    index = torch.zeros(size, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        labels=torch.zeros_like(ids),
        attention_mask=torch.ones_like(ids),
        answer_start=index,
        user_start=torch.zeros_like(index),
        pixels=torch.empty(size, shape.image_size, shape.image_size, 3, dtype=torch.uint8),
        has_image=torch.ones(size, dtype=torch.bool),
        sample_index=torch.zeros_like(index),
        sample_ids=[""] * size,
        captions=[""] * size,
        layout=TextLayout((length,) * size, labelled),
    )
