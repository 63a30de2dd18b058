from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rae_scale.engines import Engine
from rae_scale.parallel import Mesh
from rae_scale.state import CheckpointError, read_weights, save_checkpoint
from rae_scale.state.tensorfile import TensorToWrite, write_tensors

FROZEN = "conditioner.projector.weight"


@pytest.fixture
def saved(engine: Engine, mesh: Mesh, tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "run", 2, engine, mesh, {"config": {"model": {"name": "toy"}}}, keep_last=1)


def tensors(engine: Engine, kind: str) -> dict[str, Tensor]:
    return {p.name: p.tensor for p in engine.pieces() if p.kind == kind}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_raw_weights(saved: Path, engine: Engine) -> None:
    assert_same(read_weights(saved, "weight"), tensors(engine, "weight"))
    assert_same(read_weights(saved, "weight"), dict(engine.module.named_parameters()))


@pytest.mark.parametrize("kind", ["ema", None])
def test_the_average_and_frozen_weights_beside_it(kind: str | None, saved: Path, engine: Engine) -> None:
    expected = tensors(engine, "ema") | {
        name: tensor for name, tensor in tensors(engine, "weight").items() if "projector" in name
    }
    found = read_weights(saved, kind)
    assert_same(found, expected)
    assert not torch.equal(found["connector.weight"], tensors(engine, "weight")["connector.weight"])


def test_a_prefix_is_cut_off(saved: Path, engine: Engine) -> None:
    found = read_weights(saved, "weight", prefix="dit.")
    engine.module.dit.load_state_dict(found)
    with pytest.raises(CheckpointError, match=r"no tensor's name begins with 'unet.'"):
        read_weights(saved, "weight", prefix="unet.")


def test_a_run_without_an_average(build: Callable[..., Engine], mesh: Mesh, tmp_path: Path) -> None:
    engine = build(ema_decay=None)
    path = save_checkpoint(tmp_path, 1, engine, mesh, {}, keep_last=1)
    assert_same(read_weights(path), tensors(engine, "weight"))
    with pytest.raises(CheckpointError, match=r"no moving average.*optim.ema_decay was not set.*kind='weight'"):
        read_weights(path, "ema")


def test_damage_is_found(saved: Path) -> None:
    path = saved / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_weights(saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_writer_writes_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    contents = {
        "matrix": torch.randn(3, 5).t(),
        "vector": torch.randn(7),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0),
        "nämé": torch.ones(2, 1, 2),
    }
    path = tmp_path / "file.safetensors"
    to_write = [TensorToWrite(name, tuple(t.shape), dtype, lambda t=t: [t]) for name, t in contents.items()]
    digest = write_tensors(path, to_write, {"kind": "ema"})
    assert digest == xxhash.xxh3_128_hexdigest(path.read_bytes())
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0, "tensors begin aligned, as the library's own do"
    assert_same(load_file(path), {name: tensor.to(dtype) for name, tensor in contents.items()})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"kind": "ema"}
