"""Sources in files of torch.save: decoders of the RAE release, consolidated checkpoints (model.pth.zst), files named
pytorch_model.bin. Only weights are read: what else is in such files has no layout that is agreed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from rae_scale.convert.file_bytes import FileBytes
from rae_scale.convert.recognise import naming_of
from rae_scale.convert.records import check_all
from rae_scale.convert.source import Facts, Form, Naming, Source
from rae_scale.convert.stored import StoredTensor
from rae_scale.convert.tensor_files import read_weight_map
from rae_scale.convert.torch_zip import TorchFile
from rae_scale.convert.unpack import ZSTD_SUFFIXES, unpack
from rae_scale.engines.base import Kind
from rae_scale.infer.published import CONFIG_JSON
from rae_scale.parallel.boxes import Box
from rae_scale.state.format import MANIFEST, CheckpointError, read_json
from rae_scale.state.load import check_files

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
WEIGHT_KEYS = ("model", "state_dict", "module")
"""Under which of them a training loop puts the weights."""
EMA_KEYS = ("ema", "ema_model", "model_ema")


class TorchSource:
    """`Source`: weights, and their moving average if there is one, in files of torch.save."""

    def __init__(
        self, what: str, files: Sequence[TorchFile], foreign: Mapping[str, Any], manifest: Path | None
    ) -> None:
        self.what, self.files, self.manifest = what, files, manifest
        self.tensors: dict[Kind, dict[str, StoredTensor]] = {}
        for file in files:
            for kind, tensors in tensors_of(file).items():
                held = self.tensors.setdefault(kind, {})
                if twice := held.keys() & tensors.keys():
                    raise CheckpointError(f"{file.path} has {min(twice)}, which another file of {what} has too")
                held.update(tensors)
        self.forms: dict[Kind, dict[str, Form]] = {
            kind: {name: Form(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
            for kind, tensors in self.tensors.items()
        }
        self.naming: Naming = naming_of(foreign, self.forms["weight"], what)
        self.facts = Facts(foreign=foreign)

    def read(self, kind: Kind, name: str, box: Box) -> Tensor:
        return self.tensors[kind][name].read(box)

    def check(self) -> None:
        """Against the hashes of the folder's manifest if `rae-scale convert` wrote it, and otherwise the zip's own."""
        if self.manifest is not None:
            check_files(self.manifest.parent)
        else:
            check_all(record for file in self.files for record in file.all_records)

    def __enter__(self) -> TorchSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self.files:
            file.close()


def tensors_of(file: TorchFile) -> dict[Kind, dict[str, StoredTensor]]:
    """The tensors of a saved state dict, or of what a training loop saves around one.

    Raises:
        CheckpointError: there is no state dict.
    """
    content = file.content
    if isinstance(content, dict):
        weights: Any = next((content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), content)
        if is_state(weights):
            average = next((content[key] for key in EMA_KEYS if is_state(content.get(key))), None)
            return {"weight": weights, **({} if average is None else {"ema": average})}
    held = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
    raise CheckpointError(
        f"{file.path} holds no state dict, a dict of tensors by name, itself or under {', '.join(WEIGHT_KEYS)}, but "
        f"{held or 'an empty dict'}; save the model's state_dict() alone"
    )


def is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, StoredTensor) for name, tensor in value.items())
    )


def open_torch(path: Path) -> TorchFile:
    if path.name.endswith(ZSTD_SUFFIXES):
        return TorchFile(FileBytes(path, unpacked=unpack(path)))
    return TorchFile(FileBytes(path))


def open_file(path: Path) -> Source:
    return TorchSource(f"torch file {path}", [open_torch(path)], {}, None)


def open_folder(folder: Path) -> Source:
    """Raises CheckpointError if it has several files and no index of them."""
    foreign = read_json(folder / CONFIG_JSON) if (folder / CONFIG_JSON).is_file() else {}
    manifest = folder / MANIFEST if (folder / MANIFEST).is_file() else None
    paths = torch_files(folder)
    return TorchSource(f"torch files {folder}", [open_torch(path) for path in paths], foreign, manifest)


def torch_files(folder: Path) -> list[Path]:
    indices = sorted(folder.glob("*.bin.index.json"))
    if len(indices) == 1:
        listed = [folder / name for name in sorted(set(read_weight_map(indices[0]).values()))]
        missing = [path.name for path in listed if not path.is_file()]
        if missing:
            raise CheckpointError(f"{indices[0]} lists {', '.join(missing)}, which is not there; fetch what is missing")
        return listed
    suffixes = tuple(suffix + packed for suffix in TORCH_SUFFIXES for packed in ("", *ZSTD_SUFFIXES))
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(suffixes))
    if len(paths) != 1:
        names = ", ".join(path.name for path in paths) or "none"
        raise CheckpointError(
            f"{folder} has {names} among {', '.join(suffixes)}, and no index of them; give the file itself"
        )
    return paths
