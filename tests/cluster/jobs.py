"""One training on two nodes, started in every way that a user may start it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nodes import ROOT, Node
from outcome import Outcome, metrics
from traced import tracing

POLL_SECONDS = 0.05
PATIENCE_SECONDS = 300.0
# What a shell on a node would have. One thread per process, for there are two cores for all of this.
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "HOME": "/root",
    "TMPDIR": "/var/tmp",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
}

# Of the training that all tests do.
STEPS, SAVE_EVERY = 40, 5
# A node is lost after so many: between two checkpoints.
LOST_AFTER = 7
# Short, so that a node is missed soon.
TIMEOUTS = {"train_timeout_s": 10.0, "save_timeout_s": 10.0, "heartbeat_s": 1.0}

Commands = list[tuple[Node, list[str]]]


@dataclass(frozen=True)
class Reference:
    """What two processes on one node give. samples: step -> (position in the data order, id) of each."""

    outcome: Outcome
    samples: dict[int, list[tuple[int, str]]]


class Job:
    """Commands that run on nodes until they end or are given up."""

    def __init__(self, folder: Path, commands: Commands, traces: Path | None = None) -> None:
        """folder: for what the commands print. traces: where ranks that torchrun starts leave theirs, see `traced`."""
        folder.mkdir(parents=True)
        environment = ENVIRONMENT | (tracing(traces) if traces is not None else {})
        self.logs: list[Path] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for number, (node, command) in enumerate(commands):
            self.logs.append(folder / f"output-{number}.log")
            with self.logs[-1].open("wb") as log:
                self.processes.append(node.start(command, log, environment))

    def wait(self, timeout: float = PATIENCE_SECONDS, which: Sequence[int] | None = None) -> list[int]:
        """The statuses of the commands, or of the numbers in `which`."""
        deadline = time.monotonic() + timeout
        processes = self.processes if which is None else [self.processes[number] for number in which]
        try:
            return [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout:.0f} s\n{self.output()}") from None

    def succeed(self) -> None:
        statuses = self.wait()
        assert not any(statuses), f"ended with {statuses}\n{self.output()}"

    def wait_for_step(self, step: int, run_dir: Path) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while steps_done(run_dir) < step:
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                raise AssertionError(f"did not get to step {step}\n{self.output()}")
            time.sleep(POLL_SECONDS)

    def output(self, number: int | None = None) -> str:
        """What one of the commands has printed, or all."""
        paths = self.logs if number is None else [self.logs[number]]
        return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-8000:]}" for path in paths)


def steps_done(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def train(config: Path, run_dir: Path, *overrides: str) -> list[str]:
    return ["train", str(config), f"run.dir={run_dir}", *overrides]


def on_each(nodes: Sequence[Node], command: list[str], *options: str) -> Commands:
    """Somebody starts the launcher on every node and tells it the node's number. One process per node."""
    shape = ["--nodes", str(len(nodes)), "--processes", "1", "--master-addr", nodes[0].name, *options]
    return [(node, launch([*shape, "--node-rank", str(rank)], command)) for rank, node in enumerate(nodes)]


def from_the_first(nodes: Sequence[Node], command: list[str], folder: Path, *options: str) -> Commands:
    """The first node starts everything over ssh. folder: for the host file."""
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{node.name} slots=1\n" for node in nodes))
    return [(nodes[0], launch(["--hostfile", str(hostfile), *options], command))]


def on_one(node: Node, command: list[str], processes: int, *options: str) -> Commands:
    return [(node, launch(["--processes", str(processes), *options], command))]


def launch(options: list[str], command: list[str]) -> list[str]:
    return [sys.executable, "-m", "rae_scale", "launch", *options, "--", *command]
