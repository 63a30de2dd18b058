"""From the trace of few blocks to the timeline of the real depth."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from rae_scale.plan.timeline import Interval
from rae_scale.plan.trace import BLOCKS, Trace

Phase = Literal["prepare", "forward", "backward"]
ROOT = "root"
BLOCK = re.compile(r"(?P<stack>.+) (?P<number>\d+)(?P<backward> backward)?")


@dataclass(frozen=True)
class Moment:
    """An interval of a step of the whole model.

    unit:   the stack that a block belongs to, or `ROOT` for what is in none.
    number: of the block in its stack.
    """

    phase: Phase
    unit: str
    number: int
    bytes: Interval


def unroll(traced: Trace) -> list[Moment]:
    """The moments of a step in order, with every block of the real depth.

    What a block adds until the end of forward, and what is left of that for backward, need not be the same: autocast
    keeps its casts of weights until the end of forward, whether backward needs them or not.
    """
    moments: list[Moment] = []
    phase: Phase = "prepare"
    offset = kept = 0  # bytes of the blocks that the trace does not have: now, and when backward begins
    kept_of: dict[str, int] = {}
    for interval in traced.intervals:
        if interval.name == "backward":
            # The last interval of forward ended when casts had been dropped.
            last = moments[-1].bytes
            moments[-1] = replace(moments[-1], bytes=replace(last, stop=last.stop - offset + kept))
            offset = kept
        if interval.name in ("forward", "backward"):
            phase = interval.name  # type: ignore[assignment]
        match = BLOCK.fullmatch(interval.name)
        if match is None:
            moments.append(Moment(phase, ROOT, 0, shifted(interval, offset)))
            continue
        stack, number, backward = match["stack"], int(match["number"]), match["backward"] is not None
        extra = max(0, traced.stacks[stack] - BLOCKS)
        if not backward:
            moments.append(Moment(phase, stack, number, shifted(interval, offset)))
            if number == BLOCKS - 1:
                kept_of[stack] = interval.kept
                kept += extra * interval.kept
                for copy in range(extra):
                    offset += interval.stop - interval.start
                    moments.append(Moment(phase, stack, number + copy + 1, shifted(interval, offset)))
            continue
        if number == 0:
            for copy in range(extra):
                inner = shifted(interval, offset)
                moments.append(Moment(phase, stack, extra - copy, replace(inner, stop=inner.start - kept_of[stack])))
                offset -= kept_of[stack]
        moments.append(Moment(phase, stack, number + extra if number else 0, shifted(interval, offset)))
    return moments


def shifted(interval: Interval, offset: int) -> Interval:
    return replace(
        interval,
        start=interval.start + offset,
        stop=interval.stop + offset,
        peak=interval.peak + offset,
        with_gradients=interval.with_gradients + offset,
    )
