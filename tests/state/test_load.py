"""What comes back is what was saved, and anything else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from toy_model import WIDTH, toy, train_step

from rae_scale.engines import Engine
from rae_scale.parallel import Mesh
from rae_scale.state import CheckpointError, load_checkpoint, save_checkpoint


@pytest.fixture
def saved(engine: Engine, mesh: Mesh, tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, 2, engine, mesh, {}, keep_last=1)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    saved: Path, engine: Engine, build: Callable[..., Engine], mesh: Mesh
) -> None:
    resumed = build()
    train_step(resumed, 8, 0, 1, 1)
    assert load_checkpoint(saved, resumed, mesh)["step"] == 2
    for step in (2, 3):
        train_step(engine, step, 0, 1, 1)
        train_step(resumed, step, 0, 1, 1)
    expected = {(piece.kind, piece.name): piece.tensor for piece in engine.pieces()}
    for piece in resumed.pieces():
        assert torch.equal(piece.tensor, expected[piece.kind, piece.name]), piece.name


def test_an_average_can_be_started_at_a_resume(build: Callable[..., Engine], mesh: Mesh, tmp_path: Path) -> None:
    without = build(ema_decay=None)
    train_step(without, 0, 0, 1, 1)
    path = save_checkpoint(tmp_path, 1, without, mesh, {}, keep_last=1)
    engine = build()
    load_checkpoint(path, engine, mesh)
    tensors = {(piece.kind, piece.name): piece.tensor for piece in engine.pieces()}
    assert torch.equal(tensors["ema", "connector.weight"], tensors["weight", "connector.weight"])


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "index.json", "state.json"])
@pytest.mark.parametrize("fault", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_found_and_named(
    name: str, fault: str, saved: Path, build: Callable[..., Engine], mesh: Mesh
) -> None:
    path = saved / name
    data = bytearray(path.read_bytes())
    if fault == "flip":
        data[-3] ^= 1
        path.write_bytes(data)
    elif fault == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    engine = build()
    before = engine.module.connector.weight.clone()
    with pytest.raises(CheckpointError, match=rf"{name} is (damaged|missing).*use an older checkpoint"):
        load_checkpoint(saved, engine, mesh)
    assert torch.equal(engine.module.connector.weight, before)


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, engine: Engine, mesh: Mesh) -> None:
    with pytest.raises(CheckpointError, match=r"manifest.json does not exist: .* is not a complete checkpoint"):
        load_checkpoint(tmp_path / "nowhere", engine, mesh)


def test_another_shape_names_tensor_and_both_shapes(saved: Path, build: Callable[..., Engine], mesh: Mesh) -> None:
    model = toy()
    model.conditioner.queries = nn.Parameter(torch.zeros(7, WIDTH))
    with pytest.raises(CheckpointError, match=r"conditioner.queries has shape \[6, 12\] there and \[7, 12\] in this"):
        load_checkpoint(saved, build(model), mesh)


def test_a_tensor_that_the_checkpoint_lacks(saved: Path, build: Callable[..., Engine], mesh: Mesh) -> None:
    model = toy()
    model.dit.extra = nn.Linear(2, 3)
    with pytest.raises(
        CheckpointError, match=r"has no tensor dit.extra.weight \[3, 2\], which this model has; .*model\.\*"
    ):
        load_checkpoint(saved, build(model), mesh)


def test_a_tensor_that_the_model_lacks(saved: Path, build: Callable[..., Engine], mesh: Mesh) -> None:
    model = toy()
    model.dit.blocks = model.dit.blocks[:1]
    with pytest.raises(CheckpointError, match=r"tensor\(s\) unknown to this model, dit.blocks.1"):
        load_checkpoint(saved, build(model), mesh)


def test_another_format_version_is_refused(saved: Path, build: Callable[..., Engine], mesh: Mesh) -> None:
    content = json.loads((saved / "index.json").read_text()) | {"version": 99}
    (saved / "index.json").write_text(json.dumps(content))
    (saved / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="version 99; this release reads"):
        load_checkpoint(saved, build(), mesh)
