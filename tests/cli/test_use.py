"""The commands that use a trained model: sample, eval shapes, reconstruct, checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rae_scale.infer.export import export
from rae_scale.infer.pipeline import TextToImage
from rae_scale.models import zoo
from rae_scale.state import latest_checkpoint, read_weights
from tests.infer.trained import Trained, save_run

Rae = Callable[..., str]


def test_sample_writes_pictures_with_their_prompts_and_seeds(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("green\n\nblau ü\n", encoding="utf-8")
    out = tmp_path / "out"
    arguments = ("--prompt", "red", "--prompts-file", prompts, "--num-per-prompt", 2, "--seed", 7, "--grid")
    rae("sample", trained.run, *arguments, "--out", out, "--device", "cpu")
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        ("red", 7), ("red", 8), ("green", 7), ("green", 8), ("blau ü", 7), ("blau ü", 8),
    ]  # fmt: skip
    assert (out / "grid.png").exists()

    pipeline = TextToImage.from_checkpoint(trained.run, device="cpu")
    again = pipeline.generate([lines[3]["prompt"]], [lines[3]["seed"]])[0].astype(int)
    assert np.abs(np.asarray(Image.open(out / lines[3]["file"])) - again).max() <= 1


def test_sample_writes_one_picture_or_a_grid_to_a_file(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    one, grid = tmp_path / "new/one.png", tmp_path / "new/grid.png"
    rae("sample", trained.run, "--prompt", "red", "--out", one, "--device", "cpu")
    assert Image.open(one).size == (16, 16)
    rae("sample", trained.run, "--prompt", "red", "--prompt", "blue", "--out", grid, "--device", "cpu")
    assert Image.open(grid).width > 2 * 16


def test_sample_options_reach_the_sampler(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    def draw(*options: object) -> list[int]:
        rae("sample", trained.run, "--prompt", "red", "--out", tmp_path / "x.png", "--device", "cpu", *options)
        return np.asarray(Image.open(tmp_path / "x.png")).flatten().tolist()

    usual = draw()
    assert draw("--steps", 4, "--guidance", 2.0, "--method", "euler", "--weights", "ema") == usual
    for option in (("--steps", 5), ("--guidance", 1.0), ("--method", "heun"), ("--weights", "raw"), ("--seed", 1)):
        assert draw(*option) != usual, option


@pytest.mark.parametrize("weights", [b"\xff\xfe", b"\n \n"])
def test_prompts_that_are_none_are_named(rae: Rae, trained: Trained, tmp_path: Path, weights: bytes) -> None:
    (tmp_path / "prompts.txt").write_bytes(weights)
    said = rae("sample", trained.run, "--prompts-file", tmp_path / "prompts.txt", "--out", tmp_path, status=2)
    assert "--prompts-file" in said


def test_the_shapes_score_has_floor_and_ceiling(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    options = ("--prompts-per-task", 2, "--samples-per-prompt", 1, "--steps", 1, "--guidance", 1.0, "--device", "cpu")
    # The checker wants pictures of 32 pixels or more; those of the tiny world have 16.
    assert "too small" in rae("eval", "shapes", trained.run, *options, status=2)

    demo = {"model__encoder__path": None, "model__decoder__name": "vit-tiny", "data__max_seq_len": 256}
    decoder = export(save_run(trained.world.config(tmp_path / "a", stage="decoder", **demo)), tmp_path / "decoder")
    demo |= {"model__name": "dit-demo", "model__decoder__path": str(decoder)}
    run = save_run(trained.world.config(tmp_path / "b", **demo))
    said = rae("eval", "shapes", run, *options, "--seed", 5, "--out", tmp_path / "score")
    assert "ceiling" in said
    assert "overall" in said
    results = [json.loads(line) for line in (tmp_path / "score/results.jsonl").read_text().splitlines()]
    assert len(results) == 6 * 2

    # The score is that of the pictures which `sample` draws with the same settings.
    pipeline = TextToImage.from_checkpoint(run, device="cpu")
    last = results[-1]
    drawn = pipeline.generate([last["prompt"]], [last["seed"]], pipeline.sampler(steps=1, guidance=1.0))[0]
    assert np.abs(np.asarray(Image.open(tmp_path / "score" / last["filename"])) - drawn.astype(int)).max() <= 1


def test_the_checker_is_measured_without_a_model(rae: Rae) -> None:
    said = rae("eval", "shapes", "--instrument", "--prompts-per-task", 2)
    assert "jpeg q50" in said
    assert "floor" in said
    assert "give a CHECKPOINT" in rae("eval", "shapes", status=2)
    assert "give no CHECKPOINT" in rae("eval", "shapes", "somewhere", "--instrument", status=2)


def test_reconstruct_writes_pairs_and_their_psnr(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (20, 20), (200, 10, 10)).save(tmp_path / folder / "photo.png")
    images = (tmp_path / "a/photo.png", tmp_path / "b/photo.png")
    said = rae("reconstruct", trained.decoder_run, *images, "--out", tmp_path / "out", "--device", "cpu")
    assert said.count("PSNR") == 3
    pictures = sorted((tmp_path / "out").iterdir())
    assert len(pictures) == 2
    assert Image.open(pictures[0]).size == (32, 16)
    assert Image.open(pictures[0]).getpixel((3, 3)) == (200, 10, 10)


def test_checkpoints_are_described(rae: Rae, trained: Trained) -> None:
    said = rae("checkpoint", "inspect", trained.run, "--tensors")
    assert "stage pretrain, model dit-tiny" in said
    assert "step 1, optimizer step 1" in said
    assert "written by dp_replicate 1, dp_shard 1, sp 1, tp 1" in said
    for kind in ("ema", "exp_avg", "exp_avg_sq", "weight"):
        assert f"  {kind}: " in said
    assert "1 tensor files of" in said
    assert "connector.weight [48, 48]: ema in 1, exp_avg in 1, exp_avg_sq in 1, weight in 1" in said


def test_a_checkpoint_is_rewritten_in_another_number_of_files(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "three"
    assert str(out) in rae("checkpoint", "reshard", trained.run, out, "--files", 3)
    said = rae("checkpoint", "inspect", out, "--tensors")
    assert "3 tensor files of" in said
    assert "connector.weight [48, 48]: ema in 3" in said
    assert "as it was written" in rae("checkpoint", "verify", out)
    ours, theirs = read_weights(out), read_weights(latest_checkpoint(trained.run))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    again = rae("checkpoint", "reshard", trained.run, out, "--files", 2, status=2)
    assert "three exists; reshard into a new folder" in again
    assert "--files" in rae("checkpoint", "reshard", trained.run, tmp_path / "x", "--files", 0, status=2)


def test_a_flipped_byte_is_found(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    checkpoint = latest_checkpoint(trained.decoder_run)
    assert checkpoint is not None
    copy = tmp_path / checkpoint.name
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert "as it was written" in rae("checkpoint", "verify", copy)
    tensors = next(copy.glob("*.safetensors"))
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    assert f"{tensors} is damaged" in rae("checkpoint", "verify", copy, status=2)


def test_an_export_can_be_drawn_with(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    rae("checkpoint", "export", trained.run, "--out", tmp_path / "export", "--weights", "ema")
    rae("sample", tmp_path / "export", "--prompt", "red", "--out", tmp_path / "x.png", "--device", "cpu")
    assert (tmp_path / "x.png").exists()
    assert "exists" in rae("checkpoint", "export", trained.run, "--out", tmp_path / "export", status=2)


def test_models_are_listed_for_people_and_programs(rae: Rae, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = rae("model", "list", "--json")
    row = next(row for row in json.loads(listed) if row["name"] == "dit-2.4b")
    assert (row["hidden_size"], row["depth"], row["num_heads"]) == (2048, 32, 32)
    assert round(row["parameters"] / 1e9, 4) == 2.4354
    monkeypatch.setattr(zoo, "model_table", lambda: [row])
    for shown in ("dit-2.4b", "2,048", f"{row['parameters']:,}"):
        assert shown in rae("model", "list")
