"""Run as a program: how much memory saving and resharding take beside a model of many tensors.

    python memory.py FOLDER

Prints {"largest", "total", "save", "buffered", "reshard"}: bytes of the largest tensor and of all, and by how much the
process's own memory (without mapped files) grew while it saved without a buffer, with one, and resharded.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from rae_scale.engines import Engine, Piece
from rae_scale.parallel import Mesh
from rae_scale.parallel.boxes import whole
from rae_scale.state import Retention, Saver, reshard_checkpoint, save_checkpoint
from rae_scale.state import read as read_module

COUNT, ROWS, COLUMNS = 48, 1024, 1024  # 4 MiB each
BUFFER = 3 * 4 * ROWS * COLUMNS


def main(folder: str) -> None:
    mesh, shapes = Mesh(torch.device("cpu")), {f"tensor{number}": (ROWS, COLUMNS) for number in range(COUNT)}
    # Columns: no piece is contiguous, so each has to be copied.
    memory = torch.randn(ROWS, COUNT * COLUMNS)

    def pieces() -> Iterator[Piece]:
        for number, (name, shape) in enumerate(shapes.items()):
            yield Piece("weight", name, shape, whole(shape), memory[:, number * COLUMNS : (number + 1) * COLUMNS])

    engine = cast(Engine, SimpleNamespace(pieces=pieces, shapes=shapes, optimizer_step=1))
    path = save_checkpoint(f"{folder}/warm", 1, engine, mesh, {}, keep_last=1)
    saver = Saver(mesh, BUFFER / 1e9)

    def buffered() -> None:
        saver.save(f"{folder}/buffered", 1, engine, {}, Retention(1))
        saver.wait()

    # Smaller than a file's share of a tensor, so that it is the chunk which bounds.
    read_module.PieceReader.chunks.__defaults__ = (1 << 20,)  # type: ignore[attr-defined]
    growth = {
        "save": growth_of(lambda: save_checkpoint(f"{folder}/save", 1, engine, mesh, {}, keep_last=1)),
        "buffered": growth_of(buffered),
        "reshard": growth_of(lambda: reshard_checkpoint(path, f"{folder}/resharded", 2)),
    }
    print(json.dumps({"largest": 4 * ROWS * COLUMNS, "total": memory.nbytes, "buffer": BUFFER, **growth}))


def growth_of(action: Callable[[], Any]) -> int:
    """By how many bytes this process was larger than before, at the most, while `action` ran."""
    before, peak, running = own_memory(), 0, True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, own_memory())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    running = False
    watcher.join()
    return max(peak, before) - before


def own_memory() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux tells it")


if __name__ == "__main__":
    main(sys.argv[1])
