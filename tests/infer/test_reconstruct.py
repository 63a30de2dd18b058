"""Encoder -> decoder on given images, and the number that says how close it is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae_scale.config import dump_config
from rae_scale.data.decode import BadImage
from rae_scale.data.transforms import to_float
from rae_scale.infer.reconstruct import Reconstructor, psnr
from rae_scale.models.zoo import DECODER_ZOO, ViTDecoder
from rae_scale.state import read_weights
from tests.infer.trained import Trained


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    rows = np.linspace(0, 255, 40, dtype=np.uint8)[:, None, None]
    Image.fromarray(np.broadcast_to(rows, (40, 24, 3)).copy()).save(path)
    return path


def test_pictures_go_through_encoder_and_decoder(trained: Trained, photo: Path) -> None:
    reconstructor = Reconstructor.from_source(trained.decoder_run, device="cpu")
    original = reconstructor.read(photo)
    assert original.shape == (16, 16, 3)
    result = reconstructor.reconstruct([original] * 3, batch_size=2)
    assert result.shape == (3, 16, 16, 3)

    decoder = ViTDecoder(DECODER_ZOO["vit-test"])
    decoder.load_state_dict(read_weights(trained.decoder))
    with torch.no_grad():
        pixels = to_float(torch.from_numpy(original)[None])
        expected = decoder.decode(reconstructor.encoder(pixels))[0].permute(1, 2, 0).numpy()
    assert np.abs(result[2] - expected * 255).max() <= 0.51


def test_run_file_run_and_decoder_folder_name_the_same_decoder(trained: Trained, photo: Path, tmp_path: Path) -> None:
    from_decoder = Reconstructor.from_source(trained.decoder_run, device="cpu")
    original = from_decoder.read(photo)
    expected = from_decoder.reconstruct([original])
    run_file = tmp_path / "run.yaml"
    run_file.write_text(dump_config(trained.world.config(tmp_path / "run")))
    for reconstructor in (
        Reconstructor.from_source(trained.run, device="cpu"),
        Reconstructor.from_source(run_file, decoder=trained.decoder, device="cpu"),
    ):
        assert np.array_equal(reconstructor.reconstruct([original]), expected)


def test_without_decoder_weights_the_fix_is_named(trained: Trained, tmp_path: Path) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text(dump_config(trained.world.config(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"sets no model\.decoder\.path"):
        Reconstructor.from_source(run_file, device="cpu")


def test_unreadable_images_are_refused(trained: Trained, tmp_path: Path) -> None:
    reconstructor = Reconstructor.from_source(trained.decoder_run, device="cpu")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadImage):
        reconstructor.read(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError):
        reconstructor.read(tmp_path / "nothing.png")


def test_psnr() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(black, grey) == pytest.approx(20 * math.log10(5))
    assert psnr(grey, black) == psnr(black, grey)
