"""Training: one loop, four stages, callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rae_scale.train.dry_runs import dry_run
    from rae_scale.train.setup import train

__all__ = ["dry_run", "train"]


def __getattr__(name: str) -> Any:
    """`train` and `dry_run` when they are asked for: a plan needs the layouts of this package, but not its loaders and
    callbacks."""
    if name == "dry_run":
        from rae_scale.train.dry_runs import dry_run

        return dry_run
    if name == "train":
        from rae_scale.train.setup import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
