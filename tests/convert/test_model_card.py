"""The card says what the checkpoint says, and no more."""

from __future__ import annotations

from dataclasses import replace

import torch
import yaml

from rae_scale.config import parse_config
from rae_scale.config.schema import LLMConfig, ModelConfig
from rae_scale.convert.model_card import CardFacts, model_card, parameters_by_part
from rae_scale.models.blocks import SwiGLU
from rae_scale.models.composite import build_scale_rae
from rae_scale.models.dit import DiT
from rae_scale.models.zoo import DIT_ZOO

CONFIG = parse_config(
    {
        "data": {"sources": [{"path": "/home/me/secret/cc12m"}, {"path": "flux-24m"}], "global_batch_size": 2048},
        "optim": {"ema_decay": 0.999},
    }
)
FACTS = CardFacts(
    name="scale-rae-2.4b",
    config=CONFIG,
    parameters={"Language model": 5, "DiT": 24, "Decoder": 415_000_000},
    kind="ema",
    dtype="bfloat16",
    step=30_000,
    command="rae-scale convert run scale-rae-2.4b --to hf",
)


def test_parameters_are_those_of_the_published_model() -> None:
    with torch.device("meta"):
        model = build_scale_rae(ModelConfig(name="dit-0.5b", llm=LLMConfig(name="qwen2-tiny")), 1152, 256, 320)
        dit = DiT(DIT_ZOO["dit-0.5b"])
    padding = sum(part.num_padding_parameters for part in dit.modules() if isinstance(part, SwiGLU))
    counted = parameters_by_part(model, 19)
    assert padding > 0
    assert counted["DiT"] == sum(parameter.numel() for parameter in dit.parameters()) - padding
    assert counted["Learned queries"] == 256 * 48
    assert counted["Connector"] == 48 * 1280 + 1280
    assert sum(counted.values()) == sum(parameter.numel() for parameter in model.parameters()) - padding + 19
    assert "Decoder" not in parameters_by_part(model, None)


def test_what_the_checkpoint_says_is_there() -> None:
    card = model_card(FACTS)
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "unknown"
    assert front["pipeline_tag"] == "text-to-image"
    for said in (
        "arxiv.org/abs/2601.16208",
        "| Decoder | 415,000,000 |",
        "| DiT | 24 |",
        "| Steps | 30,000 |",
        "| Data | `cc12m`, `flux-24m` |",
        "| Weights | moving average (EMA), bfloat16 |",
        "| EMA decay | 0.999 |",
        'RaeScale.from_pretrained("scale-rae-2.4b")',
        "rae-scale convert run scale-rae-2.4b --to hf",
    ):
        assert said in card
    assert "secret" not in card
    assert "FID" not in card


def test_the_licence_is_the_users_to_state() -> None:
    card = model_card(replace(FACTS, license="mit"))
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert "mit, as stated by who made this folder" in card
    assert "Not stated" in model_card(FACTS)


def test_what_is_not_known_is_not_told() -> None:
    card = model_card(replace(FACTS, step=None, kind=None, recorded=False))
    assert "| Steps | not recorded |" in card
    assert "| Settings | not recorded |" in card
    assert "| Weights | bfloat16 |" in card
    assert "2,048" not in card
    assert "EMA" not in card


def test_a_folder_without_decoder_says_how_to_draw() -> None:
    card = model_card(replace(FACTS, draws=False))
    assert 'from_pretrained("scale-rae-2.4b", decoder="DECODER-FOLDER")' in card
