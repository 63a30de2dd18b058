"""Lists of tars, as the official release keeps them: one JSON file names all tars of a set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rae_scale.data.record import BadSample
from rae_scale.data.text import parse_json_object

MAX_MANIFEST_BYTES = 256 * 2**20


def expand_inputs(paths: Iterable[str | Path]) -> list[Path]:
    """The input files, with each manifest (`.json`) replaced by the tars that it names, in its order.

    Raises ValueError for a file that is no manifest, FileNotFoundError for one that is missing.
    """
    inputs: list[Path] = []
    for path in map(Path, paths):
        inputs += read_manifest(path) if path.suffix.lower() == ".json" else [path]
    return inputs


def read_manifest(path: Path) -> list[Path]:
    """The tars of `{"dataset_name": ..., "tars": [...]}`; relative names are relative to the manifest's folder."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{path}: more than {MAX_MANIFEST_BYTES} bytes is no list of tars")
    try:
        names = parse_json_object(path.read_bytes(), str(path)).get("tars")
    except BadSample as problem:
        raise ValueError(f'{problem.detail}; a manifest is {{"dataset_name": ..., "tars": [...]}}') from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f'{path}: no list of file names under "tars"; is it a manifest of tars?')
    remote = next((name for name in names if "://" in name), None)
    if remote is not None:
        raise ValueError(f"{path}: {remote} is a URL; download the tars, then name them by their paths")
    return [path.parent / name for name in names]
