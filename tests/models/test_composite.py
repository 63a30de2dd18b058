from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rae_scale.config.schema import LLMConfig, ModelConfig
from rae_scale.models.composite import ScaleRAE, build_scale_rae, group_of, load_official_t2i
from rae_scale.models.conditioner import Conditioner
from rae_scale.models.dit import DiT, DiTConfig
from rae_scale.models.llm_zoo import LLMSpec
from rae_scale.models.packing import IGNORE_LABEL

GOLDEN = Path(__file__).parents[1] / "golden" / "composite_tiny.safetensors"
TOLERANCE = {"rtol": 0.0, "atol": 2e-5}


class Golden(NamedTuple):
    config: dict
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    state: dict[str, Tensor]


@pytest.fixture(scope="module")
def golden() -> Golden:
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(GOLDEN)
    parts = (
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for prefix in ("in.", "out.", "state.")
    )
    return Golden(config, *parts)


def official_model(golden: Golden, tied: bool = False) -> ScaleRAE:
    """The golden model with random weights."""
    from transformers import Qwen2ForCausalLM

    llm, dit = golden.config["llm"], golden.config["dit"]
    spec = LLMSpec(
        llm["hidden_size"],
        llm["num_hidden_layers"],
        llm["num_attention_heads"],
        llm["num_key_value_heads"],
        llm["intermediate_size"],
        llm["vocab_size"],
        tie_word_embeddings=tied,
        rope_theta=llm["rope_theta"],
        rms_norm_eps=llm["rms_norm_eps"],
    )
    return ScaleRAE(
        Conditioner(
            Qwen2ForCausalLM(spec.to_qwen2()), num_queries=golden.config["queries"], user_channels=dit["in_channels"]
        ),
        nn.Linear(llm["hidden_size"], dit["z_channels"]),
        DiT(DiTConfig(**dit, grid_size=4)),
    )


def official_batch(golden: Golden) -> dict[str, Tensor]:
    inputs = golden.inputs
    noise, t = inputs["noise_chw"].flatten(2).transpose(1, 2), inputs["t"]
    mix = t[:, None, None]
    return {
        "input_ids": inputs["input_ids"],
        "labels": inputs["labels"],
        "attention_mask": inputs["attention_mask"],
        "answer_start": inputs["query_start"],
        "user_start": torch.full_like(inputs["query_start"], -1),
        "user_features": torch.zeros_like(inputs["latents"]),
        "x_t": (1 - mix) * inputs["latents"] + mix * noise,
        "t": t,
        "drop": torch.zeros(len(t), dtype=torch.bool),
    }


def test_equals_the_official_forward(golden: Golden) -> None:
    model = official_model(golden)
    load_official_t2i(model, golden.state)
    batch = official_batch(golden)
    with torch.no_grad():
        out = model(**batch)
        for_sampling = [batch[name] for name in ("input_ids", "attention_mask", "answer_start", "user_start")]
        condition = model.condition(*for_sampling, batch["user_features"])
        states = model.conditioner(*for_sampling, batch["user_features"]).query_states
    torch.testing.assert_close(states, golden.outputs["query_states"], **TOLERANCE)
    torch.testing.assert_close(condition, golden.outputs["condition"], **TOLERANCE)
    noise = golden.inputs["noise_chw"].flatten(2).transpose(1, 2)
    flow = (out.velocity - (noise - golden.inputs["latents"])).square().mean(dim=(1, 2))
    torch.testing.assert_close(flow, golden.outputs["loss_flow_per_sample"], **TOLERANCE)
    labelled = (batch["labels"][:, 1:] != IGNORE_LABEL).sum()
    text = out.text_loss_sum / labelled
    torch.testing.assert_close(text, golden.outputs["loss_text"], **TOLERANCE)
    total = text + golden.config["vision_coef"] * flow.mean()
    torch.testing.assert_close(total, golden.outputs["loss"], **TOLERANCE)


