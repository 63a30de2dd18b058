"""Official config.json <-> our settings."""

from __future__ import annotations

from typing import Any

import pytest

from rae_scale.config import Config, parse_config
from rae_scale.convert.official_config import from_official_config, to_official_config

RELEASED = {  # what the release's scripts pass for its 1.5B + 2.4B model
    "model_type": "cambrian_qwen",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151_667,
    "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "mm_vision_tower_aux_list": ["google/siglip2-so400m-patch14-224"],
    "vision_tower_aux_token_len_list": [256],
    "mm_projector_type": "mlp2x_gelu",
    "vision_hidden_size": 1152,
    "vision_loss": "diffusion-loss",
    "vision_loss_mode": "query",
    "vision_coef": 2.0,
    "diffusion_split_per_token": 256,
    "diffusion_model_hidden_size": 2048,
    "diffusion_model_z_channels": 2048,
    "diffusion_model_heads": 32,
    "diffusion_model_depth": 32,
    "diffusion_model_channels": 1152,
    "ddt_encoder_depth": 2,
    "diffusion_class_dropout_prob": 0.1,
}


def config(**changes: Any) -> Config:
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in changes.items()]
    return parse_config({"model": {"llm": {"tokenizer": "Qwen/Qwen2.5-1.5B-Instruct"}}}, overrides)


def test_the_papers_model_is_described_as_the_release_describes_it() -> None:
    written = to_official_config(config(), 151_667).settings
    assert {name: written.get(name) for name in RELEASED} == RELEASED


def test_the_release_is_understood() -> None:
    tree, remarks = from_official_config(RELEASED, "here")
    read = parse_config(tree)
    assert (read.model.name, read.model.llm.name, read.model.encoder.name) == (
        "dit-2.4b",
        "qwen2.5-1.5b",
        "siglip2-so400m",
    )
    assert read.model.encoder.path == "google/siglip2-so400m-patch14-224"
    assert read.model.llm.tokenizer == "here"
    assert (read.flow.base_dim, read.flow.flow_weight, read.model.class_dropout_prob) == (4096, 2.0, 0.1)
    assert any("prompt template" in remark for remark in remarks)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__name": "dit-9.8b", "model__llm__name": "qwen2.5-7b", "data__max_seq_len": 1024},
        {"model__name": "dit-0.5b-ddt", "model__ddt_num_heads": 16, "model__llm__mask": "query-block"},
        {"model__name": "dit-2.4b-webssl", "model__encoder__name": "webssl-l", "flow__base_dim": 1024},
        {"model__name": "dit-tiny", "model__llm__name": "qwen2-tiny", "model__encoder__name": "siglip-demo"},
    ],
)
def test_there_and_back_the_model_is_the_same(changes: dict[str, Any]) -> None:
    ours = config(**changes)
    read = parse_config(from_official_config(to_official_config(ours, 400).settings, "here").settings)
    assert read.flow == ours.flow
    for name in ("name", "class_dropout_prob", "ddt_num_heads"):
        assert getattr(read.model, name) == getattr(ours.model, name)
    assert read.model.llm.model_dump(exclude={"tokenizer"}) == ours.model.llm.model_dump(exclude={"tokenizer"})
    assert read.model.encoder.name == ours.model.encoder.name
    assert read.data.max_seq_len == ours.data.max_seq_len


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__llm__connector": "mlp"}, "one Linear there"),
        ({"model__qk_norm": "true"}, "without q and k norms"),
        ({"model__name": "dit-2.4b-vae", "model__encoder__name": "flux-vae"}, "mm_projector has another shape"),
    ],
)
def test_a_model_that_the_official_classes_cannot_build_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_official_config(config(**changes), 400)


def test_what_the_format_cannot_say_is_said_to_the_user() -> None:
    remarks = "\n".join(
        to_official_config(
            config(
                flow__shift=3.0,
                flow__time="uniform",
                sampler__guidance=4.0,
                model__llm__train="false",
                model__encoder__path="my/siglip2",
            ),
            400,
        ).remarks
    )
    for said in (
        "model.encoder.path='my/siglip2'",
        "flow.shift=3.0",
        "flow.time=uniform",
        "guidance=4.0",
        "model.llm.train=False",
        "prompt_template",
    ):
        assert said in remarks
    assert "flow.text_weight" not in remarks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
        ({"vision_loss_mode": "ar-ddt"}, "vision_loss_mode='ar-ddt'"),
        ({"vision_loss": "ddt-loss"}, "one DiT split in two"),
        ({"vision_loss": "regression-loss"}, "vision_loss="),
        ({"generation_alignment_tower": "black-forest-labs/FLUX.1-dev-res256"}, "generation_alignment_tower="),
        ({"diffusion_norm_stats_path": "stat.pt"}, "diffusion_norm_stats_path="),
        ({"diffusion_model_depth": 31}, "no named DiT has .*depth=31"),
        ({"diffusion_model_heads": 16}, "diffusion_model_heads=16: dit-2.4b has 32"),
        ({"hidden_size": 896}, "no named language model has hidden_size=896"),
        ({"mm_vision_tower_aux_list": ["openai/clip"]}, "openai/clip"),
    ],
)
def test_another_kind_of_model_is_refused_by_its_setting(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_official_config(RELEASED | changes, "here")
