"""Files of `torch.save`: a zip whose members are not compressed, a pickle that describes the tensors and a record of
bytes for every storage. The pickle is read by `unpickle`, which runs nothing, the records where they lie."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rae_scale.convert.file_bytes import AGAIN, FileBytes, Stream, damaged
from rae_scale.convert.records import Record
from rae_scale.convert.stored import Storage, StoredTensor
from rae_scale.convert.unpickle import Calls, Global, read_pickle
from rae_scale.state.format import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, ..., lengths of the name and the extra field that follow
LARGEST_PICKLE = 1 << 30

STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch BFloat16Storage": torch.bfloat16,
    "torch HalfStorage": torch.float16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
DTYPES = {f"torch {str(dtype).removeprefix('torch.')}": dtype for dtype in STORAGES.values()}


class TorchFile:
    """An open file of `torch.save`. content: what was saved, every tensor a `StoredTensor`, every dict a plain one."""

    def __init__(self, file: FileBytes, extra: Calls | None = None) -> None:
        """extra: what the pickle may name beside tensors.

        Raises:
            CheckpointError: it is damaged, of another format, or its pickle names what tensors need not.
        """
        self.file, self.path = file, file.path
        try:
            self.members = self.read_members()
            self.records: dict[str, Record] = {}
            self.check_byte_order()
            calls = {**tensor_calls(), **(extra or {})}
            self.content = read_pickle(self.pickle(), calls, str(self.path), self.storage)
        except BaseException:
            self.close()
            raise

    def read_members(self) -> dict[str, zipfile.ZipInfo]:
        """The zip's members by their names without the folder that all are in."""
        start = self.file.read(0, len(ZIP_MAGIC))
        if start != ZIP_MAGIC:
            raise CheckpointError(
                f"{self.path} is no zip: torch wrote such files before 1.6, and readers of theirs must run what is in "
                f"them. Write it anew where you trust it: python -c \"import torch; torch.save(torch.load('{self.path}'"
                ", weights_only=True), 'new.pt')\""
            )
        try:
            with zipfile.ZipFile(Stream(self.file)) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, ValueError, struct.error, OSError) as error:
            raise self.damaged(f"{error}") from None
        found = {member.filename.partition("/")[2]: member for member in members}
        if len(found) != len(members):
            raise CheckpointError(f"{self.path} has two members of one name, and readers differ in which they take")
        packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise CheckpointError(f"{self.path}: {packed[0]} is compressed, which torch.save never does; {AGAIN}")
        return found

    def check_byte_order(self) -> None:
        if "byteorder" in self.members:
            order = self.record("byteorder").contents()
            if order != b"little":
                raise CheckpointError(
                    f"{self.path} has bytes in {order.decode(errors='replace')}-endian order, read here are "
                    "little-endian ones; save it again on a little-endian machine (torch.load, then torch.save)"
                )

    def pickle(self) -> bytes:
        if "data.pkl" not in self.members or "constants.pkl" in self.members:
            raise CheckpointError(f"{self.path} is a zip, but not one of tensors that torch.save wrote")
        record = self.record("data.pkl")
        if record.size > LARGEST_PICKLE:
            raise CheckpointError(f"{self.path}: its pickle has {record.size} bytes, which no list of tensors needs")
        data = record.contents()
        record.check()
        return data

    def record(self, name: str) -> Record:
        """A member's bytes."""
        if name not in self.records:
            member = self.members[name]
            header = self.file.read(member.header_offset, LOCAL_HEADER.size)
            magic, names, extra = LOCAL_HEADER.unpack(header) if len(header) == LOCAL_HEADER.size else (b"", 0, 0)
            start = member.header_offset + LOCAL_HEADER.size + names + extra
            if magic != ZIP_MAGIC or start + member.file_size > self.file.size:
                raise self.damaged(f"{member.filename} is not where it should be")
            self.records[name] = Record(self.file, name, start, member.file_size, member.CRC)
        return self.records[name]

    @property
    def all_records(self) -> Iterator[Record]:
        return map(self.record, self.members)

    def storage(self, id: Any) -> Storage:
        """What the pickle's id of a tensor's data stands for."""
        kind, storage_type, number, _, numel = id
        name = f"data/{number}"
        if kind != "storage" or not isinstance(storage_type, Global) or storage_type.name not in STORAGES:
            raise CheckpointError(f"{self.path}: its pickle has {kind} of an unknown type as a tensor's data")
        dtype = STORAGES[storage_type.name]
        if name not in self.members or numel * dtype.itemsize > self.members[name].file_size:
            raise self.damaged(f"{name} has not the {numel} elements that it should have")
        return Storage(self.record(name), dtype, numel)

    def damaged(self, why: str) -> CheckpointError:
        return damaged(self.path, why)

    def close(self) -> None:
        self.file.close()


def tensor_calls() -> dict[str, Any]:
    """What a pickle of tensors in plain containers names."""
    return {
        **dict.fromkeys(STORAGES),
        **dict.fromkeys(DTYPES),
        "torch Size": tuple,
        "torch Tensor": None,
        "torch.nn.parameter Parameter": None,
        "torch._utils _rebuild_tensor_v2": rebuild_tensor,
        "torch._utils _rebuild_parameter": lambda data, requires_grad, hooks: data,
        "torch._tensor _rebuild_from_type_v2": rebuild_from_type,
        "collections OrderedDict": dict,
        "__builtin__ set": set,
        "builtins set": set,
    }


def rebuild_tensor(storage: Storage, offset: int, shape: Sequence[int], stride: Sequence[int], *_: Any) -> StoredTensor:
    shape, stride = tuple(shape), tuple(stride)
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"a tensor of shape {shape}, strides {stride} at {offset}")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= storage.numel:
        raise ValueError(f"a tensor of shape {shape}, strides {stride} at {offset} of {storage.numel} elements")
    return StoredTensor(storage, offset, shape, stride)


def rebuild_from_type(function: Global, kind: Global, arguments: tuple[Any, ...], state: Any) -> StoredTensor:
    """A tensor that had attributes; these are not kept."""
    if function.name != "torch._utils _rebuild_tensor_v2":
        raise ValueError(f"a tensor that {function.name} makes")
    return rebuild_tensor(*arguments)
