"""A kill storm: a training whose ranks are killed at random again and again, beside one that is left alone.

    python tests/soak/storm.py --kills 50

Both must end with the same parameters, optimizer state, moving average and loss curve, bitwise, and must have used the
same samples in every step. Nothing may be left of the killed: no process, port, temporary file or shared memory. What
was hit, and what it cost, is printed as a table. The status is 1 if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = [str(path) for path in (HERE, HERE.parent / "train", HERE.parent / "dist", ROOT, ROOT / "kernels")]
sys.path[:0] = PATHS

from leftovers import Leftovers  # noqa: E402
from outcome import differences, metrics, outcome  # noqa: E402
from starters import Forked, Launched, Starter  # noqa: E402
from tiny_world import TinyWorld, make_world  # noqa: E402
from traced import Place, Trace, final_samples, read_samples  # noqa: E402

WORLD_SIZE = 2
BATCH_SIZE = 8
SAVE_EVERY = 3
STEPS_PER_KILL = 2 * SAVE_EVERY
# Where ranks are killed: in a phase of starting or of a step, while a checkpoint is written or given its name, or at
# any time after the start.
PLACES = ("join", "load", "data", "all-reduce", "backward", "write", "publish", "any")
IN_A_STEP = ("data", "all-reduce", "backward")
ANY_SECONDS = 2.0
POLL_SECONDS = 0.0002
PATIENCE_SECONDS = 120.0
MISSES = 20


@dataclass
class Kill:
    """place: where to hit. steps: not before so many of the attempt. seconds: after coming there. ranks: who is hit.
    hit: where they were, in fact."""

    place: str
    steps: int
    seconds: float
    ranks: list[int]
    hit: list[Place] = field(default_factory=list)


def plan(kills: int, chance: random.Random) -> list[Kill]:
    """All places equally often, in random order; one rank, or all of them at once as if the power failed."""
    places = [PLACES[number % len(PLACES)] for number in range(kills)]
    chance.shuffle(places)
    return [
        Kill(
            place,
            steps=chance.randrange(STEPS_PER_KILL) if place in IN_A_STEP else 0,
            seconds=chance.uniform(0, ANY_SECONDS if place == "any" else 0.005),
            # Only the first rank gives a checkpoint its name.
            ranks=chance.choice([[0], [0, 1]] if place == "publish" else [[0], [1], [0, 1]]),
        )
        for place in places
    ]


@dataclass(frozen=True)
class Trained:
    """seconds: from the first start to the end."""

    folder: Path
    starter: Starter
    seconds: float


class Storm:
    """Deals blows to the ranks that `starter` starts, one per attempt."""

    def __init__(self, starter: Starter, traces: list[Trace], run_dir: Path) -> None:
        self.starter, self.traces = starter, traces
        self.latest = run_dir / "checkpoints" / "latest"
        self.pids = [0] * len(traces)

    def deal(self, blows: list[Kill]) -> None:
        """All of them, then wait for the training's end.

        Raises:
            RuntimeError: it ended before them, or badly.
        """
        self.starter.start()
        try:
            self.deal_each(blows)
            self.starter.join()
        finally:
            if self.starter.is_alive():
                self.starter.end()
                self.starter.join()
        if self.starter.failure:
            raise RuntimeError(self.starter.failure)

    def deal_each(self, blows: list[Kill]) -> None:
        for blow in blows:
            resumes = self.latest.exists()
            self.wait_for(lambda: all(trace.read().pid not in (0, *self.pids) for trace in self.traces))
            self.pids = [trace.read().pid for trace in self.traces]
            victims = [os.pidfd_open(self.pids[rank]) for rank in blow.ranks]
            try:
                self.hit(blow, victims, resumes)
            finally:
                for victim in victims:
                    os.close(victim)

    def hit(self, blow: Kill, victims: list[int], resumes: bool) -> None:
        """Kill, when the first of `blow.ranks` is where it is wanted: stopped there, looked at, and let go if it has
        moved on."""
        first = self.traces[blow.ranks[0]]
        for miss in range(10**9):
            self.wait_for(lambda: self.is_there(blow, first.read(), resumes))
            time.sleep(blow.seconds if miss < MISSES else 0)
            for victim in victims:
                signal.pidfd_send_signal(victim, signal.SIGSTOP)
            for rank in blow.ranks:
                self.wait_for(lambda rank=rank: is_stopped(self.pids[rank]))
            if blow.place == "any" or self.is_there(blow, first.read(), resumes):
                break
            for victim in victims:
                signal.pidfd_send_signal(victim, signal.SIGCONT)
        blow.hit = [self.traces[rank].read() for rank in blow.ranks]
        for victim in victims:
            signal.pidfd_send_signal(victim, signal.SIGKILL)

    def is_there(self, blow: Kill, place: Place, resumes: bool) -> bool:
        if blow.place == "any":
            return True
        if blow.place == "load" and not resumes:
            return self.latest.exists()  # nothing to load yet: this attempt makes it
        return blow.place in (place.phase, place.saving) and place.steps >= place.first + blow.steps

    def wait_for(self, happened: Any) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            if not self.starter.is_alive():
                raise RuntimeError(f"the training ended between two kills: {self.starter.failure or 'too few steps'}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing happened for {PATIENCE_SECONDS:.0f} s: {[t.read() for t in self.traces]}")
            time.sleep(POLL_SECONDS)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith(("T", "Z"))


def train(world: TinyWorld, engine: str, max_steps: int, folder: Path, blows: list[Kill], start: type) -> Trained:
    """Train in folder/run under `blows`."""
    folder.mkdir()
    tree = world.tree(folder / "run", engine__name=engine, parallel__dp_shard=WORLD_SIZE)
    tree["run"] |= {"max_steps": max_steps, "save_every": SAVE_EVERY}
    tree["data"]["global_batch_size"] = BATCH_SIZE
    tree["optim"]["ema_decay"] = 0.9
    started = time.monotonic()
    starter = start(tree, WORLD_SIZE, folder)
    Storm(starter, [Trace(folder, rank) for rank in range(WORLD_SIZE)], folder / "run").deal(blows)
    return Trained(folder, starter, time.monotonic() - started)


def storm(engine: str, kills: int, seed: int, folder: Path, start: type) -> list[str]:
    """One storm in `folder`; prints what happened, and returns what is not as it must be."""
    max_steps = (kills + 4) * STEPS_PER_KILL
    blows = plan(kills, random.Random(seed))
    leftovers = Leftovers(folder / "tmp")
    world = make_world(folder)
    calm = train(world, engine, max_steps, folder / "calm", [], start)
    leftovers.expect_what_is_there()
    stormy = train(world, engine, max_steps, folder / "storm", blows, start)
    faults = differences(outcome(stormy.folder / "run"), outcome(calm.folder / "run"))
    faults += sample_faults(stormy.folder, calm.folder, max_steps)
    faults += leftovers.found(stormy.folder / "run", stormy.starter.ports)
    if stormy.starter.attempts != kills + 1:
        faults.append(f"{stormy.starter.attempts} attempts for {kills} kills")
    print(table(engine, blows, stormy, max_steps))
    return faults


def sample_faults(stormy: Path, calm: Path, max_steps: int) -> list[str]:
    ours, theirs = (final_samples(folder, WORLD_SIZE) for folder in (stormy, calm))
    steps = range(1, max_steps + 1)
    faults = [f"step {step} had other samples" for step in steps if ours.get(step) != theirs.get(step)]
    positions = [position for samples in ours.values() for position, _ in samples]
    if sorted(positions) != list(range(max_steps * BATCH_SIZE)):
        faults.append("the positions of the data order were not used once each")
    return faults


def table(engine: str, blows: list[Kill], trained: Trained, max_steps: int) -> str:
    starter, seconds = trained.starter, trained.seconds
    rows = [f"{engine}: {len(blows)} kills, {starter.attempts} attempts"]
    rows += [f"  {'aimed at':<12}{'kills':>6}   ranks were in"]
    for place in PLACES:
        of_place = [blow for blow in blows if blow.place == place]
        were = collections.Counter(
            hit.phase + f"+{hit.saving}" * bool(hit.saving) for blow in of_place for hit in blow.hit
        )
        rows.append(f"  {place:<12}{len(of_place):>6}   {', '.join(f'{name} {count}' for name, count in were.items())}")
    again = len(read_samples(trained.folder, 0)) - max_steps
    productive = sum(row["step_s"] for row in metrics(trained.folder / "run"))
    together = sum(len(blow.ranks) == WORLD_SIZE for blow in blows)
    rows += [
        f"  {together} times all ranks at once; {starter.stubborn} survivors did not end when asked to",
        f"  {max_steps} steps, a checkpoint every {SAVE_EVERY}; {again} done again, {again / len(blows):.1f} per kill",
        f"  {seconds:.0f} s, of them {productive:.0f} s of steps that counted: effective {productive / seconds:.0%}",
    ]
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--engine", choices=("fsdp2", "zero"), nargs="+", default=["fsdp2", "zero"])
    parser.add_argument("--launch", action="store_true", help="by rae-scale launch, not from a warm process: slower")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one")
    parser.add_argument("--folder", type=Path, default=None, help="where to leave everything; default: nowhere")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(PATHS)}
    with tempfile.TemporaryDirectory() as temporary:
        for engine in options.engine:
            folder = (options.folder or Path(temporary)) / engine
            folder.mkdir(parents=True)
            faults = storm(engine, options.kills, seed, folder, Launched if options.launch else Forked)
            if faults:
                print("NOT AS IT MUST BE:", *faults, sep="\n  ")
                return 1
            print("  bitwise equal to the run without kills; nothing left", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
