"""What each engine holds during a step beside the model states: parameters that it gathered, gradients on their way,
buffers of its collectives. Bytes of one rank, moment by moment; the code that is followed is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rae_scale.config import Config
from rae_scale.engines.zero_gathers import DEEPSPEED_LIMITS
from rae_scale.plan.parts import States, Unit
from rae_scale.plan.unroll import ROOT, Moment

FLOAT32, BFLOAT16 = 4, 2
BUCKET = 200_000_000
"""Elements: `engines.deepspeed_setup`."""


@dataclass
class Account:
    """The worst moment of each phase so far: bytes by component.

    encoder: of its weights. encoding: what it takes beside them while it runs, which is while a batch is prepared.
    """

    states: States
    encoder: int
    encoding: int
    phases: dict[str, dict[str, int]] = field(default_factory=dict)

    def consider(self, phase: str, **parts: int) -> None:
        """A moment of `phase` with these components beside the model states."""
        states = self.states
        held = {
            "weights": states.weights,
            "optimizer": states.optimizer,
            "ema": states.ema,
            "encoder": self.encoder,
            **parts,
        }
        if phase == "prepare":
            held["workspace"] = held.get("workspace", 0) + self.encoding
        if sum(held.values()) > sum(self.phases.get(phase, {}).values()):
            self.phases[phase] = held

    @property
    def peak(self) -> int:
        return max(sum(parts.values()) for parts in self.phases.values())


@dataclass(frozen=True)
class Step:
    """What an engine's account is made from. units: of parameters, by stack. moments: of a micro-step, in order.

    accumulates: the step has several micro-steps; the last of them is looked at.
    whole: under ZeRO-3, the most elements that are whole, by phase, and between steps ("idle").
    """

    config: Config
    units: Mapping[str, Unit]
    stacks: Mapping[str, int]
    moments: Sequence[Moment]
    accumulates: bool
    whole: Mapping[str, int]

    @property
    def shards(self) -> int:
        return self.config.parallel.dp_shard * self.config.parallel.sp

    @property
    def ranks(self) -> int:
        """That hold one copy of the parameters between them."""
        return self.shards * self.config.parallel.dp_replicate

    @property
    def element(self) -> int:
        """Bytes of what is gathered."""
        return BFLOAT16 if self.config.engine.precision == "bf16" else FLOAT32

    def trained(self) -> int:
        return self.units[ROOT].trained + sum(self.units[stack].trained * count for stack, count in self.stacks.items())


def activations(moment: Moment, with_gradients: bool = False) -> dict[str, int]:
    """What was there before, and what comes on top: the operators' results, and gradients if they stay until the end of
    the interval."""
    found = moment.bytes
    peak = found.with_gradients if with_gradients else found.peak
    return {"activations": found.start, "workspace": max(0, peak - found.start)}


def eager(step: Step, account: Account) -> None:
    """Gradients stay where autograd leaves them."""
    whole = FLOAT32 * step.trained()
    gradients = whole if step.accumulates else 0
    for moment in step.moments:
        account.consider(moment.phase, gradients=gradients, **activations(moment, with_gradients=not step.accumulates))
        if not step.accumulates:
            gradients += moment.bytes.gradients
    account.consider("optimizer", gradients=whole)


@dataclass
class Sharding:
    """FSDP2's units, and what is under way between them. torch/distributed/fsdp/_fully_shard, `FSDPParamGroup`.

    Forward: a unit's all-gather output is kept, beside the parameters copied out of it, until the next unit has been
    gathered. The root's parameters stay whole until the end of backward. Backward: the next unit is gathered ahead, and
    the input of the last reduce-scatter is kept until the next one. With one rank nothing is gathered, only copied.

    gathered: bytes of a unit's whole parameters, by unit. scattered: of the input of its reduce-scatter.
    order:    the units of the blocks in forward, or in backward. done: how many of them have been gathered.
    waiting:  whole gradients of earlier micro-steps. reduced: this rank's part of those that are reduced.
    """

    gathered: Mapping[str, int]
    scattered: Mapping[str, int]
    shards: int
    order: list[str]
    waiting: int
    done: int = 0
    reduced: int = 0
    scattering: int = 0

    @property
    def root(self) -> int:
        return self.gathered[ROOT]

    @property
    def gradients(self) -> int:
        return self.waiting + self.reduced

    def unit(self, number: int) -> int:
        """Bytes of the all-gather output of a unit in order: before the first is the root, after the last nothing."""
        if self.shards == 1 or number >= len(self.order):
            return 0
        return self.gathered[self.order[number]] if number >= 0 else self.root


def fsdp2(step: Step, account: Account) -> None:
    """As `Sharding` says."""
    n = step.shards
    sizes = {name: unit.padded(n) for name, unit in step.units.items()}
    sharding = Sharding(
        gathered={name: step.element * count for name, (count, _) in sizes.items()},
        scattered={name: FLOAT32 * trained for name, (_, trained) in sizes.items()},
        shards=n,
        order=[moment.unit for moment in step.moments if moment.phase == "forward" and moment.unit != ROOT],
        waiting=FLOAT32 * step.trained() if step.accumulates else 0,
    )
    for moment in step.moments:
        if moment.phase == "prepare":
            account.consider("prepare", gradients=sharding.gradients, **activations(moment))
        elif moment.phase == "forward":
            fsdp2_forward(sharding, moment, account)
    sharding.order, sharding.done = sharding.order[::-1], 0
    kept = 0  # the root's gradients, until the end
    for moment in step.moments:
        if moment.phase == "backward":
            kept += fsdp2_backward(step, sharding, moment, kept, account)
    last = sharding.scattered[ROOT]
    account.consider("backward", gradients=sharding.gradients + kept, communication=last + last // n)
    account.consider("optimizer", gradients=sharding.reduced + last // n)


def fsdp2_forward(sharding: Sharding, moment: Moment, account: Account) -> None:
    own = 0
    if moment.unit != ROOT:
        own = sharding.gathered[moment.unit]
        # Two outputs of all-gathers, before the parameters are copied out of the second.
        account.consider(
            "forward",
            gradients=sharding.gradients,
            gathered=sharding.root,
            communication=sharding.unit(sharding.done - 1) + sharding.unit(sharding.done),
            activations=moment.bytes.start,
        )
        sharding.done += 1
    account.consider(
        "forward",
        gradients=sharding.gradients,
        gathered=sharding.root + own,
        communication=sharding.unit(sharding.done - 1),
        **activations(moment),
    )


def fsdp2_backward(step: Step, sharding: Sharding, moment: Moment, kept: int, account: Account) -> int:
    """kept: bytes of the root's gradients. Returns by how many they grow."""
    block = moment.unit != ROOT
    sharding.done += block
    ahead = sharding.unit(sharding.done)
    account.consider(
        "backward",
        gradients=sharding.gradients + kept,
        gathered=sharding.root + (sharding.gathered[moment.unit] if block else 0),
        communication=sharding.scattering + ahead,
        **activations(moment, with_gradients=not step.accumulates),
    )
    new = 0 if step.accumulates else moment.bytes.gradients
    if not block:
        return new
    sharding.scattering = sharding.scattered[moment.unit]
    part = sharding.scattering // sharding.shards
    account.consider(
        "backward",
        gradients=sharding.gradients + kept + new,
        gathered=sharding.root,
        communication=sharding.scattering + part + ahead,
        activations=moment.bytes.stop,
    )
    if step.accumulates:
        sharding.waiting -= FLOAT32 * step.units[moment.unit].trained
    sharding.reduced += part
    return 0


