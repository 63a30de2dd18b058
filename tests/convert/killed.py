"""Run as a program: write a folder, and be killed at one call after the other that makes something last.

    python killed.py FOLDER

FOLDER/whole is the folder of a writer that lived, FOLDER/<call>/out of one that died. Prints [[call, exit status], ...]
as JSON; status -9 is a process that was killed.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from test_writer import Reads, write

from rae_scale.convert import parts, stretches

CALLS = ("journal.sync", "stretches.sync", "writer.sync", "writer.sync_folder", "writer.os.rename")


def main(folder: Path) -> None:
    parts.CHUNK_BYTES, stretches.STRETCH_BYTES = 64, 100
    write(folder / "whole", Reads(), torch.bfloat16)
    deaths = []
    for call in CALLS:
        for after in (False, True):
            for count in itertools.count():
                out = folder / f"{call} {after} {count}" / "out"
                status = in_child(lambda out=out, call=call, after=after, count=count: die(out, call, after, count))
                if status == 0:
                    break
                deaths.append([out.parent.name, status])
    print(json.dumps(deaths))


def in_child(action: Callable[[], None]) -> int:
    """How a child process that does it ends."""
    child = os.fork()
    if child == 0:
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(out: Path, call: str, after: bool, count: int) -> None:
    module, *path, name = call.split(".")
    owner: Any = importlib.import_module(f"rae_scale.convert.{module}")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), iter(range(1000))

    def deadly(*args: Any) -> Any:
        last = next(calls) == count
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)
    write(out, Reads(), torch.bfloat16)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
