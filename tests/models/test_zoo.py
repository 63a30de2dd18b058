from __future__ import annotations

import json

import pytest
import torch

from rae_scale.config.schema import DecoderConfig, ModelConfig
from rae_scale.models.llm_zoo import LLM_ZOO
from rae_scale.models.zoo import DECODER_ZOO, DIT_ZOO, build_decoder, build_dit, logical_parameters, model_table

# Parameters in billions: on SigLIP-2 latents, FLUX-VAE latents, WebSSL latents, and SigLIP-2 with the wide head.
PUBLISHED = {
    "dit-0.5b": (0.4807, 0.4780, 0.4804, 0.7603),
    "dit-2.4b": (2.4354, 2.4310, 2.4349, 2.7110),
    "dit-3.1b": (3.0814, 3.0764, 3.0808, 3.3552),
    "dit-5.5b": (5.4746, 5.4679, 5.4738, 5.7413),
    "dit-9.8b": (9.7277, 9.7188, 9.7267, 9.9813),
}


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in model_table()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(table, name: str) -> None:
    counts = tuple(round(table[name + suffix]["parameters"] / 1e9, 4) for suffix in ("", "-vae", "-webssl", "-ddt"))
    assert counts == PUBLISHED[name]


def test_decoder_and_language_model_counts_are_the_published_ones(table) -> None:
    assert round(table["vit-xl"]["parameters"] / 1e6, 2) == 415.29
    assert round(table["qwen2.5-1.5b"]["parameters"] / 1e9, 2) == 1.54
    assert round(table["qwen2.5-7b"]["parameters"] / 1e9, 2) == 7.62


def test_table_names_every_model_and_is_json(table) -> None:
    assert table.keys() >= DIT_ZOO.keys() | DECODER_ZOO.keys() | LLM_ZOO.keys()
    for row in json.loads(json.dumps(list(table.values()))):
        assert row.keys() >= {"name", "hidden_size", "depth", "num_heads", "parameters"}


def test_table_holds_the_dimensions_of_the_paper(table) -> None:
    row = table["dit-9.8b"]
    assert (row["hidden_size"], row["depth"], row["num_heads"]) == (4096, 32, 32)


def test_padding_is_not_counted() -> None:
    with torch.device("meta"):
        model = build_dit(ModelConfig(name="dit-2.4b"))
    assert model.blocks[0].mlp.inner_size == 5461
    assert model.blocks[0].mlp.padded_size == 5504
    padding = 32 * (5504 - 5461) * (3 * 2048 + 2)
    assert sum(parameter.numel() for parameter in model.parameters()) - logical_parameters(model) == padding


def test_build_dit_follows_the_model_section() -> None:
    model = build_dit(ModelConfig(name="dit-tiny", qk_norm=True, class_dropout_prob=0.25))
    assert model.cfg.hidden_size == 48
    assert model.cfg.class_dropout_prob == 0.25
    assert model.blocks[0].attn.q_norm.weight.shape == (12,)


def test_the_wide_heads_number_of_heads_can_be_chosen() -> None:
    with torch.device("meta"):
        default = build_dit(ModelConfig(name="dit-0.5b-ddt"))
        model = build_dit(ModelConfig(name="dit-0.5b-ddt", ddt_num_heads=16))
    assert (default.cfg.ddt.num_heads, model.cfg.ddt.num_heads) == (21, 16)
    assert model.head.blocks[0].attn.head_dim == model.head.rope_cos.shape[1] == 168
    shapes = {name: tuple(parameter.shape) for name, parameter in default.named_parameters()}
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == shapes


def test_heads_that_the_wide_head_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.ddt_num_heads=20: DDT head: .*num_heads=21 is the nearest that fits"):
        build_dit(ModelConfig(name="dit-0.5b-ddt", ddt_num_heads=20))
    with pytest.raises(ValueError, match=r"model\.name='dit-0\.5b' has no DDT head; remove it, .*dit-0\.5b-ddt"):
        build_dit(ModelConfig(name="dit-0.5b", ddt_num_heads=16))


def test_build_decoder_follows_its_section_and_the_encoder() -> None:
    decoder = build_decoder(DecoderConfig(name="vit-test"), 24, image_mean=(0.1, 0.2, 0.3))
    assert decoder.decode(torch.zeros(1, 16, 24)).shape == (1, 3, 16, 16)
    assert decoder.image_mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_name_that_is_not_in_the_zoo_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.name='dit-7b' names no model; choose one of .*dit-2\.4b"):
        build_dit(ModelConfig(name="dit-7b"))
    with pytest.raises(ValueError, match=r"model\.decoder\.name='vit-h' names no model; choose one of vit-b"):
        build_decoder(DecoderConfig(name="vit-h"), 8)


def test_demo_models_fit_each_other() -> None:
    dit, decoder = DIT_ZOO["dit-demo"], DECODER_ZOO["vit-tiny"]
    assert (dit.num_tokens, dit.in_channels) == (decoder.num_tokens, decoder.in_channels) == (16, 64)
    assert decoder.image_size == 64
