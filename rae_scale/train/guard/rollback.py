"""Back to an older checkpoint, inside the running processes, when too many steps in a row had to be skipped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rae_scale.state import intact_checkpoint, load_checkpoint, read_state
from rae_scale.state.agreement import on_main
from rae_scale.train.guard.skipped_data import Rollback, drop_abandoned
from rae_scale.train.resume import set_progress
from rae_scale.train.watch import Phase

if TYPE_CHECKING:
    from rae_scale.train.loop import Run

logger = logging.getLogger(__name__)


def rollback_is_due(run: Run) -> bool:
    """Whether `fault.max_skips_in_row` steps in a row changed nothing. The same on all ranks, and after a restart."""
    most = run.config.fault.max_skips_in_row
    return 0 < most <= run.spikes.skips_in_row


def roll_back(run: Run) -> None:
    """Load the newest intact checkpoint from before the skipped steps, and leave out all data from there to here.

    The list of what is left out is on disk first; killed after that, the restarted run goes on from the same checkpoint
    with the same data as this one. Killed before, it skips the same steps again. Collective; no save may be in flight.

    Raises:
        ValueError: on all ranks. There is no such checkpoint, or there were `fault.max_rollbacks` rollbacks.
    """
    fault, skips = run.config.fault, run.spikes.skips_in_row
    trouble = f"steps {run.step - skips + 1} to {run.step} were skipped, see skipped.jsonl in {run.folder}"
    done = len(run.skipped_data.rollbacks)
    if done >= fault.max_rollbacks:
        raise ValueError(
            f"{trouble}; the run was rolled back {done} time(s) already and fault.max_rollbacks={fault.max_rollbacks}. "
            "The data or the learning rate is at fault rather than a few batches: look at the samples that are named "
            "there, lower optim.groups.*.lr or raise fault.spike_factor"
        )
    checkpoint = checkpoint_before(run, run.step - skips)
    if checkpoint is None:
        raise ValueError(
            f"{trouble}, so fault.max_skips_in_row={fault.max_skips_in_row} asks for a rollback, but no intact "
            f"checkpoint from before them is in {run.folder}; save more often (run.save_every="
            f"{run.config.run.save_every}), keep more (run.keep_last), or look at the samples that are named there"
        )
    state = read_state(checkpoint)
    batch_then = run.skipped_data.batch_of(state["step"])
    run.skipped_data.rollbacks.append(Rollback(run.step, state["step"], batch_then, run.batch))
    on_main(run.mesh, lambda: run.skipped_data.write(run.folder))
    drop_abandoned(run.folder, run.skipped_data, run.mesh)
    before = run.step
    with run.watch.phase(Phase.START, before):
        set_progress(run, load_checkpoint(checkpoint, run.engine, run.mesh, verified=True))
        reopen_batches(run)
    run.watch.record("rollback", run.step, from_step=before)
    if run.mesh.is_main:
        logger.warning("%s: went back from step %d to %s", trouble, before, checkpoint)
    for callback in run.callbacks:
        callback.on_rollback(run)


def checkpoint_before(run: Run, step: int) -> Path | None:
    """The newest intact checkpoint of fewer than `step` steps; only if there is none, that of `step` itself. Its
    weights are those that the skipped steps have left as they are: with them only the data change."""
    older = intact_checkpoint(run.folder, run.mesh, up_to=step - 1)
    return older or intact_checkpoint(run.folder, run.mesh, up_to=step)


def reopen_batches(run: Run) -> None:
    assert run.open_batches is not None, "whoever builds a run to be trained says how to open its data"
    run.batches.close()
    run.batches = run.open_batches(run.step)
