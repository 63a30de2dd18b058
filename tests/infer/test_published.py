"""Settings that go to other machines, and what comes of them there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rae_scale.config import parse_config
from rae_scale.infer.published import is_published, published_config, shareable

CONFIG = parse_config(
    {
        "run": {"dir": "/home/me/runs/best", "init_from": "/home/me/runs/first"},
        "model": {
            "llm": {"path": "Qwen/Qwen2.5-1.5B-Instruct", "tokenizer": "/home/me/tokenizer"},
            "encoder": {"path": "/home/me/siglip2"},
            "decoder": {"path": "/home/me/decoder"},
        },
        "data": {
            "sources": [{"path": "/home/me/data/cc12m"}],
            "cache_dir": "/home/me/shards",
            "latent_cache": {"dir": "/home/me/latents"},
        },
    }
)
INSIDE = {"tokenizer": True, "decoder": True, "encoder": False}


def publish(folder: Path, **changes: object) -> Path:
    tree = shareable(CONFIG, INSIDE).model_dump(mode="json")
    content = {"model_type": "rae_scale", "format_version": 1, "config": tree} | changes
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_no_place_of_this_machine_is_told() -> None:
    told = shareable(CONFIG, INSIDE)
    assert "/home" not in told.model_dump_json()
    assert told.model.llm.path == "Qwen/Qwen2.5-1.5B-Instruct"
    assert told.model.encoder.path == "siglip2"
    assert told.data.sources[0].path == "cc12m" and told.data.cache_dir == "shards"
    assert told.data.latent_cache is not None and told.data.latent_cache.dir == "latents"
    assert told.optim == CONFIG.optim


def test_folders_inside_are_found_where_the_folder_is(tmp_path: Path) -> None:
    read = published_config(publish(tmp_path))
    assert read.model.llm.tokenizer == str(tmp_path / "tokenizer")
    assert read.model.decoder.path == str(tmp_path / "decoder")
    assert read.model.encoder.path == "siglip2"


def test_only_folders_of_this_kind_are_taken_for_one(tmp_path: Path) -> None:
    assert not is_published(tmp_path)
    assert is_published(publish(tmp_path))
    assert not is_published(publish(tmp_path, model_type="qwen2"))


def test_another_version_and_an_unknown_setting_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format_version=2, this release reads 1"):
        published_config(publish(tmp_path, format_version=2))
    with pytest.raises(ValueError, match="unknown key 'modle'"):
        published_config(publish(tmp_path, config={"modle": {}}))
