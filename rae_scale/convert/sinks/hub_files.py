"""What folders for the Hugging Face hub have in common: numbered safetensors files, their index, and the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rae_scale.convert.sinks import Entry, TensorFile, shards
from rae_scale.infer.published import manifest_files
from rae_scale.state.format import MANIFEST, file_hash, write_json

INDEX_JSON = "model.safetensors.index.json"


def weight_files(entries: Sequence[Entry], metadata: Mapping[str, str]) -> list[TensorFile]:
    """model-00001-of-0000n.safetensors, each small enough for the hub's tools."""
    groups = list(shards(entries))
    return [
        TensorFile(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, metadata)
        for number, group in enumerate(groups, start=1)
    ]


def write_index(folder: Path, files: Sequence[TensorFile]) -> None:
    """Which tensor is in which file, as transformers reads it."""
    size = sum(entry.bytes for file in files for entry in file.entries)
    weight_map = {entry.key: file.name for file in files for entry in file.entries}
    write_json(folder / INDEX_JSON, {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_manifest(folder: Path, hashes: Mapping[str, str]) -> None:
    """The hashes of all files; `hashes` are those that are known."""
    names = (name for name in manifest_files(folder) if name != MANIFEST)
    write_json(folder / MANIFEST, {name: hashes.get(name) or file_hash(folder / name) for name in names})
