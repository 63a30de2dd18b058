"""Pictures of fixed prompts while training, from fixed noise: what changes between two grids is the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rae_scale.config.schema import SamplerConfig
from rae_scale.data.chat import ChatTokenizer
from rae_scale.data.collate import Batch, collate
from rae_scale.flow import guided, sample, sampling_noise
from rae_scale.models.composite import ScaleRAE


def prompt_batch(chat: ChatTokenizer, prompts: Sequence[str], prompt_template: str, image_size: int) -> Batch:
    """The prompts as requests that end where the answer's image begins. ValueError for an empty or too long prompt."""
    return collate(
        [chat.encode_prompt(prompt, prompt_template) for prompt in prompts],
        [None] * len(prompts),
        image_size=image_size,
        pad_id=chat.tokenizer.pad_token_id,
        sample_index=range(len(prompts)),
        sample_ids=list(prompts),
        captions=list(prompts),
    )


@torch.no_grad()
def sample_latents(
    model: ScaleRAE,
    batch: Batch,
    cfg: SamplerConfig,
    *,
    alpha: float,
    seed: int,
    before_each: Callable[[], None] = lambda: None,
) -> Tensor:
    """Latents [B, T, C] for a batch of `prompt_batch`; noise is a function of (`seed`, `batch.sample_index`).

    Every rank of a sharded engine calls this with the same batch, inside `engine.using_ema()`.
    before_each: called before each evaluation of the velocity; what it raises ends the sampling.
    """
    tokens, channels = model.dit.cfg.num_tokens, model.dit.cfg.in_channels
    no_image = torch.zeros(len(batch), tokens, channels, device=batch.input_ids.device)
    condition = model.condition(batch.input_ids, batch.attention_mask, batch.answer_start, batch.user_start, no_image)
    everything = torch.ones(len(batch), dtype=torch.bool, device=condition.device)

    def velocity(drop: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            before_each()
            return model.velocity(x, t, condition, drop)

        return evaluate

    noise = sampling_noise(seed, batch.sample_index, (tokens, channels))
    return sample(guided(velocity(None), velocity(everything), cfg.guidance, cfg.guidance_interval), noise, cfg, alpha)
