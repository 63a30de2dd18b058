"""Bytes that go through a GPU's memory in a step beside matrix products, in closed form.

Element-wise operations take as long as their inputs and outputs take to be read and written. Of the DiT's blocks the
counts are those of the roofline (`rae_kernels/traffic.py`), tested there against PyTorch's dispatcher; of Qwen2 and the
ViTs they are read off the code: each PyTorch call reads its inputs and writes its output.

Letters: r bytes of an element of the residual stream, a of what matrix products read and write; h hidden size, f inner
width, kv width of keys or values, z width of the condition. Formulas are bytes per token and block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rae_scale import ops
from rae_scale.config import Config
from rae_scale.models.decoder import ViTDecoder
from rae_scale.models.encoders.contrastive import ContrastiveModel
from rae_scale.models.encoders.flux_vae import FLUX_CONFIG
from rae_scale.plan.encoders import EncoderShape
from rae_scale.plan.models import generator, language_model, trained_module
from rae_scale.plan.samples import Samples
from rae_scale.plan.traffic import micro_step_of
from rae_scale.train.parts import GENERATION_STAGES

Kernels = Literal["auto", "reference"]
FLOAT32 = 4

ROPE_PASSES = 10
"""transformers' rotary embedding: x * cos (2), the two halves turned (3), * sin (2), their sum (3)."""
LOGITS = (2, 12)
"""Per logit, in multiples of a and in bytes: written by the product, read, cast to float32, then its softmax; and the
same on the way back."""


@dataclass(frozen=True)
class Passes:
    """Bytes per micro-step on one rank. again: what checkpointing computes again."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0


def plan_passes(
    config: Config, shape: EncoderShape, samples: Samples, micro_batch: int, kernels: Kernels
) -> dict[str, Passes]:
    """By part of the model, under the names of `plan_work`.

    kernels: auto, our operators (a compiled block is taken to be as good); reference, one PyTorch call at a time.
    """
    a = 2 if config.engine.precision == "bf16" else FLOAT32
    ranks = config.parallel.sp * config.parallel.tp
    frozen = encoder_passes(shape, -(-micro_batch // ranks), a)
    if config.stage in GENERATION_STAGES:
        parts = {
            "language model": language_passes(config, samples, micro_batch, a),
            "DiT": dit_passes(config, micro_batch, a, kernels),
        }
        return {"encoder": Passes(frozen), **parts}
    if config.stage == "decoder":
        module = trained_module(config)[0]
        assert isinstance(module, ViTDecoder)
        cfg = module.cfg
        tokens = micro_batch * (cfg.num_tokens + 1)
        forward = tokens * cfg.depth * vit_bytes(cfg.hidden_size, cfg.intermediate_size, a)
        return {"encoder": Passes(frozen), "decoder": trained_vit(forward, config)}
    module = trained_module(config)[0]
    assert isinstance(module, ContrastiveModel)
    text = module.text.cfg
    forward = encoder_passes(shape, micro_batch, a) + micro_batch * samples.tokens * text.num_hidden_layers * vit_bytes(
        text.hidden_size, text.intermediate_size, a
    )
    return {"encoder": trained_vit(forward, config)}


def again(config: Config, forward: float) -> float:
    """Selective checkpointing computes everything between products again, too."""
    return 0.0 if config.engine.activation_checkpointing == "none" else forward


def dit_passes(config: Config, micro_batch: int, a: int, kernels: Kernels) -> Passes:
    dit, parallel = generator(config), config.parallel
    tokens = micro_batch * dit.num_tokens / parallel.sp
    fused = kernels == "auto" or config.engine.compile != "none"
    traffic = ops.traffic.fused_traffic(FLOAT32, product=a) if fused else ops.traffic.eager_traffic()
    stacks = [(dit.depth, dit.hidden_size, dit.z_channels, dit.padded_inner_size)]
    if dit.ddt is not None:
        wide = dit.ddt.hidden_size
        stacks.append((dit.ddt.depth, wide, wide, dit.ddt.padded_inner_size))
    forward = backward = 0.0
    for depth, hidden, z, inner in stacks:
        for name, each in traffic.items():
            channels = (inner if name == "swiglu" else hidden) / parallel.tp
            forward += depth * tokens * channels * each.forward
            backward += depth * tokens * channels * each.backward
        outputs = (6 * hidden + 3 * hidden + hidden + 2 * inner + hidden) / parallel.tp
        backward += depth * tokens * outputs * a
        # The condition is whole on every rank of tp.
        forward += depth * tokens * z * ops.traffic.CONDITION.forward
        backward += depth * tokens * z * ops.traffic.CONDITION.backward
    blocks, (_, last, z, _) = forward, stacks[-1]
    channels = tokens * last / parallel.tp
    forward += channels * traffic["norm_modulate"].forward
    backward += channels * traffic["norm_modulate"].backward + tokens * a * (2 * last / parallel.tp + dit.in_channels)
    return Passes(forward, backward, again(config, blocks))


def language_passes(config: Config, samples: Samples, micro_batch: int, a: int) -> Passes:
    """Of Qwen2 (`rae_scale/models/qwen2.py`). Norms and sums work on the whole hidden size on every rank of tp.

    forward:  2 norms 2 * 2 r h, their results cast for five products 5 (r + a) h if r differs from a, 2 sums
              2 (2 r + a) h, rotary embedding 10 r (h + kv), SwiGLU 3 a f
    backward: norms 2 * 3 r h, casts as before, sums of gradients 2 * 3 r h, rotary embedding, SwiGLU 8 a f
    """
    llm, parallel = language_model(config), config.parallel
    r, tp = micro_step_of(config, samples, micro_batch).weight_bytes, parallel.tp
    hidden, inner = llm.hidden_size, llm.intermediate_size / tp
    kv = hidden // llm.num_attention_heads * llm.num_key_value_heads
    casts = 5 * (r + a) * hidden if r != a else 0
    rotary = ROPE_PASSES * r * (hidden + kv) / tp
    tokens = micro_batch * samples.tokens / parallel.sp * llm.num_hidden_layers
    forward = tokens * (4 * r * hidden + casts + 2 * (2 * r + a) * hidden + rotary + 3 * a * inner)
    backward = tokens * (6 * r * hidden + casts + 6 * r * hidden + rotary + 8 * a * inner)
    logits = micro_batch * samples.labelled / parallel.sp * llm.vocab_size / tp * (LOGITS[0] * a + LOGITS[1])
    return Passes(forward + logits, backward + logits, again(config, forward))


def vit_bytes(hidden: int, inner: int, a: int) -> float:
    """Forward, float32 residual: 2 norms 2 * 8 h, cast for two products 2 (4 + a) h, 2 sums 2 (8 + a) h, GELU 2 a f,
    attention 4 a h."""
    return hidden * (16 + 2 * (FLOAT32 + a) + 2 * (8 + a) + 4 * a) + 2 * a * inner


def trained_vit(forward: float, config: Config) -> Passes:
    """Backward of each of these calls reads its gradient and inputs and writes the gradient of each input: twice."""
    return Passes(forward, 2 * forward, again(config, forward))


def encoder_passes(shape: EncoderShape, images: int, a: int) -> float:
    """A frozen encoder's forward, and its float32 weights cast for every product."""
    if not shape.layers:
        return images * vae_bytes(a)
    weights = shape.layers * (4 * shape.hidden**2 + 2 * shape.hidden * shape.inner)
    casts = weights * (FLOAT32 + a) if a != FLOAT32 else 0
    return images * shape.tokens * shape.layers * vit_bytes(shape.hidden, shape.inner, a) + casts


