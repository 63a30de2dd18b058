"""Sources in our own names: checkpoints of training runs, and exported weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
import yaml
from torch import Tensor

from rae_scale.convert.source import Facts, Form, Naming
from rae_scale.convert.tensor_files import TensorFiles, headers_of, one_step, read_header, step_of
from rae_scale.engines.base import Kind
from rae_scale.parallel.boxes import Box
from rae_scale.state.format import CONFIG, INDEX, MANIFEST, STATE, CheckpointError, read_json
from rae_scale.state.index import Index, coverage_fault, key, read_index
from rae_scale.state.load import check_files
from rae_scale.state.read import PieceReader
from rae_scale.state.weights import WeightKind


class NativeCheckpoint:
    """`Source`: a checkpoint folder, whatever layout wrote it."""

    naming: Naming = "native"

    def __init__(self, folder: Path) -> None:
        self.what = f"checkpoint {folder}"
        self.folder = folder
        index, state = read_index(folder), read_json(folder / STATE)
        check_index(folder, index)
        self.facts = Facts(
            config=state.get("config"),
            step=state.get("step"),
            optimizer_step=state.get("optimizer_step"),
            weights="weight",
            state=state,
        )
        self.forms: dict[Kind, dict[str, Form]] = {"weight": {}}
        for name, entry in index.items():
            for kind in entry.pieces:
                self.forms.setdefault(kind, {})[name] = Form(entry.shape, torch.float32)
        self.reader = PieceReader(folder, index)

    def read(self, kind: Kind, name: str, box: Box) -> Tensor:
        found = self.reader.read(kind, name, box)
        if found is None:
            raise KeyError(f"{self.what} has no {kind} of {name}")
        return found

    def check(self) -> None:
        check_files(self.folder)

    def __enter__(self) -> NativeCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reader.__exit__(kind, error, trace)


def check_index(folder: Path, index: Index) -> None:
    """The index covers its tensors, and the files hold what it says and nothing else.

    Raises:
        CheckpointError: names the first file or tensor that does not fit.
    """
    listed: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in read_json(folder / MANIFEST)}
    for name, entry in index.items():
        for kind, pieces in entry.pieces.items():
            fault = coverage_fault(entry.shape, [stored.box for stored in pieces])
            if fault:
                raise CheckpointError(f"{folder / INDEX}: {kind} of {name} {list(entry.shape)}: {fault}")
            for stored in pieces:
                if stored.file not in listed:
                    raise CheckpointError(
                        f"{folder / INDEX} has {name} in {stored.file}, which {MANIFEST} does not list: they are of "
                        "two checkpoints; use another one"
                    )
                listed[stored.file][key(kind, name, stored.box)] = stored.box.shape
    for file, shapes in listed.items():
        if not file.endswith(".safetensors"):
            continue
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is missing; use another checkpoint")
        found = {name: form.shape for name, form in read_header(folder / file).forms.items()}
        if found != shapes:
            differing = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
            raise CheckpointError(
                f"{folder / file}: {INDEX} has {differing[0]} as {shapes.get(differing[0])}, the file as "
                f"{found.get(differing[0])} ({len(differing)} differ); use another checkpoint"
            )


class NativeExport:
    """`Source`: exported weights, of one kind."""

    naming: Naming = "native"

    def __init__(self, folder: Path, config: Mapping[str, object] | None, what: str) -> None:
        self.what, self.folder = what, folder
        headers = headers_of(folder)
        metadata = one_step(headers)
        kind = metadata.get("kind")
        weights: WeightKind | None = "ema" if kind == "ema" else "weight" if kind == "weight" else None
        self.facts = Facts(config=config or None, step=step_of(metadata), weights=weights)
        self.files = TensorFiles(headers)
        self.forms: dict[Kind, dict[str, Form]] = {"weight": self.files.forms}

    def read(self, kind: Kind, name: str, box: Box) -> Tensor:
        if kind != "weight":
            raise KeyError(f"{self.what} has no {kind}")
        return self.files.read(name, box)

    def check(self) -> None:
        check_files(self.folder)

    def __enter__(self) -> NativeExport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files.close()


def open_checkpoint(folder: Path) -> NativeCheckpoint:
    return NativeCheckpoint(folder)


def open_export(folder: Path) -> NativeExport:
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise CheckpointError(f"{folder / CONFIG}: not valid YAML: {error}") from None
    return NativeExport(folder, config, f"exported weights {folder}")
