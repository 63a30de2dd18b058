"""`convert`: what is taken, what is refused, what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rae_scale.config import parse_config
from rae_scale.convert.convert import convert
from rae_scale.convert.native import NativeCheckpoint
from rae_scale.convert.sinks import To
from rae_scale.engines import build_engine
from rae_scale.parallel import Mesh
from rae_scale.parallel.boxes import Box
from rae_scale.state import CheckpointError, latest_checkpoint, load_checkpoint, read_state, read_weights
from rae_scale.train.parts import build_parts
from rae_scale.train.resume import check_identity, identity
from tests.convert.conftest import DDT, Runs
from tests.convert.made import CPU, OPTIMIZER_STEP, STEP, filled, save_made

W12 = "dit.head.blocks.0.mlp.w12.weight"


def newest(run: Path) -> Path:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_export_stands_alone(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "exports" / "dit"
    report = convert(runs.untied, out, "native", dtype="bfloat16", only=["dit.", "connector."], verify=True)
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "config.yaml", "manifest.json"}
    assert [path.name for path in out.parent.iterdir()] == ["dit"]
    assert yaml.safe_load((out / "config.yaml").read_text()) == read_state(newest(runs.untied))["config"]
    averages = read_weights(newest(runs.untied), "ema")
    expected = {name: t.bfloat16() for name, t in averages.items() if name.startswith(("dit.", "connector."))}
    assert same(load_file(out / "model.safetensors"), expected)
    assert same(read_weights(out), expected)
    assert report.verified == sum(tensor.numel() for tensor in expected.values())
    assert (report.weights, report.tensors) == ("ema", len(expected))
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "kind": "ema", "step": str(STEP)}
    for name, digest in json.loads((out / "manifest.json").read_text()).items():
        assert xxhash.xxh3_128_hexdigest((out / name).read_bytes()) == digest


@pytest.mark.parametrize(("weights", "kind"), [(None, "ema"), ("ema", "ema"), ("weight", "weight")])
def test_the_kind_of_weights_that_is_asked_for(weights: Any, kind: Any, runs: Runs, tmp_path: Path) -> None:
    assert convert(runs.decoder, tmp_path / "out", "native", weights=weights).weights == kind
    assert same(read_weights(tmp_path / "out"), read_weights(newest(runs.decoder), kind))


def test_a_kind_that_is_not_there(runs: Runs, tmp_path: Path) -> None:
    average = convert(runs.decoder, tmp_path / "ema", "native").out
    with pytest.raises(CheckpointError, match=r"ema holds the moving average of the weights and no raw weights"):
        convert(average, tmp_path / "out", "native", weights="weight")
    assert not (tmp_path / "out").exists()


def test_casts_are_reported(runs: Runs, tmp_path: Path) -> None:
    weights = read_weights(newest(runs.untied), "weight")
    casts = convert(runs.untied, tmp_path / "out", "native", weights="weight", dtype="float16").casts
    errors = {name: float((t.half().float() - t).abs().max()) for name, t in weights.items()}
    relative = {name: error / float(weights[name].abs().max()) for name, error in errors.items()}
    assert (casts.absolute.error, casts.absolute.tensor) == max((error, name) for name, error in errors.items())
    assert casts.relative.error == pytest.approx(max(relative.values()))


def made(runs: Runs, folder: Path, change: Any, **settings: Any) -> Path:
    """A run whose model was changed before it was saved."""
    config = runs.world.config(folder / "run", **settings)
    module = filled(build_parts(config, CPU).stage.module)
    with torch.no_grad():
        change(dict(module.named_parameters()))
    return save_made(config, module)


def test_padding_that_is_not_zero_is_not_dropped(runs: Runs, tmp_path: Path) -> None:
    run = made(runs, tmp_path, lambda parameters: parameters[W12][-1, :2].fill_(1e-30), model__name=DDT)
    with pytest.raises(CheckpointError, match=rf"{W12} has 2 entries in its padding that are not zero"):
        convert(run, tmp_path / "out", "official", weights="weight")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    convert(run, tmp_path / "out", "native", weights="weight", verify=True)


def test_what_is_not_there_is_listed_before_anything_is_written(runs: Runs, tmp_path: Path) -> None:
    part = convert(runs.untied, tmp_path / "part", "native", only=["dit.", "conditioner.llm."]).out
    with pytest.raises(CheckpointError, match=r"connector\.weight \[\d+, \d+\] is missing"):
        convert(part, tmp_path / "out", "official")
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("native", {"only": ["unet."]}, r"no tensor's name begins with any of \['unet.'\]"),
        ("official", {"only": ["dit."]}, r"--only dit\.: an official checkpoint holds a whole model; use --to native"),
        ("checkpoint", {"only": ["dit."]}, "--only dit.: a checkpoint holds a whole model"),
        ("checkpoint", {"dtype": "bfloat16"}, "--dtype bfloat16: a checkpoint keeps float32"),
        ("checkpoint", {"weights": "ema"}, "--weights ema: a checkpoint keeps all kinds"),
        ("official-decoder", {}, r"holds a ViT decoder \(stage decoder\), and this is a ScaleRAE"),
    ],
)
def test_what_a_format_cannot_hold(to: To, options: Any, message: str, runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert(runs.untied, tmp_path / "out", to, **options)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists; write into a new folder"):
        convert(runs.untied, tmp_path, "native")


def test_an_encoder_run_is_for_another_command(runs: Runs, tmp_path: Path) -> None:
    run = save_made(runs.world.config(tmp_path / "run", stage="encoder"))
    with pytest.raises(CheckpointError, match="rae-scale checkpoint export"):
        convert(run, tmp_path / "out", "native")


def test_damage_is_found_before_anything_is_written(runs: Runs, tmp_path: Path) -> None:
    source = convert(runs.untied, tmp_path / "source", "native").out
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (source / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"source/model\.safetensors is damaged"):
        convert(source, tmp_path / "out", "native")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_checkpoint_is_the_same_checkpoint(runs: Runs, tmp_path: Path) -> None:
    out = convert(runs.untied, tmp_path / "out", "checkpoint").out
    assert read_state(out) == read_state(newest(runs.untied))


def test_training_can_go_on_from_weights_of_others(runs: Runs, tmp_path: Path) -> None:
    """An official checkpoint becomes one that a run loads: weights as they are, moments at zero."""
    official = convert(runs.untied, tmp_path / "official", "official", weights="weight").out
    config = runs.world.config(tmp_path / "run", optim__ema_decay=0.5)
    folder = tmp_path / "run" / "checkpoints" / "step-00000000"
    report = convert(official, folder, "checkpoint", config=config, verify=True)
    assert any("moments begin at zero" in remark for remark in report.remarks)
    check_identity(folder, identity(config))
    parts = build_parts(config, CPU)
    engine = build_engine(config.engine, config.optim, parts.stage.module, parts.stage.group_of, Mesh(CPU))
    state = load_checkpoint(folder, engine, Mesh(CPU))
    assert (state["optimizer_step"], state["skipped"]) == (0, 0)
    expected = read_weights(newest(runs.untied), "weight")
    for piece in engine.pieces():
        wanted = expected[piece.name] if piece.kind in ("weight", "ema") else torch.zeros(piece.shape)
        assert torch.equal(piece.tensor, wanted), (piece.kind, piece.name)
    engine.close()


def test_without_its_data_a_checkpoint_says_that_it_cannot_be_continued(runs: Runs, tmp_path: Path) -> None:
    export = convert(runs.untied, tmp_path / "export", "native").out
    tree = {**runs.world.tree(tmp_path / "run"), "data": {"sources": [{"path": str(tmp_path / "gone")}]}}
    report = convert(export, tmp_path / "out", "checkpoint", config=parse_config(tree))
    assert any("names no data that is here" in r or "name no data that is here" in r for r in report.remarks)
    assert "identity" not in read_state(tmp_path / "out")
    assert OPTIMIZER_STEP != read_state(tmp_path / "out")["optimizer_step"] == 0


class Interrupted(BaseException):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    real, reads = NativeCheckpoint.read, iter(range(10_000))

    def read(self: NativeCheckpoint, kind: Any, name: str, box: Box) -> Tensor:
        if next(reads) == after:
            raise Interrupted
        return real(self, kind, name, box)

    monkeypatch.setattr(NativeCheckpoint, "read", read)


@pytest.mark.parametrize("change", [None, "source", "options"])
def test_interrupted(change: str | None, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rae_scale.convert.stretches.STRETCH_BYTES", 1 << 16)
    run = save_made(runs.world.config(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 40)
        convert(run, tmp_path / "out", "native", weights="weight")
    assert not (tmp_path / "out").exists()
    kind: Any = "weight"
    if change == "source":
        run = save_made(runs.world.config(tmp_path / "run"))
    if change == "options":
        kind = "ema"
    report = convert(run, tmp_path / "out", "native", weights=kind, verify=True)
    expected = "continuing" if change is None else f"its {change} changed: beginning anew"
    assert expected in report.remarks[0]
    assert same(read_weights(tmp_path / "out"), read_weights(newest(run), kind))


def test_verification_finds_what_was_written_otherwise(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rae_scale.convert.casts import CastErrors

    real = CastErrors.cast

    def wrong(self: CastErrors, part: Tensor, dtype: torch.dtype, tensor: str) -> Tensor:
        out = real(self, part, dtype, tensor)
        if tensor == "dit.final.linear.bias":
            out = out.clone()
            out.view(-1)[3] += 1e-6
        return out

    monkeypatch.setattr(CastErrors, "cast", wrong)
    with pytest.raises(CheckpointError, match=r"1 of \d+ elements of weight of dit\.final\.linear\.bias"):
        convert(runs.untied, tmp_path / "out", "native", verify=True)
    assert not list(tmp_path.iterdir())


def test_a_source_without_settings_asks_for_them(runs: Runs, tmp_path: Path) -> None:
    official = convert(runs.tied, tmp_path / "official", "official", weights="weight").out
    (shard,) = official.glob("*.safetensors")
    with pytest.raises(CheckpointError, match=r"does not say which model it is of.*--config"):
        convert(shard, tmp_path / "out", "native")
    config = runs.world.config(tmp_path / "run", model__llm__name="qwen2-demo")
    convert(shard, tmp_path / "out", "native", config=config, verify=True)
    assert same(read_weights(tmp_path / "out"), read_weights(newest(runs.tied), "weight"))
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text()) == config.model_dump(mode="json")


def test_a_tied_head_that_differs_is_refused(runs: Runs, tmp_path: Path) -> None:
    official = convert(runs.tied, tmp_path / "official", "official", weights="weight").out
    (shard,) = official.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, tmp_path / "untied.safetensors")
    config = runs.world.config(tmp_path / "run", model__llm__name="qwen2-demo")
    with pytest.raises(CheckpointError, match=r"untied\.safetensors: lm_head\.weight differs from model\.embed_tokens"):
        convert(tmp_path / "untied.safetensors", tmp_path / "out", "native", config=config)


@pytest.mark.parametrize(("model", "name"), [("untied", "qwen2-tiny"), ("tied", "qwen2-demo")])
def test_a_bare_language_model_is_a_part_of_ours(model: str, name: str, runs: Runs, tmp_path: Path) -> None:
    """As transformers writes it: without the output layer where that is tied."""
    config = runs.world.config(tmp_path / "run", model__llm__name=name)
    llm = build_parts(config, CPU).stage.module.conditioner.llm
    llm.save_pretrained(tmp_path / "qwen2")
    assert ("lm_head.weight" in load_file(tmp_path / "qwen2" / "model.safetensors")) == (model == "untied")
    convert(tmp_path / "qwen2", tmp_path / "out", "native", config=config, verify=True)
    found = read_weights(tmp_path / "out", prefix="conditioner.llm.")
    assert same(found, dict(llm.named_parameters()))
    with pytest.raises(CheckpointError, match="does not say which model it is of"):
        convert(tmp_path / "qwen2", tmp_path / "other", "native")
    with pytest.raises(CheckpointError, match=r"weight of connector\.bias is not in the source"):
        convert(tmp_path / "qwen2", tmp_path / "other", "official", config=config)


@pytest.mark.long
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    program = Path(__file__).with_name("peak.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, program, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["total"] > 40 * found["largest"]
    for way in ("native", "checkpoint", "official-decoder"):
        assert found[way] < 3 * found["largest"], found
