"""Run as a program: save asynchronously, and have the process killed at one named point after the other.

    python killed.py FOLDER

Each point gets a run folder FOLDER/<number> with a good checkpoint of step 1, in which a process dies while it saves
step 2. Prints [[name, exit status], ...] as JSON; status -9 is a process that was killed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))

import torch
from toy_model import engine_config, group_of, optim, toy, train_step

from rae_scale.engines import Engine, build_engine
from rae_scale.parallel import Mesh
from rae_scale.state import Retention, Saver, save_checkpoint

POINTS: list[tuple[str, str, int]] = [
    # module and function, before or after which call of it
    ("staging.copy_to_host", "before", 1),
    ("staging.copy_to_host", "after", 20),
    ("save.make_temporary", "after", 1),
    ("save.write_rank", "before", 1),
    ("tensorfile.sync", "before", 1),
    ("save.write_rank", "after", 1),
    ("save.write_json", "before", 1),
    ("save.write_json", "before", 2),
    ("save.write_json", "before", 3),
    ("save.describe", "after", 1),
    ("save.publish", "before", 1),
    ("os.rename", "after", 1),
    ("format.os.replace", "before", 1),
    ("save.point_to", "after", 1),
    ("save.prune", "before", 1),
    ("save.shutil.rmtree", "before", 1),
]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    results = []
    engine = trained(1)  # once: what torch does at its first step takes seconds
    for number, (target, when, call) in enumerate(POINTS):
        child = os.fork()
        if child == 0:
            save_and_die(engine, Path(folder) / str(number), target, when, call)
            os._exit(0)  # nothing has killed it
        _, status = os.waitpid(child, 0)
        results.append([f"{when} call {call} of {target}", os.waitstatus_to_exitcode(status)])
    print(json.dumps(results))


def save_and_die(engine: Engine, run_dir: Path, target: str, when: str, call: int) -> None:
    mesh = Mesh(torch.device("cpu"))
    save_checkpoint(run_dir, 1, engine, mesh, {}, keep_last=1)
    train_step(engine, 1, 0, 1, 1)
    patch(target, when, call)
    saver = Saver(mesh, buffer_gb=1.0)
    saver.save(run_dir, 2, engine, {}, Retention(1))
    train_step(engine, 2, 0, 1, 1)
    saver.wait()


def trained(steps: int) -> Engine:
    engine = build_engine(engine_config("eager"), optim(), toy(), group_of, Mesh(torch.device("cpu")))
    for step in range(steps):
        train_step(engine, step, 0, 1, 1)
    return engine


def patch(target: str, when: str, call: int) -> None:
    """SIGKILL before or after the `call`-th call of `target`."""
    *path, name = target.split(".")
    place: Any = os if path == ["os"] else importlib.import_module(f"rae_scale.state.{path[0]}")
    for attribute in path[1:]:
        place = getattr(place, attribute)
    original: Callable[..., Any] = getattr(place, name)
    calls = []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, dying)


if __name__ == "__main__":
    main(sys.argv[1])
