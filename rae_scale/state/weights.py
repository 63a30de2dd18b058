"""Weights for one process, out of a checkpoint or an exported folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from torch import Tensor

from rae_scale.engines.base import Kind
from rae_scale.parallel.boxes import whole
from rae_scale.state.format import EXPORTED, INDEX, CheckpointError, read_json
from rae_scale.state.index import Index, read_index
from rae_scale.state.load import check_files
from rae_scale.state.read import PieceReader

WeightKind = Literal["ema", "weight"]
KIND_NAMES: dict[str, str] = {"ema": "moving average of the weights", "weight": "raw weights"}


def read_weights(path: str | Path, kind: WeightKind | None = None, prefix: str | None = None) -> dict[str, Tensor]:
    """The tensors by name: float32 from a checkpoint, as stored from an exported folder.

    kind: "ema" for the moving average (a frozen parameter's weight is its own average), "weight" for the raw weights;
    None takes the average if the run kept one. An exported folder has one kind, chosen when it was exported.
    prefix: only the names that begin with it, which is cut off: prefix="dit." gives a state dict for the DiT.
    Every file is compared with its hash first.

    Raises:
        CheckpointError: files are missing or damaged, it holds no weights of this kind, or no name has the prefix.
    """
    folder = Path(path)
    check_files(folder)
    read = read_checkpoint if (folder / INDEX).is_file() else read_exported
    tensors = dict(read(folder, kind, prefix or ""))
    if not tensors:
        raise CheckpointError(f"{folder}: no tensor's name begins with {prefix!r}")
    return tensors


def read_checkpoint(folder: Path, kind: WeightKind | None, prefix: str) -> Iterator[tuple[str, Tensor]]:
    index = read_index(folder)
    with PieceReader(folder, index) as reader:
        for name in index:
            if name.startswith(prefix):
                yield name.removeprefix(prefix), read_whole(reader, source_kind(folder, index, name, kind), name)


def read_exported(folder: Path, kind: WeightKind | None, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for path in exported_files(folder):
        with safe_open(path, framework="pt") as file:
            held = (file.metadata() or {}).get("kind")
            if kind is not None and held in KIND_NAMES and held != kind:
                raise CheckpointError(
                    f"{folder} holds the {KIND_NAMES[held]}, and you ask for the {KIND_NAMES[kind]}; take what is "
                    "there (name no kind), or export the other from the checkpoint"
                )
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if name.startswith(prefix):
                    yield name.removeprefix(prefix), file.get_tensor(name)


def exported_files(folder: Path) -> list[Path]:
    """The one file of an export, or those that an index lists, as in folders made to be shared."""
    index = folder / f"{EXPORTED}.index.json"
    if not index.is_file():
        return [folder / EXPORTED]
    return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def read_whole(reader: PieceReader, kind: Kind, name: str) -> Tensor:
    tensor = reader.read(kind, name, whole(reader.index[name].shape))
    assert tensor is not None, f"{name} has no {kind}"
    return tensor


def has_ema(index: Index) -> bool:
    return any("ema" in entry.pieces for entry in index.values())


def source_kind(folder: Path, index: Index, name: str, kind: WeightKind | None) -> Kind:
    """Under which kind the wanted one of a tensor is stored."""
    if kind != "weight" and "ema" in index[name].pieces:
        return "ema"
    if kind == "ema" and not has_ema(index):
        raise CheckpointError(
            f"{folder} has no moving average of the weights: optim.ema_decay was not set in that run; ask for the raw "
            "weights (kind='weight')"
        )
    return "weight"
