"""Paths that start with `asset:` name files shipped inside the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_scale.config import Config, paths
from rae_scale.config.paths import resolve_path, resolve_paths


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "assets/demo/encoder").mkdir(parents=True)
    monkeypatch.setattr(paths, "ASSET_ROOT", tmp_path / "assets")
    return tmp_path / "assets"


def test_an_asset_resolves_into_the_package(assets: Path) -> None:
    assert resolve_path("asset:demo/encoder") == str(assets / "demo/encoder")


def test_other_paths_are_unchanged() -> None:
    assert resolve_path("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen/Qwen2.5-1.5B-Instruct"
    assert resolve_path("/data/shards") == "/data/shards"


def test_a_missing_asset_lists_what_is_shipped(assets: Path) -> None:
    with pytest.raises(ValueError, match=r"asset:demo/decoder.*ships demo/encoder"):
        resolve_path("asset:demo/decoder")


@pytest.mark.parametrize("path", ["asset:../secret", "asset:", "asset:/etc"])
def test_an_asset_stays_inside_the_package(assets: Path, path: str) -> None:
    (assets.parent / "secret").mkdir()
    with pytest.raises(ValueError, match="inside the package"):
        resolve_path(path)


def test_every_path_of_a_config_is_resolved(assets: Path) -> None:
    given = Config.model_validate(
        {
            "run": {"init_from": "asset:demo/encoder"},
            "model": {
                "llm": {"path": "asset:demo/encoder", "tokenizer": "asset:demo/encoder"},
                "encoder": {"path": "asset:demo/encoder"},
                "decoder": {"path": "asset:demo/encoder"},
            },
            "data": {"sources": [{"path": "asset:demo/encoder", "weight": 2.0}]},
        }
    )
    config, folder = resolve_paths(given), str(assets / "demo/encoder")
    assert "asset:" not in config.model_dump_json()
    assert config.run.init_from == config.model.llm.path == config.model.llm.tokenizer == folder
    assert config.model.encoder.path == config.model.decoder.path == config.data.sources[0].path == folder
    assert config.data.sources[0].weight == 2.0
    assert given.model.encoder.path == "asset:demo/encoder"
