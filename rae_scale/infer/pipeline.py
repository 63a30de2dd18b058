"""Text to image with a trained model: prompt -> language model -> DiT sampler -> decoder -> picture.

Nothing about a picture depends on its neighbours in the batch: its noise is a function of its own seed, and padding is
masked. Another batch size changes the order of floating-point sums and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rae_scale.config import Config
from rae_scale.config.paths import resolve_paths
from rae_scale.config.schema import SamplerConfig
from rae_scale.data.chat import ChatTokenizer
from rae_scale.flow import resolve_alpha
from rae_scale.infer.load import STATE_KIND, Weights, decoding_encoder, find_checkpoint, stored_config
from rae_scale.models.composite import ScaleRAE, build_scale_rae
from rae_scale.parallel.mesh import choose_device
from rae_scale.state import read_weights
from rae_scale.train.parts import build_decode, load_stage_tokenizer, load_weights, without_llm_weights
from rae_scale.train.sampling import prompt_batch, sample_latents

# The sampler's noise is a function of (seed, sample index). A picture's own seed is its index here, so that its noise
# does not depend on its place among the others.
NOISE_SEED = 0

Precision = Literal["float32", "bfloat16"] | None


class TextToImage:
    """A trained model ready to draw. `from_checkpoint` makes one."""

    def __init__(
        self,
        model: ScaleRAE,
        decode: Callable[[Tensor], Tensor],
        chat: ChatTokenizer,
        config: Config,
        image_size: int,
        *,
        bf16: bool,
    ) -> None:
        """decode: latents [B, T, C] to pixels [B, 3, image_size, image_size] in [0, 1], on the model's device.

        bf16: matrix products and attention in bfloat16, whatever the weights are kept in."""
        self.model = model.eval().requires_grad_(False)
        self.decode = decode
        self.chat = chat
        self.config = config
        self.image_size = image_size
        self.bf16 = bf16
        self.device = next(model.parameters()).device
        self.alpha = resolve_alpha(config.flow, model.dit.cfg.num_tokens * model.dit.cfg.in_channels)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        weights: Weights = None,
        decoder: str | Path | None = None,
        device: str = "auto",
        dtype: Precision = None,
    ) -> TextToImage:
        """Load the model of a run folder (its newest checkpoint), a checkpoint, an exported or a shared folder.

        weights: "ema", "raw", or None for the moving average where there is one.
        decoder: folder of decoder weights, in place of the run's `model.decoder.path`.
        device: auto, cpu or cuda.
        dtype: "bfloat16" keeps the language model and the DiT in bfloat16 and computes in it, "float32" both in
            float32. None keeps float32, and computes on a GPU in the run's `engine.precision`, elsewhere in float32.

        Raises:
            ValueError: there is no checkpoint, it lacks what is asked for, it does not generate, or nothing decodes.
        """
        checkpoint = find_checkpoint(path)
        config = resolve_paths(for_inference(stored_config(checkpoint), decoder))
        if config.stage not in ("pretrain", "finetune"):
            raise ValueError(
                f"{checkpoint} is of stage={config.stage}, which draws no pictures; give one of pretrain or finetune"
            )
        torch_device = choose_device(device)
        encoder = decoding_encoder(config.model.encoder, torch_device)
        decode = build_decode(config, encoder, torch_device)
        if decode is None:
            raise ValueError(
                f"{checkpoint}: its run had no model.decoder.path, so latents cannot become pictures; give a folder of "
                "decoder weights with --decoder"
            )
        tokenizer = load_stage_tokenizer(config)
        # The checkpoint holds the whole model, frozen parts too.
        named = without_llm_weights(config).model
        model = build_scale_rae(named, encoder.channels, encoder.num_tokens, len(tokenizer))
        load_weights(model, read_weights(checkpoint, STATE_KIND[weights]), str(checkpoint))
        chat = ChatTokenizer(tokenizer, encoder.num_tokens, config.data.max_seq_len)
        if dtype == "bfloat16":
            round_parameters(model)
        as_trained = torch_device.type == "cuda" and config.engine.precision == "bf16"
        bf16 = dtype == "bfloat16" or (dtype is None and as_trained)
        return cls(model.to(torch_device), decode, chat, config, encoder.image_size, bf16=bf16)

    def sampler(self, **changes: Any) -> SamplerConfig:
        """The run's sampler settings with those of `changes` that are not None."""
        return self.config.sampler.model_copy(
            update={name: value for name, value in changes.items() if value is not None}
        )

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampler: SamplerConfig | None = None,
        batch_size: int = 16,
    ) -> NDArray[np.uint8]:
        """One picture for each prompt and its seed: uint8 [N, S, S, 3].

        sampler: None takes the run's settings.

        Raises:
            ValueError: an empty or too long prompt, or not as many seeds as prompts.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"every prompt needs its seed, got {len(prompts)} prompts and {len(seeds)} seeds")
        sampler = sampler or self.config.sampler
        starts = range(0, len(prompts), batch_size)
        batches = ((prompts[start : start + batch_size], seeds[start : start + batch_size]) for start in starts)
        return np.concatenate([self._draw(*batch, sampler) for batch in batches])

    @torch.inference_mode()
    def _draw(self, prompts: Sequence[str], seeds: Sequence[int], sampler: SamplerConfig) -> NDArray[np.uint8]:
        batch = prompt_batch(self.chat, prompts, self.config.data.prompt_template, self.image_size)
        batch = replace(batch, sample_index=torch.tensor(list(seeds), dtype=torch.int64)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            latents = sample_latents(self.model, batch, sampler, alpha=self.alpha, seed=NOISE_SEED)
            pixels = self.decode(latents)
        return to_uint8(pixels)


@torch.no_grad()
def round_parameters(model: nn.Module) -> None:
    """Parameters to bfloat16, in place. Tables of sines and the time embedding's frequencies stay as exact as they are:
    they are constants of a few kilobytes, and a rounded frequency is another model."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()


def to_uint8(pixels: Tensor) -> NDArray[np.uint8]:
    """Pixels [B, 3, S, S] in [0, 1] to pictures, uint8 [B, S, S, 3]."""
    return (pixels.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def for_inference(config: Config, decoder: str | Path | None) -> Config:
    """`config` with another decoder folder, if one is given, and without what only a start from it would read."""
    run = config.run.model_copy(update={"init_from": None})
    model, data = config.model, config.data.model_copy(update={"sources": ()})
    if decoder is not None:
        model = model.model_copy(update={"decoder": model.decoder.model_copy(update={"path": str(decoder)})})
    return config.model_copy(update={"run": run, "model": model, "data": data})
