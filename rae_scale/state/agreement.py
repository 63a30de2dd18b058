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

    Raises:
        CheckpointError: with every rank's problem. A rank on which something else than the disk or the checkpoint was
            at fault, such as memory or a defect, raises that.
    """
    problem, value, failure = "", None, None
    try:
        value = action()
    except Exception as error:
        failure = error
        text = f"{error}" if isinstance(error, OSError | CheckpointError) else f"{type(error).__name__}: {error}"
        problem = text if mesh.world_size == 1 else f"rank {mesh.rank}: {text}"
    outcomes = mesh.gather_objects((problem, value))
    if failure is not None and not isinstance(failure, OSError | CheckpointError):
        raise failure
    problems = [problem for problem, _ in outcomes if problem]
    if problems:
        raise CheckpointError("\n".join(problems))
    return [value for _, value in outcomes]


def on_main(mesh: Mesh, action: Callable[[], object]) -> None:
    """Run `action` on the main rank while the others wait; if it fails, fail on all. Collective."""
    agree(mesh, action if mesh.is_main else lambda: None)
