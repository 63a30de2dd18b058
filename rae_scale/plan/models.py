"""The models of a configuration and their dimensions, built once without memory and kept: a search asks for them again
and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from rae_scale.config import Config
from rae_scale.config.schema import ModelConfig, ParallelConfig
from rae_scale.engines.zero_gathers import Call, record_calls
from rae_scale.models.dit import DiTConfig
from rae_scale.models.llm_zoo import LLM_ZOO, LLMSpec
from rae_scale.models.packing import TextLayout
from rae_scale.models.zoo import dit_config
from rae_scale.parallel import blocks_of, parallelize
from rae_scale.parallel.fake import fake_ranks
from rae_scale.parallel.placement import Placement
from rae_scale.plan.skeleton import planned_module


def trained_module(config: Config) -> tuple[nn.Module, Callable[[str], str]]:
    """What the stage trains, whole, on the meta device, and what tells its parameters' groups. Not to be changed."""
    return _trained_module(config.stage, config.model)


@cache
def _trained_module(stage: Any, model: ModelConfig) -> tuple[nn.Module, Callable[[str], str]]:
    return planned_module(Config(stage=stage, model=model))


def generator(config: Config) -> DiTConfig:
    return dit_config(config.model)


def language_model(config: Config) -> LLMSpec:
    """With as many rows of the vocabulary as the tokenizer asks for."""
    module: Any = trained_module(config)[0]
    return replace(LLM_ZOO[config.model.llm.name], vocab_size=module.conditioner.llm.config.vocab_size)


@cache
def tensor_placements(stage: Any, model: ModelConfig, tp: int, tp_rank: int) -> Mapping[str, Placement]:
    """Where rank `tp_rank` of `tp` holds its part of every parameter, by the real pass.

    Raises:
        ValueError: the model cannot be split so.
    """
    # Only splitting changes a module.
    module, _ = _trained_module(stage, model) if tp == 1 else planned_module(Config(stage=stage, model=model))
    with fake_ranks(ParallelConfig(tp=tp), tp_rank) as mesh:
        return parallelize(module, mesh)


@cache
def recorded_calls(stage: Any, model: ModelConfig, checkpointed: bool) -> Call:
    """The module calls of a forward pass, from which ZeRO-3's gathers follow."""
    module, _ = _trained_module(stage, model)
    with torch.device("meta"):
        return record_calls(module, example_forward, blocks_of(module) if checkpointed else ())


def example_forward(module: nn.Module) -> Any:
    """A forward pass of one sample, as the module's stage calls it. Which modules it calls does not depend on it."""
    return EXAMPLES[type(module).__name__](module)


def generate(module: Any) -> Any:
    dit = module.dit.cfg
    length = dit.num_tokens + 8
    ids, start = torch.ones(1, length).long(), torch.ones(1).long()
    latents = torch.ones(1, dit.num_tokens, dit.in_channels)
    return module(
        input_ids=ids,
        labels=ids,
        attention_mask=ids,
        answer_start=start,
        user_start=start,
        user_features=latents,
        x_t=latents,
        t=torch.ones(1),
        drop=torch.ones(1, dtype=torch.bool),
        layout=TextLayout((length,), (0, 1)),
    )


def decode(module: Any) -> Any:
    return module(torch.ones(1, module.cfg.num_tokens, module.cfg.in_channels))


def contrast(module: Any) -> Any:
    size, ids = module.vision.image_size, torch.ones(1, 8).long()
    return module(torch.ones(1, 3, size, size), ids, ids)


EXAMPLES: dict[str, Callable[[Any], Any]] = {"ScaleRAE": generate, "ViTDecoder": decode, "ContrastiveModel": contrast}