def vae_bytes(a: int) -> float:
    """Of an image: per residual block and pixel 2 norms 2 * 12, 2 SiLU 2 * 8, 2 casts 2 (4 + a), a sum 12."""
    widths: tuple[int, ...] = FLUX_CONFIG["block_out_channels"]  # type: ignore[assignment]
    layers: int = FLUX_CONFIG["layers_per_block"]  # type: ignore[assignment]
    per_element = 24 + 16 + 2 * (FLOAT32 + a) + 12
    sizes = [256 >> level for level in range(len(widths))]
    blocks = sum(layers * size**2 * width for size, width in zip(sizes, widths, strict=True))
    return per_element * (blocks + 2 * sizes[-1] ** 2 * widths[-1])


def update_bytes(config: Config, kernels: Kernels) -> float:
    """Bytes per parameter that a rank updates: norm, clipping, AdamW, moving average, rounding for the next gather.

    Ours in one pass: weight, both moments and the moving average read and written, the gradient read, and read before
    for its norm. DeepSpeed: PyTorch's AdamW, with clipping and moving average as passes of their own.
    """
    ema = config.optim.ema_decay is not None
    if config.engine.name == "zero" or kernels == "reference":
        eager = ops.traffic.EAGER_OPTIMIZER
        rounded = config.engine.precision == "bf16"
        return eager["norm"] + eager["clip"] + eager["adamw"] + eager["ema"] * ema + eager["weight cast"] * rounded
    moment = 2 if config.optim.moments == "bf16" else FLOAT32
    return 2 * FLOAT32 + 2 * FLOAT32 + 4 * moment + 2 * FLOAT32 * ema
