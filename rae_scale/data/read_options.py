"""How sources are read, apart from the order: one picklable record that every reader of a run shares."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rae_scale.config.schema import DataConfig


@dataclass(frozen=True)
class ReadOptions:
    """
    cache_dir:       folder for remote and for decompressed shards; None is one in the machine's temporary folder.
    cache_gb:        its limit in units of 1e9 bytes.
    bad_shards:      what reading a sample of a damaged shard does: raise BadShard (quarantine) or ValueError (stop).
    fetch_timeout_s: seconds without a byte, or behind the least speed, after which an attempt to fetch is given up.
    fetch_attempts:  how often a fetch is tried before the source counts as unreachable.
    check_hashes:    hash a shard when it is first opened. Off, its size and its offsets are still checked: for a look
                     at a few samples of many shards.
    """

    cache_dir: Path | None = None
    cache_gb: float = 100.0
    bad_shards: Literal["quarantine", "stop"] = "quarantine"
    fetch_timeout_s: float = 60.0
    fetch_attempts: int = 6
    check_hashes: bool = True

    @classmethod
    def of(cls, data: DataConfig) -> ReadOptions:
        return cls(
            cache_dir=None if data.cache_dir is None else Path(data.cache_dir),
            cache_gb=data.cache_gb,
            bad_shards=data.bad_shards,
            fetch_timeout_s=data.fetch_timeout_s,
            fetch_attempts=data.fetch_attempts,
        )


def settings_of_the_cache(data: DataConfig) -> list[str]:
    """Those that are set, and mean nothing where every source is a folder of shards that are not compressed."""
    names = ("cache_dir", "cache_gb", "fetch_timeout_s", "fetch_attempts")
    return [f"data.{name}" for name in names if getattr(data, name) != type(data).model_fields[name].default]
