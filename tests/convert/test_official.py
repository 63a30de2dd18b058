"""The Scale-RAE layout: its own modules' weights and outputs, there and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rae_scale import RaeScale
from rae_scale.config import parse_config
from rae_scale.convert.convert import convert
from rae_scale.convert.official_config import to_official_config
from rae_scale.data.tokenizer import load_tokenizer
from rae_scale.infer.load import stored_config
from rae_scale.models.composite import build_scale_rae, load_official_t2i
from rae_scale.models.dit import DiTConfig
from rae_scale.models.llm_zoo import LLM_ZOO, LLMSpec
from rae_scale.models.official import from_official
from rae_scale.models.zoo import DIT_ZOO
from rae_scale.state import latest_checkpoint, read_weights
from rae_scale.train.parts import load_weights
from tests.infer.trained import STEPS, Trained, save_run
from tests.models.conftest import Golden, read_golden


@pytest.fixture(scope="module")
def official(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(trained.run, tmp_path_factory.mktemp("official") / "out", "official", verify=True).out


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    state = {}
    for name in sorted(set(index["weight_map"].values())):
        state |= load_file(folder / name)
    assert state.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    return state


def test_the_loader_that_is_held_to_the_published_module_takes_it(official: Path, trained: Trained) -> None:
    pipeline = RaeScale.from_pretrained(trained.run, device="cpu").pipeline
    expected, state = pipeline.model, state_of(official)
    config = json.loads((official / "config.json").read_text())
    model = build_scale_rae(pipeline.config.model, 16, 16, config["vocab_size"])
    load_official_t2i(model, state)
    for (name, ours), theirs in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    prefix = "diff_head.model."
    dit = from_official(
        {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)},
        {
            "in_channels": config["diffusion_model_channels"],
            "hidden_size": config["diffusion_model_hidden_size"],
            "depth": config["diffusion_model_depth"],
            "num_heads": config["diffusion_model_heads"],
            "z_channels": config["diffusion_model_z_channels"],
        },
    )
    x, t, y = torch.randn(2, 16, 16), torch.rand(2), torch.randn(2, 16, 48)
    assert torch.equal(dit.forward_tokens(x, t, y, None), expected.dit.forward_tokens(x, t, y, None))


def test_it_is_laid_out_like_the_release(official: Path) -> None:
    names = {path.name for path in official.iterdir()}
    assert {"config.json", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"} <= names
    state = state_of(official)
    assert {"model.latent_queries", "diff_head_projector.weight", "model.mm_projector.2.bias", "lm_head.weight"} <= set(
        state
    )
    tables = {name for name in state if "pos_embed" in name or "rope" in name}
    assert tables == {f"diff_head.model.{name}" for name in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")}
    assert state["diff_head.model.x_embedder.proj.weight"].shape == (48, 16, 1, 1)
    assert state["diff_head.model.dit_blocks.0.mlp.w12.weight"].shape == (2 * 128, 48)
    config = json.loads((official / "config.json").read_text())
    assert config["model_type"] == "cambrian_qwen"
    tokenizer = AutoTokenizer.from_pretrained(official)
    assert config["vocab_size"] == len(tokenizer) == len(state["model.embed_tokens.weight"])
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer("a<im_start>b").input_ids[1] == tokenizer.convert_tokens_to_ids("<im_start>")


def test_the_old_tokenizer_format_gives_the_same_tokens(official: Path) -> None:
    from transformers import Qwen2Tokenizer

    new = AutoTokenizer.from_pretrained(official)
    old = Qwen2Tokenizer(str(official / "vocab.json"), str(official / "merges.txt"))
    for text in ("a red picture", "Which colour?\nblue  12", "déjà vu"):
        assert old.tokenize(text) == new.tokenize(text)


@pytest.mark.parametrize("to", ["official", "official-consolidated"])
def test_it_comes_back_bit_for_bit(to: str, trained: Trained, tmp_path: Path) -> None:
    out = convert(trained.run, tmp_path / "out", to, weights="weight", verify=True).out
    back = convert(out, tmp_path / "back", "native")
    checkpoint = latest_checkpoint(trained.run)
    assert checkpoint is not None
    found, expected = read_weights(back.out), read_weights(checkpoint, "weight")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any("sampler" in remark for remark in back.remarks)


@pytest.mark.parametrize("through_an_export", [False, True])
def test_it_becomes_a_shared_folder_that_draws_the_same(
    through_an_export: bool, official: Path, trained: Trained, tmp_path: Path
) -> None:
    source = convert(official, tmp_path / "native", "native").out if through_an_export else official
    out = convert(source, tmp_path / "hf", "hf", decoder=trained.decoder).out
    ours, theirs = (
        RaeScale.from_pretrained(path, device="cpu").generate("a red picture", seed=3, steps=STEPS, guidance=2.0)
        for path in (trained.run, out)
    )
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    # What it was trained with is not known any more, and the defaults are not it.
    card = (out / "README.md").read_text()
    assert "| Steps | 1 |" in card
    assert "| Settings | not recorded |" in card


@pytest.fixture
def published(golden_zoo: Golden, trained: Trained, tmp_path: Path) -> Path:
    """The published module's weights in the release's files."""
    folder = tmp_path / "published"
    tokenizer = load_tokenizer(trained.world.tokenizer)
    missing = golden_zoo.config["llm"]["vocab_size"] - len(tokenizer)
    tokenizer.add_tokens([f"<extra-{number}>" for number in range(missing)])
    tokenizer.save_pretrained(folder)
    save_file(golden_zoo.part("state."), folder / "model.safetensors")
    config = parse_config(
        {
            "model": {
                "name": "dit-golden",
                "llm": {"name": "qwen2-golden"},
                "encoder": {"name": "siglip-demo", "path": trained.world.encoder},
            }
        }
    )
    settings = to_official_config(config, golden_zoo.config["llm"]["vocab_size"]).settings
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def golden_zoo(monkeypatch: pytest.MonkeyPatch) -> Golden:
    """The published module, whose sizes have names for once."""
    golden = read_golden("composite_tiny")
    monkeypatch.setitem(LLM_ZOO, "qwen2-golden", LLMSpec(**golden.config["llm"]))
    monkeypatch.setitem(DIT_ZOO, "dit-golden", DiTConfig(**golden.config["dit"], grid_size=4))
    return golden


def test_published_weights_become_ours_with_the_published_outputs(
    published: Path, golden_zoo: Golden, tmp_path: Path
) -> None:
    out = convert(published, tmp_path / "native", "native", verify=True).out
    model = build_scale_rae(stored_config(out).model, 24, 16, golden_zoo.config["llm"]["vocab_size"])
    load_weights(model, read_weights(out), str(out))
    inputs = golden_zoo.part("in.")
    start, latents = inputs["query_start"], inputs["latents"]
    nowhere, nothing = torch.full_like(start, -1), torch.zeros_like(latents)
    noise, mix = inputs["noise_chw"].flatten(2).transpose(1, 2), inputs["t"][:, None, None]
    with torch.no_grad():
        condition = model.condition(inputs["input_ids"], inputs["attention_mask"], start, nowhere, nothing)
        velocity = model.velocity((1 - mix) * latents + mix * noise, inputs["t"], condition)
    torch.testing.assert_close(condition, golden_zoo["out.condition"], atol=2e-5, rtol=0)
    flow = (velocity - (noise - latents)).square().mean(dim=(1, 2))
    torch.testing.assert_close(flow, golden_zoo["out.loss_flow_per_sample"], atol=2e-5, rtol=0)


def test_published_weights_come_back_bit_for_bit(published: Path, golden_zoo: Golden, tmp_path: Path) -> None:
    native = convert(published, tmp_path / "native", "native").out
    # A SwiGLU of 106 is held padded, and the release's files have no place for that.
    assert read_weights(native)["dit.blocks.0.mlp.w3.weight"].shape[1] > 106
    state = state_of(convert(native, tmp_path / "official", "official", verify=True).out)
    expected = golden_zoo.part("state.")
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].shape == tensor.shape
        if "pos_embed" in name or "rope" in name:  # computed here, and compared on the way in
            torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=0)
        else:
            assert torch.equal(state[name], tensor), name


def test_a_tied_output_layer_is_spelled_out(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LLM_ZOO, "qwen2-tiny", replace(LLM_ZOO["qwen2-tiny"], tie_word_embeddings=True))
    run = save_run(trained.world.config(tmp_path / "run"))
    out = convert(run, tmp_path / "official", "official", verify=True).out
    state = state_of(out)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
    back = read_weights(convert(out, tmp_path / "back", "native").out)
    assert "conditioner.llm.lm_head.weight" not in back
    assert torch.equal(back["conditioner.llm.model.embed_tokens.weight"], state["lm_head.weight"])


def test_another_tokenizer_is_refused(trained: Trained, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(trained.world.tokenizer)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = RaeScale.from_pretrained(trained.run, device="cpu").pipeline.config
    llm = config.model.llm.model_copy(update={"tokenizer": str(tmp_path / "tokenizer")})
    config = config.model_copy(update={"model": config.model.model_copy(update={"llm": llm})})
    with pytest.raises(ValueError, match=r"embedding has \d+ rows and its tokenizer \d+ tokens"):
        convert(trained.run, tmp_path / "out", "official", config=config)
