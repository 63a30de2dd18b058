"""FLOPs of a training step by part of the model: those of the model, and those that the GPU computes.

Model FLOPs are the numerator of MFU: `Stage.flops`, from the closed formulas of `rae_scale/models/flops.py`, whose
conventions hold here too. Hardware FLOPs, the numerator of HFU, are what one GPU multiplies if it does all of the work:
with the padding of SwiGLU and what activation checkpointing computes again, and without the gradients that nobody needs
(of pixels, latents and noise). They are what PyTorch's FlopCounterMode counts, to the last one.

B samples of L tokens, M of them labelled; T image tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rae_scale import ops
from rae_scale.config import Config
from rae_scale.config.schema import EngineConfig
from rae_scale.models.decoder import ViTDecoder
from rae_scale.models.dit import DiTConfig
from rae_scale.models.encoders.contrastive import ContrastiveModel
from rae_scale.models.flops import RGB, Cost, attention, decoder_cost, dit_cost, linear, llm_cost
from rae_scale.models.llm_zoo import LLMSpec
from rae_scale.models.time_embedding import NUM_FREQUENCIES
from rae_scale.plan.encoders import EncoderShape, encoder_shape
from rae_scale.plan.models import generator, language_model, trained_module
from rae_scale.plan.samples import Samples, usual_samples

AttentionKind = Literal["fused", "plain"]
FUSED_BACKWARD, PLAIN_BACKWARD = 2.5, 2.0
"""Of attention's forward: the fused backward computes the scores once more, five products instead of four."""


@dataclass(frozen=True)
class Flops:
    """Products with weights, and products of attention."""

    products: float = 0.0
    attention: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.products + other.products, self.attention + other.attention)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.products * times, self.attention * times)

    @property
    def total(self) -> float:
        return self.products + self.attention


@dataclass(frozen=True)
class PartWork:
    """FLOPs per sample of one part of the model.

    model:      as MFU counts them.
    forward, backward: as the GPU computes them; `backward` has the gradients alone.
    recomputed: forward passes of blocks, and logits, that backward computes again.
    """

    model: float
    forward: Flops
    backward: Flops = Flops()
    recomputed: Flops = Flops()

    @property
    def hardware(self) -> float:
        return (self.forward + self.backward + self.recomputed).total


@dataclass(frozen=True)
class Work:
    """FLOPs per sample (all images are one) by part: encoder, language model, projector, connector, DiT; or decoder."""

    parts: Mapping[str, PartWork]
    formulas: Mapping[str, str] = field(default_factory=dict)

    @property
    def model(self) -> float:
        return sum(part.model for part in self.parts.values())

    @property
    def hardware(self) -> float:
        return sum(part.hardware for part in self.parts.values())


class Tally:
    """Adds up products, forward and backward."""

    def __init__(self, attention_kind: AttentionKind) -> None:
        self.attention_backward = FUSED_BACKWARD if attention_kind == "fused" else PLAIN_BACKWARD
        self.forward, self.backward, self.recomputed = Flops(), Flops(), Flops()

    def product(self, cost: Cost, *, weight: bool = True, input: bool = True) -> None:
        """weight, input: whether their gradients are computed."""
        self.forward += Flops(cost.linear)
        self.backward += Flops(cost.linear * (weight + input))

    def blocks(
        self,
        depth: int,
        products: Sequence[Cost],
        scores: Cost,
        engine: EngineConfig,
        *,
        weight: bool = True,
        last_again: bool = False,
    ) -> None:
        """`depth` equal blocks. products: in the order of their calls.

        last_again: whether backward needs the output of the last product, so that computing a block again has to go
            as far as that; else it ends before.
        """
        for cost in products:
            self.product(cost * depth, weight=weight)
        self.forward += Flops(0.0, scores.attention * depth)
        self.backward += Flops(0.0, scores.attention * depth * self.attention_backward)
        if engine.activation_checkpointing == "none":
            return
        again = products if last_again else products[:-1]
        kept, kept_attention = engine.saved_ops.get("linear", 0), engine.saved_ops.get("attention", 0)
        again = [] if kept == -1 else again[kept:]
        self.recomputed += Flops(
            sum(cost.linear for cost in again) * depth, 0.0 if kept_attention else scores.attention * depth
        )

    def part(self, model: float, times: float = 1.0) -> PartWork:
        return PartWork(model, self.forward * times, self.backward * times, self.recomputed * times)


