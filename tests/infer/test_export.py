"""Exports are what the settings that take them expect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rae_scale.config.schema import EncoderConfig
from rae_scale.infer.export import export
from rae_scale.infer.load import find_checkpoint, stored_config
from rae_scale.models.encoders import build_encoder
from rae_scale.state import latest_checkpoint, read_weights
from tests.infer.trained import Trained, save_run


def test_an_encoder_run_becomes_an_encoder(trained: Trained, tmp_path: Path) -> None:
    run = save_run(trained.world.config(tmp_path / "encoder-run", stage="encoder"))
    encoder = build_encoder(EncoderConfig(name="siglip-demo", path=str(export(run, tmp_path / "encoder"))))
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    weights = read_weights(checkpoint, prefix="vision.")
    assert weights.keys() == dict(encoder.named_parameters()).keys()
    assert all(torch.equal(weights[name], parameter) for name, parameter in encoder.named_parameters())


def test_other_stages_keep_their_names_and_settings(trained: Trained, tmp_path: Path) -> None:
    folder = export(trained.run, tmp_path / "export", weights="raw", dtype="bfloat16", prefixes=["dit."])
    weights, checkpoint = read_weights(folder), find_checkpoint(trained.run)
    raw = read_weights(checkpoint, "weight", "dit.")
    assert {name.removeprefix("dit.") for name in weights} == raw.keys()
    assert all(torch.equal(weights[f"dit.{name}"], tensor.bfloat16()) for name, tensor in raw.items())
    assert stored_config(folder) == stored_config(checkpoint)


@pytest.mark.parametrize("run", ["run", "decoder_run"])
def test_nothing_is_overwritten(trained: Trained, run: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists"):
        export(getattr(trained, run), tmp_path)


def test_a_checkpoint_without_settings_is_named(trained: Trained, tmp_path: Path) -> None:
    folder = export(trained.run, tmp_path / "export")
    (folder / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config\.yaml holds no settings"):
        stored_config(folder)
