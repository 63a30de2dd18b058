"""Faults at chosen samples, steps and writes, for the tests and for the ranks that they start."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from rae_scale.state import tensorfile
from rae_scale.train.callbacks import Callback, Checkpoints
from rae_scale.train.stages import GenerationStage

LARGE = 1e4
WATCH_SPIKES: dict[str, Any] = {
    "fault__spike_factor": 3.0,
    "fault__grad_spike_factor": 20.0,
    "fault__spike_window": 3,
    "run__max_steps": 8,
    "run__save_every": 2,
    "run__keep_last": 9,
    "optim__ema_decay": 0.9,
}
# Of each global batch of 8, rank 1 has the last four: it alone meets these, in steps 4, 5, 6 and 7.
RANK_1_FAULTS = {29: "loss nan", 38: "gradient nan", 47: "gradient spike", 54: "loss spike"}
RANK_1_FULL = (3, 5)
"""Steps that are done while it has no room on its disk."""
FULL = OSError(errno.ENOSPC, "No space left on device")
TIMINGS = ("_s", "_per_second", "tflops", "memory_bytes", "effective_time")

PLAIN_LOSS = GenerationStage.loss


def faulty_loss(faults: Mapping[int, str]) -> Callable[..., Any]:
    """`GenerationStage.loss` that goes wrong in micro-batches with certain samples.

    faults: position of a sample -> "loss nan", "loss spike", "gradient nan" or "gradient spike".
    """
    factors = {"nan": float("nan"), "spike": LARGE}

    def loss(self: GenerationStage, module: Any, inputs: Any, totals: Any) -> Any:
        output = PLAIN_LOSS(self, module, inputs, totals)
        index = inputs.batch.sample_index
        for position, fault in faults.items():
            if position in index:
                what, kind = fault.split()
                factor = factors[kind]
                if what == "loss":
                    scale = torch.where(index == position, factor, 1.0)
                    output = replace(output, loss=output.loss * factor, per_sample=output.per_sample * scale)
                else:
                    output.loss.register_hook(lambda gradient, factor=factor: gradient * factor)
        return output

    return loss


def add_callback(callback: Callback, build: Callable[..., Any]) -> Callable[..., Any]:
    """`setup.build_callbacks` with one more, which comes first."""
    return lambda *args: [callback, *build(*args)]


def curve(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without those that depend on the machine's mood."""
    return [{k: v for k, v in line.items() if not k.endswith(TIMINGS)} for line in lines]


class FullAt(Callback):
    """While `first` to `end` - 1 steps are done, this process finds the disk full when it writes tensors.

    setattr: of the monkeypatch, or where there is no test to undo it, the plain one.
    """

    main_only = False

    def __init__(self, setattr: Callable[[Any, str, Any], None], first: int, end: int) -> None:
        def sync(descriptor: int) -> None:
            if self.full:
                raise FULL
            plain(descriptor)

        plain = tensorfile.sync
        self.full, self.first, self.end = False, first, end
        setattr(tensorfile, "sync", sync)

    def on_step_start(self, run: Any) -> None:
        finish_save(run)
        self.full = self.first <= run.step < self.end


def finish_save(run: Any) -> None:
    """A save that is under way ends as it began."""
    for callback in run.callbacks:
        if isinstance(callback, Checkpoints) and callback.saver._thread is not None:
            callback.saver._thread.join()


class Dies(Exception):
    pass


class Record(Callback):
    """After each step: how many were skipped, and whether this rank's memory is bitwise what it was before it."""

    main_only = False

    def __init__(self) -> None:
        self.before: dict[Any, torch.Tensor] = {}
        self.unchanged: list[bool] = []
        self.skipped: list[int] = []

    def on_train_start(self, run: Any) -> None:
        self.before = memory(run.engine)

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        now = memory(run.engine)
        self.unchanged.append(all(torch.equal(now[key], self.before[key]) for key in now))
        self.skipped.append(run.skipped)
        self.before = now


def memory(engine: Any) -> dict[Any, torch.Tensor]:
    """All that this rank holds: weights, moments, averages, and what is computed with."""
    held = {(kind, shard.name): tensor.clone() for shard in engine.shards for kind, tensor in shard.tensors.items()}
    held |= {("copy", copy.kind, copy.name): copy.tensor.clone() for copy in engine.copies()}
    return held
