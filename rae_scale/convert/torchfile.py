"""A writer of `torch.save` files that holds a part of one tensor at a time.

The official decoders and consolidated checkpoints are such files: a zip, uncompressed, with a pickle that names the
tensors and one member for each one's data. `torch.save` wants them all in memory; here the pickle is written first, and
the data is fetched when its turn comes. `torch.load` reads the result, `weights_only=True` and `mmap=True` included.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Any

import torch
from torch._utils import _rebuild_tensor_v2

from rae_scale.state.tensorfile import TensorToWrite

ROOT = "archive"
ALIGNMENT = 64  # where torch places a tensor's data, so that it can be mapped into memory
LOCAL_HEADER = 30  # of a zip member, before its name and extra field
ZIP64_EXTRA = 20
ZIP64_FROM = 1 << 31
PADDING_ID = b"FB"  # of the extra field that torch itself pads with

STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
}


@dataclass(frozen=True)
class StorageName:
    """Stands for the data of one tensor in the pickle; the number is the member's name."""

    number: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class TensorName:
    """Stands for a whole, contiguous tensor in the pickle."""

    storage: StorageName
    shape: tuple[int, ...]


class NamePickler(pickle.Pickler):
    """Writes a dict of `TensorName` as `torch.save` writes one of tensors."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, StorageName):
            return "storage", STORAGES[obj.dtype], obj.number, "cpu", obj.numel
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, TensorName):
            stride = torch.empty(obj.shape, device="meta").stride()
            return _rebuild_tensor_v2, (obj.storage, 0, obj.shape, stride, False, OrderedDict())
        return NotImplemented


def write_torch(file: IO[bytes], tensors: Sequence[TensorToWrite]) -> None:
    """Write what `torch.load` returns as a dict of these tensors, the same bytes each time. `file` may be a pipe, too:
    checksums then follow the data that they are of, as in the files of `torch.save` itself."""
    names = {
        tensor.key: TensorName(
            StorageName(str(number), tensor.dtype, torch.Size(tensor.shape).numel()), tuple(tensor.shape)
        )
        for number, tensor in enumerate(tensors)
    }
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(f"{ROOT}/data.pkl"), pickled(names))
        archive.writestr(zipfile.ZipInfo(f"{ROOT}/byteorder"), "little")
        for number, tensor in enumerate(tensors):
            write_data(archive, f"{ROOT}/data/{number}", tensor, file.tell())
        archive.writestr(zipfile.ZipInfo(f"{ROOT}/version"), "3\n")


def pickled(names: Mapping[str, TensorName]) -> bytes:
    buffer = BytesIO()
    NamePickler(buffer, protocol=2).dump(dict(names))
    return buffer.getvalue()


def write_data(archive: zipfile.ZipFile, name: str, tensor: TensorToWrite, position: int) -> None:
    """The elements of `tensor` as the archive's next member, whose header begins at `position`."""
    numel = torch.Size(tensor.shape).numel()
    size = numel * tensor.dtype.itemsize
    large = size >= ZIP64_FROM
    member = zipfile.ZipInfo(name)
    member.file_size = size
    header = LOCAL_HEADER + len(name) + (ZIP64_EXTRA if large else 0)
    padding = -(position + header + 4) % ALIGNMENT
    member.extra = struct.pack("<2sH", PADDING_ID, padding) + b"Z" * padding
    written = 0
    with archive.open(member, "w", force_zip64=large) as out:
        for part in tensor.fetch():
            flat = part.detach().to("cpu", tensor.dtype).reshape(-1).contiguous()
            out.write(flat.view(torch.uint8).numpy().data)
            written += flat.numel()
            # Before the next part is fetched: two would be in memory otherwise.
            del part, flat
    assert written == numel, f"{tensor.key}: {written} of {numel} elements were fetched"