def zero12(step: Step, account: Account) -> None:
    """deepspeed/runtime/zero/stage_1_and_2.py.

    Gradients are copied into a bucket, which exists during backward, and are let go of; when it is full, this rank's
    part of it is copied out. Stage 2 does so with each gradient as it comes. Stage 1 keeps them all and does so at the
    end of the last micro-step. The update works on a copy of this rank's part.
    """
    trained = step.trained()
    bucket = FLOAT32 * min(trained, BUCKET)
    whole, part = FLOAT32 * trained, FLOAT32 * -(-trained // step.ranks)
    stage1 = step.config.engine.zero_stage == 1
    held = (whole if stage1 else part) if step.accumulates else 0
    kept = passed = 0  # bytes of gradients: as autograd left them, and through the bucket
    for moment in step.moments:
        if moment.phase != "backward":
            account.consider(moment.phase, gradients=held, **activations(moment))
            continue
        stays = stage1 and not step.accumulates
        copied = part if passed > bucket else 0
        account.consider(
            "backward",
            gradients=held + kept + copied,
            communication=bucket,
            **activations(moment, with_gradients=stays),
        )
        kept += moment.bytes.gradients if stays else 0
        passed += 0 if stage1 else moment.bytes.gradients
    account.consider("backward", gradients=held + kept if stage1 else held + part, communication=bucket)
    account.consider("optimizer", gradients=part, workspace=part)


def zero3(step: Step, account: Account) -> None:
    """deepspeed/runtime/zero/stage3.py, with `engines.zero_gathers` for what is whole.

    The bucket of gradients and this rank's part of all of them are there all the time. When the bucket is full, a copy
    of it in the order of the ranks is reduced and scattered. Parameters that are gathered together, ahead of their use,
    come in one buffer and are copied out of it. A rank that holds them all has nothing to gather: its part is them.
    """
    trained = step.trained()
    bucket = FLOAT32 * min(trained, BUCKET)
    part = 0 if step.config.engine.offload_optimizer else FLOAT32 * -(-trained // step.ranks)
    element = step.element if step.ranks > 1 else 0
    whole = {phase: element * count for phase, count in step.whole.items()}
    ahead = min(whole["forward"] - whole["idle"], element * DEEPSPEED_LIMITS.prefetch)
    # Where everything is gathered ahead at once, nothing is left to be gathered later.
    at_once = whole["forward"] - whole["idle"] <= ahead
    passed = 0
    for moment in step.moments:
        reducing = bucket if moment.phase == "backward" and passed + moment.bytes.gradients > bucket else 0
        gathering = ahead if moment.phase != "prepare" and not at_once else 0
        account.consider(
            moment.phase,
            gradients=part,
            gathered=whole.get(moment.phase, whole["idle"]),
            communication=bucket + reducing + gathering,
            **activations(moment),
        )
        passed += moment.bytes.gradients
    account.consider("forward", gradients=part, gathered=whole["forward"], communication=bucket + ahead)
    account.consider("backward", gradients=part, gathered=whole["idle"], communication=2 * bucket)
    account.consider("optimizer", gradients=part, gathered=whole["idle"], communication=bucket, workspace=part)


def engine_account(step: Step, account: Account) -> None:
    """Fill `account` with what the configured engine does."""
    engine = step.config.engine
    if engine.name == "eager":
        eager(step, account)
    elif engine.name == "fsdp2":
        fsdp2(step, account)
    else:
        (zero3 if engine.zero_stage == 3 else zero12)(step, account)
