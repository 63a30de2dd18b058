"""The input files of a build, one item per sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rae_scale.data.adapters import Adapter, Damage, Item, make_adapter

__all__ = ["Item", "Source"]


class Source:
    """An input file, read by an adapter. Iterate it once; afterwards `damage` says why it ended early, if it did.

    adapter: the name of one (`rae_scale.data.adapters`), with its `options` as the command line gives them, or one made
             before. "auto" sees the layout of each sample from its members.

    Raises ValueError for an unknown adapter or option, and for a kind of file that the adapter does not read;
    FileNotFoundError for a missing file, also for one beside the input that the adapter needs.
    """

    def __init__(
        self, path: str | Path, adapter: str | Adapter = "auto", options: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path(path)
        self.adapter = make_adapter(adapter, options) if isinstance(adapter, str) else adapter
        self.damage: str | None = None
        self.adapter.check(self.path)

    def __iter__(self) -> Iterator[Item]:
        for item in self.adapter.items(self.path):
            if isinstance(item, Damage):
                self.damage = item.message
            else:
                yield item
