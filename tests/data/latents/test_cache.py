"""Units and the folder that they lie in: whole or not at all, checked when read, of the settings that are wanted."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from rae_scale.data.latents import LatentCache, LatentDtype, Latents, quantise
from rae_scale.data.latents import cache as cache_module
from rae_scale.data.latents.cache import Form, check_settings, write_index, write_settings
from rae_scale.data.latents.unit import BAD_IMAGE, NO_IMAGE, Unit, write_unit
from rae_scale.data.record import BadSample

TOKENS, CHANNELS = 4, 6
SIZES = (5, 3)
TEXT, BAD = 1, 3
"""Of the first source: a sample without an image, and one whose image cannot be used."""


def value(source: int, index: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * source + index)
    return torch.randn(TOKENS, CHANNELS, generator=generator)


def make_cache(folder: Path, dtype: LatentDtype = "bf16") -> LatentCache:
    form = Form(TOKENS, CHANNELS, dtype, SIZES)
    entries = []
    for place in form.units():
        rows, values, bad = [], [], {}
        for index in range(place.start, place.end):
            if place.source == 0 and index == TEXT:
                rows.append(NO_IMAGE)
            elif place.source == 0 and index == BAD:
                rows.append(BAD_IMAGE)
                bad[index - place.start] = ("undecodable image", "JPEG: cut")
            else:
                rows.append(len(values))
                values.append(value(place.source, index))
        path = folder / place.name
        path.parent.mkdir(parents=True, exist_ok=True)
        latents = torch.stack(values) if values else torch.empty(0, TOKENS, CHANNELS)
        entries.append(write_unit(path, quantise(latents, dtype), rows, bad))
    write_settings(folder, {"data.crop": "square"})
    write_index(folder, form, entries)
    return LatentCache(folder)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "UNIT_SAMPLES", 2)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_every_sample_gets_its_own_latents(tmp_path: Path, dtype: LatentDtype) -> None:
    cache = pickle.loads(pickle.dumps(make_cache(tmp_path, dtype)))
    for source, size in enumerate(SIZES):
        for index in reversed(range(size)):
            if (source, index) in {(0, TEXT), (0, BAD)}:
                continue
            found, wanted = cache.latents(source, index), quantise(value(source, index), dtype)
            assert torch.equal(found.values, wanted.values), (source, index)
            assert found.scales is None if wanted.scales is None else torch.equal(found.scales, wanted.scales)
    cache.close()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_sample_without_an_image_has_zeros_like_the_others(tmp_path: Path, dtype: LatentDtype) -> None:
    cache = make_cache(tmp_path, dtype)
    text, image = cache.latents(0, TEXT), cache.latents(0, 0)
    assert not text.values.any() and text.values.dtype == image.values.dtype
    assert (text.scales is None) == (image.scales is None)
    cache.close()


def test_an_image_that_could_not_be_used_says_why(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    with pytest.raises(BadSample, match="undecodable image: JPEG: cut"):
        cache.latents(0, BAD)
    cache.close()


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_OPEN_UNITS", 2)
    cache = make_cache(tmp_path)
    for index in (0, 2, 4):
        cache.latents(0, index)
    assert len(cache._open) == 2
    assert torch.equal(cache.latents(0, 0).values, quantise(value(0, 0), "bf16").values)
    cache.close()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_flipped_bit_costs_one_sample(tmp_path: Path, dtype: LatentDtype) -> None:
    make_cache(tmp_path, dtype).close()
    path = tmp_path / "source-1/00000.safetensors"
    with Unit(path) as unit:
        _, _, start = unit._places["scales" if dtype == "int8" else "latents"]
    data = bytearray(path.read_bytes())
    data[start] ^= 1  # of its first row
    path.write_bytes(data)
    cache = LatentCache(tmp_path)
    with pytest.raises(BadSample, match=r"corrupt latents: .*source-1/00000.safetensors"):
        cache.latents(1, 0)
    assert torch.equal(cache.latents(1, 1).values, quantise(value(1, 1), dtype).values)
    cache.close()


def test_a_file_that_was_cut_while_it_was_open_costs_its_samples(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    cache.latents(1, 0)
    path = tmp_path / "source-1/00000.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(BadSample, match="corrupt latents"):
        cache.latents(1, 0), cache.latents(1, 1)
    cache.close()


def other_unit(path: Path) -> None:
    write_unit(path, Latents(torch.ones(2, TOKENS, CHANNELS, dtype=torch.bfloat16), None), [0, 1], {})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "not a whole file of latents"),
        (lambda path: path.write_bytes(b"\xff" * 40), "not a whole file of latents"),
        (lambda path: path.write_bytes(b""), "not a whole file of latents"),
        (other_unit, "not the file that index.json lists"),
    ],
    ids=["gone", "cut", "garbage", "empty", "another"],
)
def test_a_file_that_is_not_the_indexs_is_named(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    make_cache(tmp_path).close()
    damage(tmp_path / "source-1/00000.safetensors")
    with pytest.raises(ValueError, match=rf"source-1/00000.safetensors.*{message}"):
        LatentCache(tmp_path).latents(1, 0)


def test_a_write_that_fails_leaves_nothing_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        other_unit(tmp_path / "00000.safetensors")
    assert not (tmp_path / "00000.safetensors").exists()


def test_anything_can_read_a_unit(tmp_path: Path) -> None:
    make_cache(tmp_path).close()
    with safe_open(tmp_path / "source-0/00001.safetensors", framework="pt") as file:
        row = int(file.get_tensor("row")[0])
        assert torch.equal(file.get_slice("latents")[row], quantise(value(0, 2), "bf16").values)


def test_the_same_latents_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_cache(tmp_path / name).close()
    files = [sorted((tmp_path / name).rglob("*.safetensors")) for name in ("a", "b")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_units_are_small_whatever_a_sample_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    siglip = Form(256, 1152, "bf16", (1000,))
    assert siglip.sample_bytes == 589_824 and siglip.unit_samples == 113
    assert [place.end - place.start for place in siglip.units()] == [113] * 8 + [96]
    assert Form(16, 64, "int8", (5000,)).unit_samples == 1024


def test_other_settings_are_named(tmp_path: Path) -> None:
    assert not check_settings(tmp_path, {"data.crop": "square"})
    write_settings(tmp_path, {"data.crop": "square", "image size": 224, "gone": 1})
    assert check_settings(tmp_path, {"data.crop": "square", "image size": 224, "gone": 1})
    with pytest.raises(ValueError, match="of other settings") as caught:
        check_settings(tmp_path, {"data.crop": "square", "image size": 256, "new": (1, 2)})
    text = str(caught.value)
    assert "image size was 224, is 256" in text and "gone was 1, is None" in text and "new was None, is [1, 2]" in text
    assert "data.crop" not in text


def test_a_folder_without_an_index_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index.json cannot be read.*every rank must see"):
        LatentCache(tmp_path)
