"""Poisoned samples through a build and through the loader: nothing crashes, and each is refused or means something."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest

from rae_scale.config.schema import DataConfig, SourceConfig
from rae_scale.data.decode import DEFAULT_MAX_PIXELS, decode_image
from rae_scale.data.loader import build_loader
from rae_scale.data.record import Sample
from tests.data import poison

IMAGES = poison.poisoned_images()
TEXTS = poison.poisoned_texts()
keep = attrgetter("sample.key", "pixels")


def test_a_build_refuses_each_with_its_reason_or_keeps_it(tmp_path: Path) -> None:
    expected = {f"image-{name}": image.reason for name, image in IMAGES.items()}
    expected |= {f"text-{name}": reason for name, (_, _, reason) in TEXTS.items()}
    expected |= {"image-nothing": poison.UNDECODABLE}
    assert poison.build_verdicts(poison.write_tar(tmp_path / "a.tar")) == expected


@pytest.mark.parametrize("name", [name for name, image in IMAGES.items() if image.reason is None])
def test_what_can_be_used_shows_what_it_should(name: str) -> None:
    pixels = decode_image(IMAGES[name].data, DEFAULT_MAX_PIXELS)
    left = pixels[:, : max(1, pixels.shape[1] // 2 - 2)].astype(int)
    assert np.abs(left - IMAGES[name].colour).max() <= 3


def test_the_loader_lists_each_bad_one_and_gives_all_others(
    shards: Callable[[list[Sample]], Path], tmp_path: Path
) -> None:
    """As if shards had been written without a look at the images. One epoch: every sample is tried in its own place."""
    folder = shards([Sample(name, image.data, ("a picture",)) for name, image in IMAGES.items()])
    config = DataConfig(
        sources=(SourceConfig(path=str(folder)),), global_batch_size=1, num_workers=0, max_bad_fraction=1.0
    )
    listed = tmp_path / "quarantine.jsonl"
    with build_loader(config, seed=0, image_size=8, prepare=keep, collate=list, quarantine_path=listed) as loader:
        found = [sample for step in islice(loader, len(IMAGES)) for samples in step for sample in samples]
    records = [json.loads(line) for line in listed.read_text().splitlines()]
    assert {record["key"]: record["reason"] for record in records} == {
        name: image.reason for name, image in IMAGES.items() if image.reason is not None
    }
    assert {key for key, _ in found} == {name for name, image in IMAGES.items() if image.reason is None}
    assert len(found) == len(IMAGES) and all(pixels.shape == (8, 8, 3) for _, pixels in found)


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """In a process that only reads. The largest part has 400 MB when it is unpacked, the largest image 17 GB."""
    path = poison.write_tar(tmp_path / "a.tar")
    command = [sys.executable, poison.__file__, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert 0 < int(done.stdout) < 200 * 2**20
