"""A whole ScaleRAE of awkward sizes, and batches for it: what parallel layouts are compared with one process on.

Sizes are odd on purpose: SwiGLU widths that need padding (213, 469), a condition that is not as wide as the DiT, a
vocabulary, text lengths and latent channels that divide by nothing, keys and values with fewer heads than queries.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rae_scale.data.collate import Batch
from rae_scale.models.composite import ScaleRAE, build_connector
from rae_scale.models.conditioner import Conditioner
from rae_scale.models.ddt import DDTHeadConfig
from rae_scale.models.dit import DiT, DiTConfig
from rae_scale.models.llm_zoo import LLMSpec

GRID, CHANNELS, VOCAB = 4, 13, 211
TOKENS = GRID * GRID
DIT = DiTConfig(CHANNELS, hidden_size=80, depth=2, num_heads=4, z_channels=72, grid_size=GRID, qk_norm=True)
HEAD = DDTHeadConfig(hidden_size=176, depth=1, num_heads=4)
LLM = LLMSpec(48, 2, 4, 2, 72, VOCAB, tie_word_embeddings=True)


def scale_rae(*, ddt: bool = True, tied: bool = True, mask: str = "causal") -> ScaleRAE:
    """Random weights everywhere: gates, biases and norms too, which start at 0 or 1 and would hide mistakes."""
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    llm = Qwen2ForCausalLM(replace(LLM, tie_word_embeddings=tied).to_qwen2())
    conditioner = Conditioner(llm, num_queries=TOKENS, user_channels=CHANNELS, mask=mask)
    dit = DiT(replace(DIT, ddt=HEAD if ddt else None))
    model = ScaleRAE(conditioner, build_connector("linear", LLM.hidden_size, DIT.z_channels), dit)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        dit.init_constants()  # padding back to zero
    return model


def inputs(step: int = 0, size: int = 4, kinds: str = "guta") -> dict[str, Tensor]:
    """Arguments of ScaleRAE.forward. kinds, a letter per sample in turn: g generates an image, u is asked about one,
    t is text alone, a generates one late in a long text."""
    generator = torch.Generator().manual_seed(step)
    rows = [kinds[number % len(kinds)] for number in range(size)]
    length = 45
    ids = torch.randint(VOCAB, (size, length), generator=generator)
    labels = torch.where(torch.rand(size, length, generator=generator) < 0.4, ids, -100)
    mask = torch.ones_like(ids)
    answer, user = torch.full((2, size), -1).unbind(0)
    for row, kind in enumerate(rows):
        end = length - 5 * (row % 3)
        mask[row, end:], labels[row, end:] = 0, -100
        start = {"g": 7, "a": end - TOKENS - 1, "u": 3}.get(kind)
        if start is not None:
            (user if kind == "u" else answer)[row] = start
            labels[row, start : start + TOKENS] = -100
        if kind == "a":
            labels[row] = -100
    normal = torch.randn(2, size, TOKENS, CHANNELS, generator=generator)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "answer_start": answer,
        "user_start": user,
        "user_features": normal[0],
        "x_t": normal[1],
        "t": torch.rand(size, generator=generator),
        "drop": torch.rand(size, generator=generator) < 0.3,
    }


def batch_of(arguments: dict[str, Tensor], first: int = 0) -> Batch:
    """The same as the loader's batch, without pixels."""
    size = len(arguments["input_ids"])
    return Batch(
        input_ids=arguments["input_ids"],
        labels=arguments["labels"],
        attention_mask=arguments["attention_mask"],
        answer_start=arguments["answer_start"],
        user_start=arguments["user_start"],
        pixels=torch.zeros(size, 1, 1, 3, dtype=torch.uint8),
        has_image=(arguments["answer_start"] >= 0) | (arguments["user_start"] >= 0),
        sample_index=torch.arange(first, first + size),
        sample_ids=[str(first + row) for row in range(size)],
        captions=[""] * size,
    )
