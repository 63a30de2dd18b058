"""Adapters merged into the language model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rae_scale.convert.convert import convert
from rae_scale.convert.lora import ROWS, Change
from rae_scale.convert.sinks import To
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state import latest_checkpoint, read_weights
from tests.convert.conftest import Runs

RANK, ALPHA, HIDDEN, INNER = 2, 6, 48, 96
LAYERS = {"model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN), "model.layers.1.mlp.down_proj": (HIDDEN, INNER)}
SETTINGS = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"]}


def adapter(folder: Path, transposed: bool = False, **settings: Any) -> tuple[Path, dict[str, Tensor]]:
    """A PEFT folder and its tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, (rows, columns) in LAYERS.items():
        out, inner = (columns, rows) if transposed else (rows, columns)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(RANK, inner, generator=generator)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    write(folder, tensors, {**SETTINGS, **settings})
    return folder, tensors


def write(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
        ({"fan_in_fan_out": True}, ALPHA / RANK),
        ({"target_modules": r".*layers\.\d\.(self_attn\.q_proj|mlp\.down_proj)"}, ALPHA / RANK),
        ({"target_modules": "all-linear", "lora_alpha": 1}, 1 / RANK),
    ],
)
def test_it_is_added(settings: dict[str, Any], scale: float, runs: Runs, tmp_path: Path) -> None:
    transposed = settings.get("fan_in_fan_out", False)
    folder, tensors = adapter(tmp_path / "adapter", transposed, **settings)
    convert(runs.untied, tmp_path / "out", "native", weights="weight", lora=folder, verify=True)
    checkpoint = latest_checkpoint(runs.untied)
    assert checkpoint is not None
    expected, found = read_weights(checkpoint, "weight"), read_weights(tmp_path / "out")
    for layer in LAYERS:
        a, b = (tensors[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        product = b @ a
        name = f"conditioner.llm.{layer}.weight"
        expected[name] = expected[name] + scale * (product.t() if transposed else product)
        torch.testing.assert_close(found[name], expected.pop(name), rtol=1e-6, atol=1e-6)
        del found[name]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_in_other_formats_too(runs: Runs, tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "adapter")
    convert(runs.untied, tmp_path / "native", "native", lora=folder)
    convert(runs.untied, tmp_path / "official", "official", lora=folder, verify=True)
    convert(tmp_path / "official", tmp_path / "back", "native", verify=True)
    there, back = read_weights(tmp_path / "native"), read_weights(tmp_path / "back")
    assert all(torch.equal(there[name], back[name]) for name in there)


def test_any_part_of_it_has_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = 2 * ROWS + 7, 33
    up, down = torch.randn(rows, 64, generator=generator), torch.randn(64, columns, generator=generator)
    for change in (Change(up, down, 0.3, transposed=False), Change(down.t(), up.t(), 0.3, transposed=True)):
        assert change.shape == (rows, columns)
        everything = change.read(whole(change.shape))
        torch.testing.assert_close(everything, 0.3 * (up @ down), rtol=1e-5, atol=1e-4)
        for first, last, left, right in ((0, 1, 0, 33), (255, 257, 3, 9), (300, rows, 0, 1), (518, 519, 0, 33)):
            box = Box((first, left), (last, right))
            assert torch.equal(change.read(box), everything[box.slices])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"use_dora=True; plain LoRA .* merge this one with PEFT"),
        ({"peft_type": "LOHA"}, r"peft_type='LOHA'"),
        ({"bias": "all"}, r"bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"alpha_pattern": {"q_proj": 3}}, r"alpha_pattern="),
        ({"target_modules": ["q_proj"]}, r"model\.layers\.1\.mlp\.down_proj\.lora_A, .*cannot be merged"),
        ({"r": 4}, r"r=4, and the tensors are of rank 2"),
    ],
)
def test_settings_that_mean_something_else(change: Any, message: str, runs: Runs, tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "adapter", **change)
    refused(runs.untied, folder, message, tmp_path)


def refused(run: Path, folder: Path, message: str, tmp_path: Path, to: To = "native") -> None:
    with pytest.raises(ValueError, match=message):
        convert(run, tmp_path / "out", to, lora=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.self_attn.k_proj.lora_A.weight", (RANK, HIDDEN), "k_proj.lora_A cannot be merged"),
        ("model.embed_tokens.lora_embedding_A", (RANK, 302), "lora_embedding_A cannot be merged"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", (HIDDEN,), "magnitude_vector cannot be merged"),
        (
            "model.layers.7.self_attn.q_proj.lora_A.weight",
            (RANK, HIDDEN),
            r"layers\.7\.self_attn\.q_proj\.lora_A",
        ),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (RANK, 47), r"lora_A \[2, 47\] and lora_B .* another model"),
    ],
)
def test_tensors_that_would_not_be_merged(
    name: str, shape: tuple[int, ...], message: str, runs: Runs, tmp_path: Path
) -> None:
    folder, tensors = adapter(tmp_path / "adapter")
    write(folder, {**tensors, f"base_model.model.{name}": torch.zeros(shape)}, SETTINGS)
    refused(runs.untied, folder, message, tmp_path)


def test_a_tied_output_layer_is_no_layer_of_its_own(runs: Runs, tmp_path: Path) -> None:
    sides = {"lora_A": torch.zeros(RANK, 128), "lora_B": torch.zeros(302, RANK)}
    tensors = {f"base_model.model.lm_head.{side}.weight": tensor for side, tensor in sides.items()}
    write(tmp_path / "adapter", tensors, {**SETTINGS, "target_modules": ["lm_head"]})
    refused(runs.tied, tmp_path / "adapter", r"lm_head\.lora_A, lm_head\.lora_B cannot be merged", tmp_path)


def test_optimizer_state_would_not_fit(runs: Runs, tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "adapter")
    refused(runs.untied, folder, "optimizer state belongs to the weights before", tmp_path, "checkpoint")


def test_without_its_weights(runs: Runs, tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(runs.untied, folder, r"adapter_model\.safetensors does not exist", tmp_path)
