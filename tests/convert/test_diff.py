"""Two checkpoints compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rae_scale.convert import diff as diff_module
from rae_scale.convert.convert import convert
from rae_scale.convert.diff import diff
from rae_scale.state import CheckpointError
from tests.convert.conftest import Runs

NAME = "dit.blocks.1.attn.proj.weight"


@pytest.fixture
def pair(runs: Runs, tmp_path: Path) -> tuple[Path, Path]:
    """Two equal files of weights under our names."""
    out = convert(runs.untied, tmp_path / "export", "native", weights="weight").out
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for path in paths:
        path.write_bytes((out / "model.safetensors").read_bytes())
    return paths


def change(path: Path, edit: Any) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"kind": "weight"})


def test_equal(pair: tuple[Path, Path]) -> None:
    found = diff(*pair)
    assert not found.differences
    assert found.tensors == len(load_file(pair[0]))
    assert found.elements == sum(tensor.numel() for tensor in load_file(pair[0]).values())
    assert found.kinds == ["weight"]


def test_elements_and_their_largest_differences(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff_module, "CHUNK_ELEMENTS", 100)

    def edit(tensors: Any) -> None:
        tensors[NAME][0, 0] += 0.5
        tensors[NAME][-1, -1] -= 0.25
        tensors["connector.bias"][0] = float("nan")

    change(pair[1], edit)
    bias, weight = sorted(diff(*pair).differences, key=lambda difference: difference.name)
    largest = float(load_file(pair[0])[NAME].abs().max())
    assert (bias.name, bias.elements, weight.elements) == ("connector.bias", 1, 2)
    assert weight.max_absolute == pytest.approx(0.5)
    assert weight.max_relative == pytest.approx(0.5 / largest)
    assert bias.max_absolute != bias.max_absolute, "NaN stands out"
    assert f"weight of {NAME} [48, 48]: 2 of 2,304 elements differ, by at most 0.5" in str(weight)


def test_forms_and_missing_tensors(pair: tuple[Path, Path]) -> None:
    def edit(tensors: Any) -> None:
        tensors["connector.bias"] = tensors["connector.bias"].bfloat16()
        tensors["dit.final.linear.bias"] = tensors["dit.final.linear.bias"][1:].clone()
        tensors["extra"] = tensors.pop(NAME)

    change(pair[1], edit)
    found = {difference.name: str(difference) for difference in diff(*pair).differences}
    assert "not in B" in found[NAME]
    assert "not in A" in found["extra"]
    assert "shape [16] in A, [15] in B" in found["dit.final.linear.bias"]
    assert "float32 in A, bfloat16 in B" in found["connector.bias"]
    assert len(found) == 4


def test_a_cast_that_lost_nothing_is_still_another_dtype(pair: tuple[Path, Path]) -> None:
    for path, dtype in zip(pair, (torch.float32, torch.bfloat16), strict=True):
        change(path, lambda tensors, dtype=dtype: tensors.update({"connector.bias": torch.ones(48, dtype=dtype)}))
    (difference,) = diff(*pair).differences
    assert "float32 in A, bfloat16 in B; 0 of 48 elements differ" in str(difference)


def test_every_kind_that_both_have(runs: Runs, tmp_path: Path) -> None:
    copy = convert(runs.untied, tmp_path / "copy", "checkpoint").out
    found = diff(runs.untied, copy)
    assert set(found.kinds) == {"weight", "ema", "exp_avg", "exp_avg_sq"}
    assert not found.differences
    assert not found.remarks
    assert diff(runs.untied, copy, kinds=["ema"]).tensors * 4 == found.tensors


def test_a_kind_that_one_lacks(runs: Runs, tmp_path: Path) -> None:
    raw = convert(runs.untied, tmp_path / "raw", "native", weights="weight").out
    found = diff(runs.untied, raw)
    assert found.remarks == [f"only checkpoint {runs.untied}/checkpoints/step-00000007 has ema, exp_avg, exp_avg_sq"]
    assert not found.differences
    with pytest.raises(CheckpointError, match=r"raw has no ema; it has weight"):
        diff(runs.untied, raw, kinds=["ema"])


def test_a_moving_average_is_compared_with_the_moving_average(runs: Runs, tmp_path: Path) -> None:
    average = convert(runs.untied, tmp_path / "average", "native").out
    for pair in ((runs.untied, average), (average, runs.untied)):
        found = diff(*pair)
        assert not found.differences
        assert "the moving average is compared" in found.remarks[0]


def test_formats_are_compared_under_our_names(runs: Runs, tmp_path: Path) -> None:
    official = convert(runs.tied, tmp_path / "official", "official", weights="weight").out
    found = diff(official, runs.tied)
    assert not found.differences
    assert found.tensors == diff(runs.tied, runs.tied, kinds=["weight"]).tensors


def test_other_models_are_listed(runs: Runs) -> None:
    found = diff(runs.untied, runs.ddt, kinds=["weight"])
    assert any("not in A" in str(difference) for difference in found.differences)