def test_official_checkpoint_that_does_not_fit_changes_nothing(golden: Golden) -> None:
    torch.manual_seed(0)
    model = official_model(golden)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = dict(golden.state)
    del state["model.latent_queries"]
    state["diff_head_projector.bias"] = torch.zeros(3)
    state["model.vision.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match="does not fit") as error:
        load_official_t2i(model, state)
    for line in (
        "conditioner.latent_queries [16, 48] is missing",
        "connector.bias is [3] in the checkpoint, [40] in the model",
        "conditioner.llm.model.vision.weight [1] is not part of this model",
    ):
        assert line in str(error.value)
    state = dict(golden.state)
    del state["diff_head.model.final_layer.linear.bias"]
    with pytest.raises(ValueError, match=r"final_layer\.linear\.bias"):
        load_official_t2i(model, state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_tied_output_layer_may_be_left_out_or_spelled_out_but_not_differ(golden: Golden) -> None:
    model = official_model(golden, tied=True)
    embedding = golden.state["model.embed_tokens.weight"]
    with pytest.raises(ValueError, match="tie_word_embeddings=False"):
        load_official_t2i(model, golden.state)
    for state in (
        {**golden.state, "lm_head.weight": embedding.clone()},
        {name: tensor for name, tensor in golden.state.items() if name != "lm_head.weight"},
    ):
        nn.init.zeros_(model.conditioner.llm.lm_head.weight)
        load_official_t2i(model, state)
        assert torch.equal(model.conditioner.llm.lm_head.weight, embedding)
        assert torch.equal(model.conditioner.llm.model.embed_tokens.weight, embedding)


def tiny_config(**llm: object) -> ModelConfig:
    return ModelConfig(name="dit-tiny", llm=LLMConfig(name="qwen2-tiny", **llm))


def tiny_model(seed: int = 0, **llm: object) -> ScaleRAE:
    torch.manual_seed(seed)
    return build_scale_rae(tiny_config(**llm), encoder_channels=16, num_tokens=16, tokenizer_vocab=300)


def tiny_batch() -> dict[str, Tensor]:
    """A generating, an understanding and a text-only sample."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 300, (3, 24), generator=generator)
    labels = input_ids.clone()
    labels[:, :20] = IGNORE_LABEL
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": torch.ones_like(input_ids),
        "answer_start": torch.tensor([4, -1, -1]),
        "user_start": torch.tensor([-1, 2, -1]),
        "user_features": torch.randn(3, 16, 16, generator=generator),
        "x_t": torch.randn(3, 16, 16, generator=generator),
        "t": torch.rand(3, generator=generator),
        "drop": torch.tensor([False, False, False]),
    }


def open_gates(model: ScaleRAE) -> None:
    """A new DiT is the zero function; give its closed layers some weight."""
    torch.manual_seed(3)
    for parameter in model.dit.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def test_mixed_batch_equals_its_samples_alone() -> None:
    model, batch = tiny_model(), tiny_batch()
    open_gates(model)
    with torch.no_grad():
        out = model(**batch)
        alone = [model(**{name: value[i : i + 1] for name, value in batch.items()}) for i in range(3)]
    torch.testing.assert_close(out.velocity, torch.cat([one.velocity for one in alone]), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.text_loss_sum, sum(one.text_loss_sum for one in alone), rtol=1e-6, atol=0)
    assert out.text_loss_sum > 0


def test_the_prompt_reaches_the_velocity_unless_dropped() -> None:
    model, batch = tiny_model(), tiny_batch()
    open_gates(model)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 1] = 299
    with torch.no_grad():
        assert not torch.equal(model(**batch).velocity[0], model(**changed).velocity[0])
        drop = {"drop": torch.tensor([True, False, False])}
        assert torch.equal(model(**{**batch, **drop}).velocity[0], model(**{**changed, **drop}).velocity[0])


def test_every_parameter_has_a_gradient_without_any_image() -> None:
    model, batch = tiny_model(), tiny_batch()
    none = torch.full((3,), -1)
    out = model(**{**batch, "answer_start": none, "user_start": none})
    (out.text_loss_sum + 0.0 * out.velocity.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_same_seed_same_weights() -> None:
    first, second, other = tiny_model(0), tiny_model(0), tiny_model(1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert not torch.equal(first.conditioner.latent_queries, other.conditioner.latent_queries)
    assert not torch.equal(first.conditioner.llm.lm_head.weight, other.conditioner.llm.lm_head.weight)


def test_builds_on_meta_at_full_size() -> None:
    cfg = ModelConfig(name="dit-2.4b", llm=LLMConfig(name="qwen2.5-1.5b"))
    with torch.device("meta"):
        model = build_scale_rae(cfg, encoder_channels=1152, num_tokens=256, tokenizer_vocab=151_667)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.conditioner.llm.lm_head.weight.shape == (151_667, 1536)
    assert model.conditioner.latent_queries.shape == (256, 1536)
    assert model.connector.weight.shape == (2048, 1536)


def test_groups_cover_the_model() -> None:
    groups = {name: group_of(name) for name, _ in tiny_model().named_parameters()}
    assert groups["conditioner.latent_queries"] == "llm"
    assert groups["conditioner.mm_projector.0.weight"] == "llm"
    assert groups["conditioner.llm.model.norm.weight"] == "llm"
    assert groups["connector.weight"] == "dit"
    assert {group for name, group in groups.items() if name.startswith("dit.")} == {"dit"}
    with pytest.raises(ValueError, match=r"'module\.dit\.final'"):
        group_of("module.dit.final")


def test_frozen_language_model_still_trains_queries_connector_and_dit() -> None:
    model = tiny_model(train=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "conditioner.latent_queries" in trained
    assert {"connector.weight", "connector.bias"} <= trained
    assert not any(name.startswith(("conditioner.llm.", "conditioner.mm_projector.")) for name in trained)
    assert trained >= {name for name, _ in model.named_parameters() if name.startswith("dit.")}


def test_connector_and_mask_follow_the_config() -> None:
    assert isinstance(tiny_model().connector, nn.Linear)
    model = tiny_model(connector="mlp", mask="query-block")
    assert [type(part) for part in model.connector] == [nn.Linear, nn.GELU, nn.Linear]
    assert model.conditioner.mask == "query-block"


def test_dit_of_another_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.name='dit-tiny' generates 16 tokens of 16 .*gives 16 of 64"):
        build_scale_rae(tiny_config(), encoder_channels=64, num_tokens=16, tokenizer_vocab=None)


def test_bf16_autocast_keeps_losses_in_float32() -> None:
    model, batch = tiny_model(mask="query-block"), tiny_batch()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    reference = model(**batch)
    assert out.text_loss_sum.dtype == torch.float32
    torch.testing.assert_close(out.text_loss_sum, reference.text_loss_sum, rtol=2e-2, atol=0)
    (out.text_loss_sum + out.velocity.float().sum()).backward()
