"""The RAE decoder folder: the published module's weights and outputs, there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rae_scale.convert.convert import convert
from rae_scale.models.decoder import ViTDecoder
from rae_scale.models.official import decoder_config, from_official
from rae_scale.state import read_weights
from rae_scale.train.parts import load_weights
from tests.infer.trained import Trained
from tests.models.conftest import Golden, read_golden


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden("decoder_tiny")


@pytest.fixture
def published(golden: Golden, tmp_path: Path) -> Path:
    """The published module's weights, as the release saves them."""
    folder = tmp_path / "published"
    folder.mkdir()
    torch.save(golden.part("state."), folder / "model.pt")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit_mae", **golden.config}))
    return folder


def test_published_weights_give_the_published_pixels(published: Path, golden: Golden, tmp_path: Path) -> None:
    # Without a name for these sizes, settings have to come from elsewhere; the weights do not need them.
    out = convert(published, tmp_path / "again", "official-decoder", verify=True).out
    state = torch.load(out / "model.pt", weights_only=True)
    config = json.loads((out / "config.json").read_text())
    decoded = from_official(state, config)(golden["in.z"])
    torch.testing.assert_close(decoded.logits, golden["out.logits"], atol=1e-5, rtol=1e-5)
    assert {name: config[name] for name in golden.config if name != "num_patches"} == {
        name: value for name, value in golden.config.items() if name != "num_patches"
    }


def test_published_weights_come_back_bit_for_bit(published: Path, golden: Golden, tmp_path: Path) -> None:
    out = convert(published, tmp_path / "again", "official-decoder").out
    state, expected = torch.load(out / "model.pt", weights_only=True), golden.part("state.")
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].shape == tensor.shape
        if name == "decoder_pos_embed":  # computed here, and compared on the way in
            torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=0)
        else:
            assert torch.equal(state[name], tensor), name


def test_our_decoder_goes_there_and_back(trained: Trained, tmp_path: Path) -> None:
    out = convert(trained.decoder_run, tmp_path / "official", "official-decoder", verify=True).out
    config = json.loads((out / "config.json").read_text())
    model = from_official(torch.load(out / "model.pt", weights_only=True), config)
    expected = ViTDecoder(decoder_config(config))
    weights = read_weights(trained.decoder)
    load_weights(expected, weights, "the export")
    z = torch.randn(2, 16, 16)
    assert isinstance(model, ViTDecoder)
    assert torch.equal(model.decode(z), expected.decode(z))
    back = read_weights(convert(out, tmp_path / "back", "native").out)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_text_to_image_model_is_no_decoder(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a ViT decoder"):
        convert(trained.run, tmp_path / "out", "official-decoder")
