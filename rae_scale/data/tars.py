"""Reads the members of a tar file, grouped into samples the webdataset way: `key.suffix`.

Nothing is extracted under its own name (a compressed tar is unpacked to a file without a name). The headers are scanned
first, which finds links, duplicates, oversized members and a truncated end before any data is read; each member is then
read from its own offset, so memory holds one sample at a time.
"""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from rae_scale.data.record import BadSample
from rae_scale.data.tar_headers import TarHeaders
from rae_scale.data.unpack import is_packed, unpack

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MAX_MEMBER_BYTES = 256 * 2**20
MAX_MEMBERS = 2_000_000
MAX_NAME_LENGTH = 512

# These suffixes hold the whole file name in the one-folder-per-sample variant: `000017/image.jpg`.
FOLDER_MEMBERS = ("image.jpg", "image.jpeg", "image.png", "image.webp", "synthetic_caption.txt", "original_caption.txt")


# tarfile keeps bytes that are not UTF-8 as lone surrogates.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


class Member(NamedTuple):
    name: str
    offset: int
    size: int


@dataclass
class Group:
    """The members of one sample, by suffix. `problem` says why the sample cannot be used at all."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    problem: BadSample | None = None


class TarReader:
    """The samples of one tar file.

    groups:  in order of first appearance; members of a key need not be neighbours.
    damage:  why the archive could not be read to its end, else None. What was complete is in `groups`.

    Raises FileNotFoundError or PermissionError, and OSError when there is no room to unpack a compressed tar. A file
    that is no tar has no groups and says so in `damage`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.groups: list[Group] = []
        self.damage: str | None = None
        self._file: IO[bytes]
        if is_packed(self.path):
            self._file, self.damage = unpack(self.path)
        else:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  closed by close()
        self._group_of_key: dict[str, Group] = {}
        self._member_of_name: dict[str, Member] = {}
        self._scan()

    def read(self, member: Member) -> bytes:
        data = os.pread(self._file.fileno(), member.size, member.offset)
        if len(data) != member.size:
            raise BadSample("truncated member", f"{member.name} has {len(data)} of {member.size} bytes")
        return data

    def find(self, name: str) -> Member | None:
        """The member called exactly `name`, if there is a usable one."""
        return self._member_of_name.get(name)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TarReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _scan(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        unpacking_damage = self.damage
        try:
            headers = TarHeaders(self._file, size)
            self._scan_members(headers, size)
            if self.damage is None:
                self.damage = self._tail_damage(headers.end, size)
        # tarfile lets some of these escape from malformed pax records.
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            self.damage = f"cannot be read to its end, truncated, corrupt or not a tar: {error}"
        self.damage = unpacking_damage or self.damage

    def _scan_members(self, headers: TarHeaders, size: int) -> None:
        end = 0
        for count, info in enumerate(headers, start=1):
            if info.size < 0 or info.offset_data < end:
                self.damage = f"corrupt header: {info.name!r} points backwards in the file"
                return
            if count > MAX_MEMBERS:
                self.damage = f"more than {MAX_MEMBERS} members; split the archive"
                return
            end = info.offset_data
            if not info.isdir():
                self._add(info, size)

    def _add(self, info: tarfile.TarInfo, file_size: int) -> None:
        name = info.name.removeprefix("./")
        problem = name_problem(name) or member_problem(info, file_size)
        key, suffix = split_name(name) or (name, "")
        group = self._group_of_key.get(key)
        if group is None or suffix in group.members:
            # A suffix that comes twice starts a second sample of the same key. Which one is meant cannot be known, so
            # the first stays and the second is refused.
            if group is not None:
                problem = BadSample("duplicate key", f"{name} appears twice; the first one is used")
            group = self._group_of_key[key] = Group(key)
            self.groups.append(group)
        group.members[suffix] = Member(name, info.offset_data, info.size)
        group.problem = group.problem or problem
        if problem is None:
            self._member_of_name.setdefault(name, group.members[suffix])

    def _tail_damage(self, offset: int, size: int) -> str | None:
        """An archive ends with zero blocks; without this check one that was cut between members looks complete."""
        if offset + tarfile.BLOCKSIZE > size:
            return f"ends at byte {size} without an end mark: truncated, or not closed by its writer"
        self._file.seek(offset)
        while block := self._file.read(2**20):
            if any(block):
                return f"unreadable data after byte {offset}: corrupt header, or several archives joined into one"
        return None


def split_name(name: str) -> tuple[str, str] | None:
    """`a/b/000017.image.jpg` -> (`a/b/000017`, `image.jpg`); None when there is no key or no suffix."""
    folder, slash, base = name.rpartition("/")
    if folder and base in FOLDER_MEMBERS:
        return folder, base
    stem, dot, suffix = base.partition(".")
    if not (stem and dot and suffix):
        return None
    return folder + slash + stem, suffix.lower()


def name_problem(name: str) -> BadSample | None:
    if len(name) > MAX_NAME_LENGTH:
        return BadSample("bad name", f"member name of {len(name)} characters (limit {MAX_NAME_LENGTH})")
    if name.startswith("/") or ".." in name.split("/"):
        return BadSample("bad name", f"{name!r} points outside the archive")
    if UNPRINTABLE.search(name):
        return BadSample("bad name", f"{name!r} holds control characters or is not UTF-8")
    if split_name(name) is None:
        return BadSample("bad name", f"{name!r} is not of the form key.suffix")
    return None


def member_problem(info: tarfile.TarInfo, file_size: int) -> BadSample | None:
    if not info.isreg() or info.issparse():
        return BadSample("not a file", f"{info.name!r} is a link, device or sparse file")
    if info.size > MAX_MEMBER_BYTES:
        return BadSample("member too large", f"{info.name!r} has {info.size} bytes (limit {MAX_MEMBER_BYTES})")
    if info.offset_data + info.size > file_size:
        return BadSample("truncated member", f"{info.name!r} goes on past the end of the archive")
    return None
