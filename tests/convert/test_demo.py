"""The weights that ship with the package, whose settings name assets and not folders, through the converters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from rae_scale import RaeScale
from rae_scale.config.paths import ASSET_ROOT
from rae_scale.convert.convert import convert

PROMPT = "a photo of a blue ring"


def test_the_shipped_model_becomes_a_folder_that_draws_the_same(tmp_path: Path) -> None:
    shipped = ASSET_ROOT / "demo/model"
    convert(shipped, tmp_path / "hf", "hf", verify=True)
    pictures = [
        RaeScale.from_pretrained(folder, device="cpu", **options).generate(PROMPT, seed=3, steps=2)
        for folder, options in ((tmp_path / "hf", {}), (shipped, {"decoder": ASSET_ROOT / "demo/decoder"}))
    ]
    assert np.array_equal(*map(np.asarray, pictures))


def test_the_shipped_decoder_goes_to_the_release_and_back(tmp_path: Path) -> None:
    convert(ASSET_ROOT / "demo/decoder", tmp_path / "official", "official-decoder", verify=True)
    convert(tmp_path / "official", tmp_path / "back", "native", verify=True)
    ours, back = (folder / "model.safetensors" for folder in (ASSET_ROOT / "demo/decoder", tmp_path / "back"))
    ours_tensors, back_tensors = load_file(ours), load_file(back)
    assert ours_tensors.keys() == back_tensors.keys()
    assert all(np.array_equal(ours_tensors[name], back_tensors[name]) for name in ours_tensors)
