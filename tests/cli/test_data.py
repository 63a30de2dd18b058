"""`rae-scale data` from pictures to shards and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rae_scale.data.adapters import ADAPTERS
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.shapes.prompts import TASKS
from rae_scale.data.sources import Source
from rae_scale.data.tokenizer import load_tokenizer

Rae = Callable[..., str]


@pytest.fixture
def tars(rae: Rae, tmp_path: Path) -> Path:
    rae("data", "shapes", "--out", tmp_path / "tars", "--count", 12, "--seed", 3)
    return tmp_path / "tars"


def test_shapes_become_shards(rae: Rae, tars: Path, tmp_path: Path) -> None:
    said = rae("data", "build", tars / "shapes-00000.tar", "--out", tmp_path / "shards")
    assert "12 samples in 1 shards" in said
    assert len(MDSReader(tmp_path / "shards")) == 12


def test_a_manifest_and_an_adapter_are_taken(rae: Rae, tars: Path, tmp_path: Path) -> None:
    (tars / "wds_shapes.json").write_text('{"dataset_name": "shapes", "tars": ["shapes-00000.tar"]}')
    build = ("data", "build", tars / "wds_shapes.json", "--out", tmp_path / "shards", "--adapter")
    rae(*build, "blip3o-60k")
    assert {sample.metadata["category"] for sample in MDSReader(tmp_path / "shards")} == {"shapes"}
    assert "choose one of auto, blip3o, " in rae(*build, "blip", status=2)
    assert "it has none" in rae(*build, "blip3o", "--adapter-option", "weight=2", status=2)


def test_adapters_are_listed_and_explained(rae: Rae) -> None:
    listed = rae("data", "adapters")
    assert [line.split()[0] for line in listed.splitlines()] == sorted(ADAPTERS)
    assert all(len(line) > 40 for line in listed.splitlines())
    said = rae("data", "adapters", "fusedit")
    assert "synthetic_caption.txt" in said and "--adapter-option original_weight=0.05" in said
    assert "choose one of auto, " in rae("data", "adapters", "no", status=2)


def test_tasks_can_be_weighed(rae: Rae, tmp_path: Path) -> None:
    only = [f"{task}=0" for task in TASKS if task != "counting"]
    options = [part for weight in only for part in ("--task-weight", weight)]
    rae("data", "shapes", "--out", tmp_path / "tars", "--count", 5, *options)
    samples = (item.sample for item in Source(tmp_path / "tars/shapes-00000.tar"))
    assert {sample.metadata["tag"] for sample in samples if sample} == {"counting"}
    assert "colours" in rae("data", "shapes", "--out", tmp_path / "no", "--task-weight", "colours=2", status=2)
    assert "colors=much" in rae("data", "shapes", "--out", tmp_path / "no", "--task-weight", "colors=much", status=2)


def test_what_was_rejected_is_counted_and_listed(rae: Rae, tars: Path, tmp_path: Path) -> None:
    tar = tars / "shapes-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-20_000])
    said = rae("data", "build", tar, "--out", tmp_path / "shards")
    assert "damaged: 00000-shapes-00000" in said
    (tmp_path / "one.jsonl").write_text('{"image": "nowhere.jpg", "conversations": []}\n')
    said = rae("data", "build", tmp_path / "one.jsonl", "--out", tmp_path / "more")
    assert "left out 1 of 1" in said
    assert "1  no image" in said
    assert str(tmp_path / "more/rejected.jsonl") in said


def test_a_tokenizer_learns_the_words_of_the_data(rae: Rae, tars: Path, tmp_path: Path) -> None:
    rae("data", "tokenizer", tars / "shapes-00000.tar", "--out", tmp_path / "tokenizer", "--vocab-size", 300)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert len(tokenizer) == 300 + 2  # and the two around an image
    assert len(tokenizer("a photo of a").input_ids) == 4
    assert "exists" in rae("data", "tokenizer", tars / "shapes-00000.tar", "--out", tmp_path / "tokenizer", status=2)


def test_a_missing_input_is_named(rae: Rae, tmp_path: Path) -> None:
    said = rae("data", "build", tmp_path / "no.tar", "--out", tmp_path / "shards", status=2)
    assert said.startswith(f"rae-scale: error: {tmp_path / 'no.tar'}: no such file")
    assert not (tmp_path / "shards").exists()
