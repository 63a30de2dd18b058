"""Who starts the ranks of a storm, and starts them again when one has died."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import yaml
from harness import free_port
from traced import tracing

GRACE_SECONDS = 10.0
POLL_SECONDS = 0.01
# A storm may hit the start of several attempts in a row.
RESTARTS = "8"


class Starter(threading.Thread, ABC):
    """Alive until the training has ended, well or not.

    failure: why it did not end well. attempts: how often all ranks were started. ports: on which rank 0 listened.
    stubborn: ranks that did not end when they were asked to, because another had died, and had to be killed.
    """

    def __init__(self) -> None:
        super().__init__(name="starter", daemon=True)
        self.failure = ""
        self.attempts = 0
        self.ports: list[int] = []
        self.stubborn = 0

    @abstractmethod
    def end(self) -> None:
        """Kill whatever runs."""


class Forked(Starter):
    """What `rae-scale launch` does on one machine, with ranks forked from a process that has imported everything
    already: they train after a second, and not after ten."""

    def __init__(self, tree: dict[str, Any], world_size: int, folder: Path) -> None:
        super().__init__()
        self.tree, self.world_size, self.folder = tree, world_size, folder
        self.ranks: list[Any] = []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["warm"])

    def run(self) -> None:
        while not self.failure and not self.attempt():
            pass

    def attempt(self) -> bool:
        """Whether all ranks have ended well."""
        self.attempts += 1
        self.ports.append(free_port())
        places = [(self.tree, rank, self.world_size, self.ports[-1], self.folder) for rank in range(self.world_size)]
        self.ranks = [self.context.Process(target=rank_main, args=place) for place in places]
        for process in self.ranks:
            process.start()
        while any(process.is_alive() for process in self.ranks):
            if any(process.exitcode for process in self.ranks):
                self.stop_ranks()
            time.sleep(POLL_SECONDS)
        statuses = [process.exitcode for process in self.ranks]
        # 1 and SIGTERM: of survivors. Anything else, or an end without a kill, is no consequence of one.
        if any(statuses) and (-signal.SIGKILL not in statuses or not {*statuses} <= {0, 1, -15, -9}):
            self.failure = f"ranks ended with {statuses}; see {self.folder}/rank-*.log"
        return not any(statuses)

    def stop_ranks(self) -> None:
        for process in self.ranks:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                self.stubborn += 1
                process.kill()

    def end(self) -> None:
        self.failure = self.failure or "given up"
        for process in self.ranks:
            process.kill()


def rank_main(tree: dict[str, Any], rank: int, world_size: int, port: int, folder: Path) -> None:
    """One rank of one attempt."""
    threading.Thread(target=end_with_the_driver, name="driver", daemon=True).start()
    descriptor = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from traced import watch

    from rae_scale.config import parse_config
    from rae_scale.train import setup

    watch(folder, rank)
    setup.train(parse_config(tree))


def end_with_the_driver() -> None:
    """A rank is no child of the process that asked for it, so the kernel would let it live on."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    driver.join()
    os.kill(os.getpid(), signal.SIGKILL)


class Launched(Starter):
    """`rae-scale launch --restarts`, once."""

    def __init__(self, tree: dict[str, Any], world_size: int, folder: Path) -> None:
        super().__init__()
        config = folder / "run.yaml"
        config.write_text(yaml.safe_dump(tree), encoding="utf-8")
        self.log = folder / "launch.log"
        options = ["--processes", str(world_size), "--restarts", RESTARTS]
        # It stops, and what it has started with it, when this process is killed.
        self.command = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "rae_scale"]
        self.command += ["launch", *options, "--", "train", str(config)]
        self.environment = os.environ | tracing(folder)

    def start(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        super().start()

    def run(self) -> None:
        status = self.process.wait()
        self.attempts = 1 + self.log.read_text(errors="replace").count(": starting again in ")
        if status:
            self.failure = f"it ended with {status}; see {self.log}"

    def end(self) -> None:
        self.process.kill()
