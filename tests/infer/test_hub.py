"""`RaeScale`: where models are found, and that it draws what `rae-scale sample` draws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae_scale import RaeScale
from rae_scale.infer.export import export
from rae_scale.infer.pipeline import TextToImage
from tests.infer.trained import Trained

PROMPTS = ["a red picture", "a blue picture with a longer text"]


@pytest.fixture(scope="module")
def model(trained: Trained) -> RaeScale:
    return RaeScale.from_pretrained(trained.run, device="cpu")


def pixels(images: Image.Image | list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in (images if isinstance(images, list) else [images])])


def test_importing_the_package_stays_light() -> None:
    code = "import sys, rae_scale; assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError, match="RaeScales"):
        from rae_scale import RaeScales  # noqa: F401


def test_draws_what_the_command_draws(model: RaeScale, trained: Trained, tmp_path: Path) -> None:
    from rae_scale.cli.sample import sample

    sample(trained.run, tmp_path, PROMPTS, num_per_prompt=2, seed=3, guidance=1.5, device="cpu")
    drawn = [Image.open(tmp_path / f"{number:05d}.png") for number in range(4)]
    images = model.generate(PROMPTS, seed=3, num_images_per_prompt=2, guidance=1.5)
    assert np.array_equal(pixels(images), pixels(drawn))


def test_one_prompt_is_one_image(model: RaeScale) -> None:
    image = model.generate(PROMPTS[0], seed=4)
    assert isinstance(image, Image.Image)
    assert image.size == (16, 16)
    several = model.generate(PROMPTS[0], seed=3, num_images_per_prompt=2, batch_size=1)
    assert np.abs(pixels(several)[1].astype(int) - pixels(image)[0]).max() <= 1
    each = model.generate(PROMPTS, seed=[4, 9])
    assert np.abs(pixels(each)[0].astype(int) - pixels(image)[0]).max() <= 1


def test_settings_reach_the_sampler(model: RaeScale) -> None:
    few, many = (pixels(model.generate(PROMPTS[0], steps=steps, guidance=1.0)) for steps in (1, 3))
    assert not np.array_equal(few, many)
    assert not np.array_equal(pixels(model.generate(PROMPTS[0], steps=1, guidance=3.0)), few)


def test_weights_and_dtype_are_those_asked_for(model: RaeScale, trained: Trained) -> None:
    raw = RaeScale.from_pretrained(trained.run, weights="raw", device="cpu")
    assert not np.array_equal(pixels(raw.generate(PROMPTS)), pixels(model.generate(PROMPTS)))
    half = RaeScale.from_pretrained(trained.run, dtype=torch.bfloat16, device="cpu").pipeline
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.model.dit.pos_embed.dtype == torch.float32
    assert half.bf16
    coarse = pixels(RaeScale(half).generate(PROMPTS, guidance=1.0)).astype(int)
    fine = pixels(model.generate(PROMPTS, guidance=1.0)).astype(int)
    assert 0 < np.abs(coarse - fine).mean() < 8
    assert not RaeScale.from_pretrained(trained.run, dtype="float32", device="cpu").pipeline.bf16
    with pytest.raises(ValueError, match="float16"):
        RaeScale.from_pretrained(trained.run, dtype="float16")


def test_an_export_and_another_decoder(model: RaeScale, trained: Trained, tmp_path: Path) -> None:
    exported = export(trained.run, tmp_path / "export")
    same = RaeScale.from_pretrained(exported, device="cpu", decoder=trained.decoder)
    assert np.array_equal(pixels(same.generate(PROMPTS)), pixels(model.generate(PROMPTS)))
    with pytest.raises(ValueError, match="holds the moving average of the weights, and you ask for the raw weights"):
        RaeScale.from_pretrained(exported, weights="raw", device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": [1, 2, 3]}, "3 seeds for 1 prompts"),
    ],
)
def test_numbers_that_draw_nothing_are_refused(model: RaeScale, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS[:1], **arguments)


def test_the_hub_is_asked_when_there_is_no_such_folder(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def snapshot_download(name: str, revision: str | None) -> str:
        asked.append((name, revision))
        return str(trained.run)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = RaeScale.from_pretrained("someone/model", revision="v2", device="cpu")
    assert asked == [("someone/model", "v2")]
    assert isinstance(loaded.pipeline, TextToImage)
    for path in (tmp_path / "gone", "./gone", "gone"):
        with pytest.raises(ValueError, match="does not exist"):
            RaeScale.from_pretrained(path)
    with pytest.raises(ValueError, match="revision='v2' is for the hub"):
        RaeScale.from_pretrained(trained.run, revision="v2")
    assert len(asked) == 1


def test_what_the_hub_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    def refuse(name: str, revision: str | None) -> str:
        raise RepositoryNotFoundError("404 Client Error.\nmore", response=None)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"runs/typo: there is no such folder, and the hub gave .*404 Client Error"):
        RaeScale.from_pretrained("runs/typo")


def test_another_kind_of_model_is_told_with_the_way_to_convert_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cambrian_qwen"}))
    with pytest.raises(ValueError, match=r"type 'cambrian_qwen' .*rae-scale convert .* --to hf --decoder"):
        RaeScale.from_pretrained(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")  # as `rae-scale convert --to official` writes one
    with pytest.raises(ValueError, match="type 'cambrian_qwen'"):
        RaeScale.from_pretrained(tmp_path)