def plan_work(
    config: Config,
    samples: Samples | None = None,
    *,
    micro_batch: int = 1,
    attention_kind: AttentionKind = "fused",
) -> Work:
    """The work of one sample in a training step of `config`.

    micro_batch:    samples of a micro-batch, which decide whether logits are computed in chunks, and so twice.
    attention_kind: fused as on a GPU, or of plain products, as FlopCounterMode sees it on a CPU.

    Raises:
        ValueError: a name of a model means none.
    """
    samples = samples or usual_samples(config)
    shape = encoder_shape(config.model.encoder)
    if config.stage == "encoder":
        return encoder_stage(config, samples, attention_kind)
    if config.stage == "decoder":
        return decoder_stage(config, shape, attention_kind)
    parts = generation(config, samples, micro_batch, attention_kind)
    if config.data.latent_cache is None:
        parts = {"encoder": encoder_part(shape), **parts}
    return Work(parts, {name: GENERATION_FORMULAS[name] for name in parts})


GENERATION_FORMULAS = {
    "encoder": "its forward, once: the frozen encoder counts, as in the step that `rae-scale train` logs; not with"
    " data.latent_cache",
    "language model": "3 x (layers x (2 L (2 h^2 + 2 h kv + 3 h f) + 4 L^2 h) + 2 M h V); frozen: 2 x products, 3 x "
    "attention",
    "projector": "3 x 2 T (C h + h^2), for samples whose image is read",
    "connector": "3 x 2 T h z, for samples whose image is generated",
    "DiT": "3 x (blocks x (2 T (4 h^2 + 8 h^2 + 6 h z) + 4 T^2 h) + ends), for samples whose image is generated",
}


def encoder_part(shape: EncoderShape) -> PartWork:
    cost = shape.cost
    return PartWork(cost.forward, Flops(cost.linear, cost.attention))


def generation(config: Config, samples: Samples, micro_batch: int, kind: AttentionKind) -> dict[str, PartWork]:
    dit, llm = generator(config), language_model(config)
    hidden, trains = llm.hidden_size, config.model.llm.train
    tokens = dit.num_tokens

    language = Tally(kind)
    qwen2_layers(language, llm, samples, config.engine, trains)
    head = linear(samples.labelled, hidden, llm.vocab_size)
    language.product(head, weight=trains)
    if samples.labelled * micro_batch > ops.rows_per_chunk(llm.vocab_size):
        language.recomputed += Flops(head.linear)
    model = llm_cost(llm, samples.tokens, samples.tokens_squared, samples.labelled)

    # It runs for every sample and is discarded by value where no image is read.
    projector, first, second = Tally(kind), linear(tokens, dit.in_channels, hidden), linear(tokens, hidden, hidden)
    projector.product(first, weight=trains, input=False)
    projector.product(second, weight=trains, input=trains)
    read = (first + second) * (1 - samples.answers)

    connector, layers = Tally(kind), [linear(tokens, hidden, dit.z_channels)]
    if config.model.llm.connector == "mlp":
        layers.append(linear(tokens, dit.z_channels, dit.z_channels))
    for layer in layers:
        connector.product(layer)

    return {
        "language model": language.part(model.training if trains else model.frozen_training),
        "projector": projector.part(read.training if trains else read.frozen_training),
        "connector": connector.part(sum(layer.training for layer in layers) * samples.answers),
        "DiT": dit_part(dit, config.engine, kind, samples.answers),
    }


