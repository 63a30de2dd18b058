"""Traces kept on disk: a trace depends on the model and on how a rank runs it, not on how many ranks there are, and
people plan the same model again and again."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from rae_scale.parallel.same import code_files, hash_of
from rae_scale.plan.timeline import Interval

if TYPE_CHECKING:
    from rae_scale.plan.trace import Key, Trace

logger = logging.getLogger(__name__)
VARIABLE = "RAE_PLAN_CACHE"


def folder() -> Path | None:
    """`RAE_PLAN_CACHE`, or the user's cache folder; None if the variable is set and empty."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return Path(chosen) if chosen else None
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rae-scale" / "plan"


def kept(make: Callable[[Key], Trace], key: Key, read: Callable[..., Trace]) -> Trace:
    """What `make(key)` gives, from disk if it was made before by the same code.

    A file that cannot be read is made again, and a folder that cannot be written to is done without: planning needs
    neither.
    """
    where = folder()
    if where is None:
        return make(key)
    file = where / f"{xxhash.xxh3_128_hexdigest(f'{code()} {key!r}')}.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return read(tuple(Interval(**each) for each in content["intervals"]), content["stacks"])
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.info("%s is made again: %s", file, error)
    made = make(key)
    try:
        write(file, {"intervals": [asdict(each) for each in made.intervals], "stacks": dict(made.stacks)})
    except OSError as error:
        logger.info("a trace could not be kept: %s; %s= (empty) keeps none", error, VARIABLE)
    return made


def write(file: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: other processes may plan at the same time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(file)


@functools.cache
def code() -> str:
    """A hash of everything that a trace follows from besides its key: torch, and our own files."""
    return hash_of(code_files() | {"torch": torch.__version__})
