"""What ranks do that get stuck. Run by `test_stalls.py` as processes of their own: they do not come back."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rae_scale.config import parse_config
from rae_scale.parallel import Mesh
from rae_scale.train import setup
from rae_scale.train.stages import GenerationStage
from rae_scale.train.watch import Phase, Watch
from rae_scale.train.watch.heartbeat import read_heartbeat

STUCK_AT = 2
"""Steps that are done by then."""


def sleep_for_ever() -> None:
    threading.Event().wait()


def stop_the_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_with_the_global_lock() -> None:
    """C code that neither returns nor lets another thread run."""
    ctypes.PyDLL(None).sleep(600)


def raise_an_error() -> None:
    raise RuntimeError("only here")


HOW: dict[str, Callable[[], None]] = {
    each.__name__: each for each in (sleep_for_ever, stop_the_process, sleep_with_the_global_lock, raise_an_error)
}


def get_stuck(run_dir: Path, how: str) -> None:
    (run_dir / "stuck-since").write_text(str(time.time()))
    HOW[how]()


def alone(tree: dict[str, Any], how: str) -> None:
    """Nothing but the watch, in one process."""
    config = parse_config(tree)
    run_dir = Path(config.run.dir)
    with setup.rank_log(config) as log:
        watch = Watch(config.fault, log)
        watch.begin(config, Mesh(torch.device("cpu")))
        watch.clock.step_done(kept=True)
        watch.enter(Phase.STEP, STUCK_AT)
        while (beat := read_heartbeat(run_dir, 0)) is None or beat.phase != Phase.STEP:
            pass  # until the watchdog has looked
        get_stuck(run_dir, how)


def in_training(tree: dict[str, Any], how: str) -> None:
    """Rank 1 of a training gets stuck in the middle of its third step."""
    prepare = GenerationStage.prepare

    def prepare_or_not(stage: Any, batch: Any, step: int) -> Any:
        if step == STUCK_AT:
            get_stuck(Path(tree["run"]["dir"]), how)
        return prepare(stage, batch, step)

    if os.environ["RANK"] == "1":
        GenerationStage.prepare = prepare_or_not  # type: ignore[method-assign]
    setup.train(parse_config(tree))
