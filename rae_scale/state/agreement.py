"""Doing something on several ranks so that all of them succeed or all of them fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rae_scale.parallel import Mesh
from rae_scale.state.format import CheckpointError

T = TypeVar("T")


def agree(mesh: Mesh, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return all results in rank order; if it fails on any rank, fail on all.

    Without that, one full disk would leave the other ranks waiting. Collective; no rank returns before all have run.
    """
    problem, value = "", None
    try:
        value = action()
    except (OSError, CheckpointError) as error:
        problem = f"{error}" if mesh.world_size == 1 else f"rank {mesh.rank}: {error}"
    outcomes = mesh.gather_objects((problem, value))
    problems = [problem for problem, _ in outcomes if problem]
    if problems:
        raise CheckpointError("\n".join(problems))
    return [value for _, value in outcomes]


def on_main(mesh: Mesh, action: Callable[[], object]) -> None:
    """Run `action` on the main rank while the others wait; if it fails, fail on all. Collective."""
    agree(mesh, action if mesh.is_main else lambda: None)
