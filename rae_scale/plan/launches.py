"""What the host needs to issue a step's kernels: longer than running them, if they are small."""

from __future__ import annotations

from rae_scale.config import Config
from rae_scale.models.decoder import ViTDecoder
from rae_scale.plan.encoders import EncoderShape
from rae_scale.plan.hardware import Rates
from rae_scale.plan.models import generator, language_model, trained_module
from rae_scale.train.parts import GENERATION_STAGES

LAUNCHES = {"encoder": (20, 40), "language model": (59, 77), "DiT": (22, 38), "decoder": (20, 40)}
"""Kernels per block, forward and backward. DiT and language model were counted below autograd, with our operators and
under bf16 autocast; ViTs are taken from their code."""
COMPILED_LAUNCHES = {"none": 1.0, "blocks": 0.5, "blocks-cudagraphs": 0.0}
"""What is left of them. Half is a guess: the compiler joins what is between products."""


def launch_seconds(config: Config, shape: EncoderShape, rates: Rates) -> float:
    """What the host needs to issue one micro-step."""
    again = config.engine.activation_checkpointing != "none"
    depths: dict[str, int] = {}
    if config.stage in GENERATION_STAGES:
        dit = generator(config)
        depths["DiT"] = dit.depth + (dit.ddt.depth if dit.ddt is not None else 0)
        depths["language model"] = language_model(config).num_hidden_layers
    elif config.stage == "decoder":
        decoder = trained_module(config)[0]
        assert isinstance(decoder, ViTDecoder)
        depths["decoder"] = decoder.cfg.depth
    count = 0.0
    if config.data.latent_cache is None:
        count += shape.layers * LAUNCHES["encoder"][0]
    if config.stage == "encoder":
        count += shape.layers * LAUNCHES["encoder"][1]
    for name, depth in depths.items():
        forward, backward = LAUNCHES[name]
        left = COMPILED_LAUNCHES[config.engine.compile] if name != "language model" else 1.0
        count += left * depth * (forward * (1 + again) + backward)
    return count * rates.launch
