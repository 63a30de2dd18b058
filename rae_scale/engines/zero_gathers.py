"""How often ZeRO-3 gathers a parameter: DeepSpeed 0.19's rules for fetching, prefetching and releasing, replayed.

There is no short formula. From the third forward on DeepSpeed knows the order in which modules ask for parameters. It
gathers ahead while few enough elements are whole, and it keeps what the lookahead has already passed or what is needed
again within a distance. So a model that fits into these limits is gathered once for forward and backward together, a
larger one up to once per use. This follows `PartitionedParameterCoordinator` in
deepspeed/runtime/zero/partitioned_param_coordinator.py and the module hooks in parameter_offload.py there.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Zero3Limits:
    """Elements, not bytes. The defaults are DeepSpeed's, which `deepspeed_config` leaves as they are.

    persistence: parameters of at most so many elements stay whole between steps.
    reuse:       parameters needed again within so many elements stay whole.
    live, prefetch: at most so many elements are whole when something is gathered ahead, and so many ahead at once.
    sub_group:   of a rank's parts, in one flat buffer; each buffer's gradient norm is an all-reduce of its own.
    """

    persistence: int = 100_000
    reuse: int = 1_000_000_000
    live: int = 1_000_000_000
    prefetch: int = 50_000_000
    sub_group: int = 1_000_000_000


DEEPSPEED_LIMITS = Zero3Limits()


@dataclass(eq=False)
class Call:
    """One call of a module in forward.

    parameters: names of those that it holds itself, in the order of registration.
    backwards:  how many of its outputs backward comes through. enters: whether backward also leaves by its inputs.
    last_saved: the innermost call that saves the last of this call's activations: where backward begins to need them.
    """

    parameters: tuple[str, ...]
    checkpointed: bool = False
    children: list[Call] = field(default_factory=list)
    backwards: int = 0
    enters: bool = False
    last_saved: Call | None = None


class Event(NamedTuple):
    """A module fetches what it holds, or lets go of it. recomputes: in a forward inside backward."""

    call: Call
    fetches: bool
    forward: bool
    recomputes: bool = False


def record_calls(
    module: nn.Module, forward: Callable[[nn.Module], Any], checkpointed: Collection[nn.Module] = ()
) -> Call:
    """The module calls of `forward(module)`, which is run once; made under torch's FakeTensorMode, it costs no memory.

    module: as it was built, without activation checkpointing; `checkpointed`: the modules that will have it.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    stack: list[Call] = []
    roots: list[Call] = []

    def enter(called: nn.Module, inputs: tuple[Any, ...]) -> None:
        own = tuple(names[p] for p in called.parameters(recurse=False))
        call = Call(own, any(called is other for other in checkpointed), enters=count_grad(inputs) > 0)
        (stack[-1].children if stack else roots).append(call)
        stack.append(call)

    def leave(called: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        stack.pop().backwards = count_grad(output)

    def keep(tensor: Tensor) -> Tensor:
        for call in stack:
            call.last_saved = stack[-1]
        return tensor

    hooks = [
        hook
        for each in module.modules()
        for hook in (each.register_forward_pre_hook(enter), each.register_forward_hook(leave))
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(module)
    finally:
        for hook in hooks:
            hook.remove()
    (root,) = roots
    return root


def count_grad(value: Any) -> int:
    return sum(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value))


def forward_events(call: Call, recomputes: bool = False) -> Iterator[Event]:
    yield Event(call, True, True, recomputes)
    for child in call.children:
        yield from forward_events(child, recomputes)
    yield Event(call, False, True, recomputes)


def backward_events(call: Call, recompute: tuple[Call, ...] = ()) -> Iterator[Event]:
    """recompute: the checkpointed call around this one, until its forward was run again."""
    if not call.backwards:
        return
    for _ in range(call.backwards):
        yield Event(call, True, False)
    if call.checkpointed:
        recompute = (call,)
    for outer in recompute:
        if outer.last_saved is call:
            for child in outer.children:  # below the hooks of the checkpointed module itself
                yield from forward_events(child, recomputes=True)
    for child in reversed(call.children):
        yield from backward_events(child, recompute)
    if call.enters:
        yield Event(call, False, False)


class Coordinator:
    """DeepSpeed's bookkeeping in the steady state, for a fixed sequence of events."""

    def __init__(self, root: Call, numels: Mapping[str, int], frozen: Collection[str], limits: Zero3Limits) -> None:
        self.numels, self.frozen, self.limits = numels, frozenset(frozen), limits
        self.persistent = frozenset(name for name, numel in numels.items() if numel <= limits.persistence)
        self.events = [*forward_events(root), *backward_events(root)]
        self.order = [event.call for event in self.events if event.fetches]
        self.place = {name: number for number, name in enumerate(numels)}
        self.whole: set[str] = set()
        self.gathers: Counter[str] = Counter()

    def micro_step(self) -> None:
        """One forward and backward. Adds to `gathers`."""
        self.step, self.count = 0, 0
        self.queue = deque((name, step) for step, call in enumerate(self.order) for name in self.sorted(call))
        self.passed: dict[str, int] = {}
        self.active: dict[str, set[Call]] = {name: set() for name in self.numels}
        self.in_backward: dict[Call, set[str]] = {}  # -> frozen parameters fetched again on its behalf
        for event in self.events:
            if event.fetches:
                self.fetch(event)
            else:
                self.release(event)
        for call, recomputed in self.in_backward.items():
            for name in {*call.parameters, *recomputed} - self.persistent:
                self.active[name].discard(call)
                self.part(name)

    def sorted(self, call: Call) -> list[str]:
        return sorted(set(call.parameters), key=self.place.__getitem__)

    def fetch(self, event: Event) -> None:
        needed = self.sorted(event.call)
        if not event.forward:
            self.in_backward.setdefault(event.call, set())
        for name in needed:
            self.gather(name)
            self.active[name].add(event.call)
            if event.recomputes and name in self.frozen:
                owner = next(reversed(self.in_backward))
                self.in_backward[owner].add(name)
                self.active[name].add(owner)
        due = sum(self.passed.get(name, -1) < self.step for name in needed)
        popped: set[str] = set()
        while self.queue and len(popped) < due:
            name, step = self.queue.popleft()
            self.passed[name] = step
            popped.add(name)
        self.prefetch()
        self.step += 1

    def prefetch(self) -> None:
        room, ahead = min(self.limits.live - self.count, self.limits.prefetch), 0
        found: list[str] = []
        while self.queue and ahead < room:
            name, step = self.queue.popleft()
            self.passed[name] = max(self.passed.get(name, -1), step)
            if name not in self.whole and name not in found:
                found.append(name)
                ahead += self.numels[name]
        for name in found:
            self.gather(name)

    def release(self, event: Event) -> None:
        own = set(event.call.parameters)
        free = {name for name in own - self.persistent if self.passed.get(name, -1) <= self.step}
        distance = 0
        for call in self.order[self.step :]:
            if distance >= self.limits.reuse or not free:
                break
            free.difference_update(call.parameters)
            distance += sum(self.numels[name] for name in call.parameters)
        if not event.forward:
            recomputed = self.in_backward.pop(event.call)
            free |= recomputed - self.persistent
            own |= recomputed
        for name in own:
            self.active[name].discard(event.call)
            if name in free:
                self.part(name)

    def gather(self, name: str) -> None:
        if name not in self.whole:
            self.whole.add(name)
            self.count += self.numels[name]
            self.gathers[name] += 1

    def part(self, name: str) -> None:
        if name in self.whole and not self.active[name]:
            self.whole.discard(name)
            self.count -= self.numels[name]


def zero3_gathers(
    root: Call,
    numels: Mapping[str, int],
    frozen: Collection[str] = (),
    micro_steps: int = 1,
    limits: Zero3Limits = DEEPSPEED_LIMITS,
) -> Counter[str]:
    """How often each parameter is gathered in one optimizer step in the steady state.

    numels: elements of every parameter, in the order of registration.
    """
    coordinator = Coordinator(root, numels, frozen, limits)
    # `step` gathers what persists; it lets go of everything else.
    coordinator.whole = set(coordinator.persistent)
    for left in reversed(range(micro_steps)):
        before, whole = coordinator.gathers.copy(), coordinator.whole.copy()
        coordinator.micro_step()
        if coordinator.whole == whole:
            # What is whole at its start decides all that a micro-step gathers: those that are left do the same.
            for name, count in (coordinator.gathers - before).items():
                coordinator.gathers[name] += left * count
            break
    return coordinator.gathers + Counter(dict.fromkeys(coordinator.persistent, 1))
