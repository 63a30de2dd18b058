"""What is launched: a rae-scale command. Of a training, its settings too: its folder, its size, its time-outs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rae_scale.config import Config, load_config

# Logs of commands that have no run folder.
OTHER_COMMANDS = Path("runs/launch")
EXTRA_S = 60.0


@dataclass(frozen=True)
class Subject:
    """command: the words behind `rae-scale`. config: of a training, else None."""

    command: tuple[str, ...]
    config: Config | None

    @property
    def folder(self) -> Path:
        return OTHER_COMMANDS if self.config is None else Path(self.config.run.dir)

    @property
    def grace_s(self) -> float:
        """How long after a request to stop the processes may still be at it: waiting for data, saving."""
        if self.config is None:
            return EXTRA_S
        fault = self.config.fault
        return fault.stop_grace_s + fault.save_timeout_s + EXTRA_S


def read_subject(command: Sequence[str]) -> Subject:
    """
    Raises:
        ValueError: there is no command, it is `launch`, or its settings are wrong.
    """
    if not command:
        raise ValueError("nothing to launch; name a command, for example: rae-scale launch -- train configs/run/x.yaml")
    if command[0] == "launch":
        raise ValueError("`launch` cannot launch itself; name another command, for example train")
    if command[0] != "train":
        return Subject(tuple(command), None)
    words = [word for word in command[1:] if not word.startswith("-")]
    if not words:
        raise ValueError("`train` needs a run file, for example: rae-scale launch -- train configs/run/demo.yaml")
    return Subject(tuple(command), load_config(words[0], words[1:]))


def fit(subject: Subject, processes: int) -> Subject:
    """The same training on `processes` processes: parallel.dp_shard takes up the difference.

    The global batch and the order of its samples stay, so the loss curve does, too.

    Raises:
        ValueError: the other sizes, or the batch, do not divide.
    """
    config = subject.config
    if config is None:
        raise ValueError(f"--fit changes the layout of a training; `{subject.command[0]}` has none, leave --fit out")
    parallel = config.parallel
    others = parallel.world_size // parallel.dp_shard
    if processes % others:
        sizes = f"dp_replicate={parallel.dp_replicate}, sp={parallel.sp}, tp={parallel.tp}"
        divisors = [size for size in range(processes, 0, -1) if size % others == 0]
        fix = f"use {divisors[0]} processes" if divisors else f"use {others} or a multiple"
        raise ValueError(
            f"--fit: {processes} processes do not divide by the {others} of parallel.{sizes}; {fix}, or set smaller "
            "ones behind the run file, for example parallel.dp_replicate=1"
        )
    command = (*subject.command, f"parallel.dp_shard={processes // others}")
    try:
        return read_subject(command)
    except ValueError as error:
        raise ValueError(
            f"--fit: {processes} processes cannot keep data.global_batch_size={config.data.global_batch_size}: {error}"
        ) from None


def check_size(subject: Subject, processes: int) -> None:
    """The training's layout has as many processes as there will be.

    Raises:
        ValueError: it has not.
    """
    if subject.config is None or subject.config.parallel.world_size == processes:
        return
    parallel = subject.config.parallel
    raise ValueError(
        f"{processes} process(es) would be started, but parallel.dp_replicate x dp_shard x sp x tp = "
        f"{parallel.dp_replicate} x {parallel.dp_shard} x {parallel.sp} x {parallel.tp} = {parallel.world_size}; "
        "add --fit to let parallel.dp_shard take up the difference, or change --nodes, --processes or parallel.*"
    )