def qwen2_layers(tally: Tally, llm: LLMSpec, samples: Samples, engine: EngineConfig, trains: bool) -> None:
    tokens, hidden, inner = samples.tokens, llm.hidden_size, llm.intermediate_size
    head_dim = hidden // llm.num_attention_heads
    kv = head_dim * llm.num_key_value_heads
    query, key, up = linear(tokens, hidden, hidden), linear(tokens, hidden, kv), linear(tokens, hidden, inner)
    scores = attention(samples.tokens_squared, 1, hidden)
    products = [query, key, key, query, up, up, linear(tokens, inner, hidden)]
    tally.blocks(llm.num_hidden_layers, products, scores, engine, weight=trains)
    # Positions times frequencies, as transformers writes it.
    tally.product(linear(tokens, 1, head_dim // 2), weight=False, input=False)


def dit_part(dit: DiTConfig, engine: EngineConfig, kind: AttentionKind, answers: float) -> PartWork:
    """The DiT runs for every sample, too; without an image to generate its loss has no weight."""
    tally, tokens, z, hidden = Tally(kind), dit.num_tokens, dit.z_channels, dit.hidden_size
    tally.product(linear(tokens, dit.in_channels, hidden), input=False)
    tally.product(linear(1, 2 * NUM_FREQUENCIES, z), input=False)
    tally.product(linear(1, z, z))
    dit_blocks(tally, dit.depth, tokens, hidden, z, dit.padded_inner_size, engine)
    if dit.ddt is not None:
        wide = dit.ddt.hidden_size
        tally.product(linear(tokens, dit.in_channels, wide), input=False)
        tally.product(linear(tokens, hidden, wide))
        dit_blocks(tally, dit.ddt.depth, tokens, wide, wide, dit.ddt.padded_inner_size, engine)
        hidden = z = wide
    tally.product(linear(tokens, z, 2 * hidden))
    tally.product(linear(tokens, hidden, dit.in_channels))
    return tally.part(dit_cost(dit).training * answers)


def dit_blocks(tally: Tally, depth: int, tokens: int, hidden: int, z: int, inner: int, engine: EngineConfig) -> None:
    """adaLN, q with k and v, projection, and SwiGLU's two, of which the gate's gradient needs the last one's output."""
    widths = [(z, 6 * hidden), (hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]
    products = [linear(tokens, *width) for width in widths]
    tally.blocks(depth, products, attention(tokens, tokens, hidden), engine, last_again=True)


def vit_blocks(tally: Tally, depth: int, tokens: int, hidden: int, inner: int, engine: EngineConfig) -> None:
    widths = [(hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)]
    products = [linear(tokens, *width) for width in widths]
    tally.blocks(depth, products, attention(tokens, tokens, hidden), engine)


def decoder_stage(config: Config, encoder: EncoderShape, kind: AttentionKind) -> Work:
    module = trained_module(config)[0]
    assert isinstance(module, ViTDecoder)
    decoder = module.cfg
    tally, tokens = Tally(kind), decoder.num_tokens
    tally.product(linear(tokens, decoder.in_channels, decoder.hidden_size), input=False)
    vit_blocks(tally, decoder.depth, tokens + 1, decoder.hidden_size, decoder.intermediate_size, config.engine)
    tally.product(linear(tokens, decoder.hidden_size, decoder.patch_size**2 * RGB))
    formulas = {
        "encoder": "its forward, once: the frozen encoder counts",
        "decoder": "3 x (blocks x (2 (T + 1) (4 h^2 + 2 h f) + 4 (T + 1)^2 h) + 2 T h (C + 3 p^2))",
    }
    return Work({"encoder": encoder_part(encoder), "decoder": tally.part(decoder_cost(decoder).training)}, formulas)


def encoder_stage(config: Config, samples: Samples, kind: AttentionKind) -> Work:
    """The model of the stage `encoder`, its contrast of the images and captions of a micro-batch left out."""
    module = trained_module(config)[0]
    assert isinstance(module, ContrastiveModel)
    vision, text, length = module.vision.cfg, module.text.cfg, samples.tokens
    tokens, pixels = vision.num_tokens, vision.patch_size**2 * RGB
    tally = Tally(kind)
    tally.product(linear(tokens, pixels, vision.hidden_size), input=False)
    depth, width, inner = vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size
    vit_blocks(tally, depth, tokens, width, inner, config.engine)
    vit_blocks(tally, text.num_hidden_layers, round(length), text.hidden_size, text.intermediate_size, config.engine)
    for cost in (
        linear(tokens, vision.hidden_size, vision.channels),
        linear(tokens, vision.channels, vision.hidden_size),
        linear(tokens, vision.hidden_size, 1),
        linear(1, text.hidden_size + vision.hidden_size, text.embed_size),
        linear(tokens, vision.channels, pixels),
    ):
        tally.product(cost)
    model = 3 * tally.forward.total
    return Work({"encoder": tally.part(model)}, {"encoder": "3 x the forward of image tower, text tower and heads"})
