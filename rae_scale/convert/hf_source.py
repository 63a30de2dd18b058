"""Sources in safetensors files with a config.json, as on the Hugging Face hub: the official release, our own published
folders, a bare Qwen2, an AutoencoderRAE; and single files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from rae_scale.convert.native import NativeExport
from rae_scale.convert.recognise import naming_of
from rae_scale.convert.source import Facts, Form, Naming, Source
from rae_scale.convert.tensor_files import Header, TensorFiles, headers_of, one_step, read_header, step_of
from rae_scale.engines.base import Kind
from rae_scale.infer.published import CONFIG_JSON, is_published, published_config
from rae_scale.parallel.boxes import Box
from rae_scale.state.format import MANIFEST, read_json
from rae_scale.state.load import check_files


class SafetensorsSource:
    """`Source`: weights in safetensors files, of whatever naming."""

    def __init__(self, what: str, headers: list[Header], foreign: Mapping[str, Any], manifest: Path | None) -> None:
        self.what = what
        metadata = one_step(headers)
        self.files = TensorFiles(headers)
        self.forms: dict[Kind, dict[str, Form]] = {"weight": self.files.forms}
        self.naming: Naming = naming_of(foreign, self.files.forms, what)
        self.facts = Facts(foreign=foreign, step=step_of(metadata))
        self.manifest = manifest

    def read(self, kind: Kind, name: str, box: Box) -> Tensor:
        if kind != "weight":
            raise KeyError(f"{self.what} has no {kind}")
        return self.files.read(name, box)

    def check(self) -> None:
        """Folders of other programs have no hashes, unless `rae-scale convert` wrote them."""
        if self.manifest is not None:
            check_files(self.manifest.parent)

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files.close()


def open_file(path: Path) -> Source:
    return SafetensorsSource(f"safetensors file {path}", [read_header(path)], {}, None)


def open_folder(folder: Path) -> Source:
    """Raises CheckpointError if the folder's index and its files do not agree."""
    if is_published(folder):
        config = published_config(folder).model_dump(mode="json")
        return NativeExport(folder, config, f"published model {folder}")
    foreign = read_json(folder / CONFIG_JSON) if (folder / CONFIG_JSON).is_file() else {}
    manifest = folder / MANIFEST if (folder / MANIFEST).is_file() else None
    return SafetensorsSource(f"safetensors folder {folder}", headers_of(folder), foreign, manifest)
