"""What all adapters share: an adapter knows how one corpus keeps its samples in its files.

An adapter is a frozen dataclass in a file of its own. Its docstring states the layout and where it comes from; its
fields are its options, which the command line gives as `--adapter-option name=value`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rae_scale.data.layouts import IMAGE_SUFFIXES
from rae_scale.data.record import BadSample, Sample
from rae_scale.data.tars import TAR_SUFFIXES, Group, TarReader


@dataclass(frozen=True)
class Item:
    """One sample of an input file, or the reason why there is none."""

    key: str
    sample: Sample | None = None
    layout: str = ""
    problem: BadSample | None = None


@dataclass(frozen=True)
class Damage:
    """Comes last from an input file that could not be read to its end."""

    message: str


@dataclass(frozen=True)
class Adapter(ABC):
    """Turns an input file into samples. `suffixes` are the kinds of file that it reads."""

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]] = TAR_SUFFIXES

    @abstractmethod
    def items(self, path: Path) -> Iterator[Item | Damage]:
        """The samples of an input file, in an order that depends on nothing but its content."""

    def check(self, path: Path) -> None:
        """Raises ValueError or FileNotFoundError for an input or a side file that this adapter cannot read."""
        if re.search(r"\.(tar|tar\.gz|tgz)[._-]part", path.name.lower()):
            raise ValueError(
                f"{path}: a piece of an archive that was cut up; join the pieces first, in the order of their numbers: "
                "cat $(ls -v NAME.tar.gz_part*) > NAME.tar.gz"
            )
        if not path.name.lower().endswith(self.suffixes):
            kinds = " or ".join(self.suffixes)
            raise ValueError(f"{path}: unknown kind of input for adapter {self.name!r}; give a {kinds} file")
        for file in (path, *self.side_files()):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: no such file; check the path (a pattern must be expanded by the shell)"
                )

    def side_files(self) -> tuple[Path, ...]:
        """Other files that the samples are made from: a change to one of them makes what was built stale."""
        return ()


@dataclass(frozen=True)
class TarAdapter(Adapter):
    """An adapter for tars in which each key is one sample."""

    def items(self, path: Path) -> Iterator[Item | Damage]:
        with TarReader(path) as tar:
            attached = self.attached(tar)
            for group in tar.groups:
                if group.members.keys() <= IMAGE_SUFFIXES and all(m.name in attached for m in group.members.values()):
                    continue
                try:
                    if group.problem is not None:
                        raise group.problem
                    yield self.item(group, tar)
                except BadSample as problem:
                    yield Item(group.key, problem=problem)
            if tar.damage:
                yield Damage(tar.damage)

    def item(self, group: Group, tar: TarReader) -> Item:
        return Item(group.key, self.sample(group, tar), self.name)

    @abstractmethod
    def sample(self, group: Group, tar: TarReader) -> Sample:
        """One sample of the tar, from a group without a problem. Raises BadSample."""

    def attached(self, tar: TarReader) -> set[str]:
        """Names of images that belong to samples of another key, and so are none of their own."""
        return set()
