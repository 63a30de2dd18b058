"""Files that would run code if they were read carelessly: weights, shards, settings, tokenizers.

Pickles in checkpoints of other projects are in tests/convert (test_unpickle, test_torch_zip, test_dcp).
"""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rae_scale.config import ConfigError, load_config
from rae_scale.config.schema import LLMConfig
from rae_scale.convert.open import open_source
from rae_scale.data.mds_format import INDEX_NAME
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.record import Sample
from rae_scale.data.tokenizer import load_tokenizer, train_tokenizer
from rae_scale.infer.load import stored_config
from rae_scale.models.llm_zoo import LLM_ZOO, build_llm
from rae_scale.state import CheckpointError
from tests.security.hostile import Canary, yaml_canary


def test_weights_in_a_pickle(canary: Canary, tmp_path: Path) -> None:
    LLM_ZOO["qwen2-tiny"].to_qwen2(64).save_pretrained(tmp_path)
    torch.save({"model.norm.weight": torch.ones(2), "x": canary}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.llm\.path=.*: no weights could be read"):
        build_llm(LLMConfig(name="qwen2-tiny", path=str(tmp_path)), None)
    assert not canary.sings


def write_shard(folder: Path, columns: dict[str, tuple[str, bytes]]) -> None:
    """One sample with these columns: name -> (encoding, bytes), as mosaicml-streaming lays them out."""
    names = sorted(columns)
    encodings = [columns[name][0] for name in names]
    header = {"column_names": names, "column_encodings": encodings, "column_sizes": [None] * len(names)}
    text = json.dumps({"version": 2, "format": "mds", **header, "compression": None, "hashes": [], "size_limit": None})
    row = struct.pack(f"<{len(names)}I", *(len(columns[name][1]) for name in names))
    row += b"".join(columns[name][1] for name in names)
    start = 4 + 2 * 4 + len(text)
    data = struct.pack("<3I", 1, start, start + len(row)) + text.encode() + row
    folder.mkdir()
    (folder / "shard.00000.mds").write_bytes(data)
    raw = {"basename": "shard.00000.mds", "bytes": len(data), "hashes": {}}
    shard = {**json.loads(text), "raw_data": raw, "zip_data": None, "samples": 1}
    (folder / INDEX_NAME).write_text(json.dumps({"version": 2, "shards": [shard]}))


def test_a_pickle_column_of_mds_that_no_one_asks_for_is_not_decoded(canary: Canary, tmp_path: Path) -> None:
    good = {"caption": ("str", b"a cat"), "image": ("bytes", b"pixels")}
    write_shard(tmp_path / "shards", {**good, "extra": ("pkl", pickle.dumps(canary))})
    assert list(MDSReader(tmp_path / "shards")) == [Sample("shard.00000.mds:0", b"pixels", ("a cat",))]
    assert not canary.sings


def test_a_pickle_column_of_mds_in_place_of_a_caption_is_refused(canary: Canary, tmp_path: Path) -> None:
    write_shard(tmp_path / "shards", {"caption": ("pkl", pickle.dumps(canary)), "image": ("bytes", b"pixels")})
    with pytest.raises(ValueError, match="column 'caption' has encoding 'pkl'"):
        MDSReader(tmp_path / "shards")
    assert not canary.sings


def test_yaml_tags_in_a_run_file_and_in_an_override(canary: Canary, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"run:\n  dir: {yaml_canary(canary)}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: not valid YAML: could not determine a constructor"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("run: {}\n")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "run.yaml", [f"run.dir={yaml_canary(canary)}"])
    assert not canary.sings


def test_yaml_tags_in_exported_weights(canary: Canary, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.yaml").write_text(f"stage: {yaml_canary(canary)}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: not valid YAML"):
        stored_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.yaml: not valid YAML"):
        open_source(tmp_path)
    assert not canary.sings


def test_code_beside_a_tokenizer(canary: Canary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto_map` names Python files in the folder; the library would ask on the terminal whether to run them."""
    folder = tmp_path / "tokenizer"
    train_tokenizer(["a red cat"] * 3, 300, folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(canary.folder)!r})\nclass Evil: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"model\.llm\.tokenizer="):
        load_tokenizer(folder)
    assert not canary.sings
