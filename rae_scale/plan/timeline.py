"""What a training step's tensors take at each moment, told by the operators that allocate them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._pytree import tree_leaves

from rae_scale.bench.memory import Census, identity

OPERATORS = "rae_kernels::"


@dataclass(frozen=True)
class Interval:
    """Between two marks; all bytes.

    start, stop: what lives at its ends, gradients of parameters apart.
    peak:      the most in between, with gradients of parameters that were new at the time.
    with_gradients: the same, if the interval's gradients stay until its end. gradients: how much these are.
    kept:      of what operators made in it, what still lives when backward begins.
    """

    name: str
    start: int
    stop: int
    peak: int
    with_gradients: int
    gradients: int
    kept: int = 0


class Timeline(Census):
    """A census that counts after every operator. Tensors need no values: it is meant to see what is inside hollow ones
    (`hollow.py`), so it is entered before `NoValues`.

    opens: whether our operators are counted as the PyTorch formulas that run where there is no kernel, on the CPU.
    """

    def __init__(self, module: nn.Module, opens: bool) -> None:
        super().__init__(module.parameters())
        self.module = module
        self.opens = opens
        self.intervals: list[Interval] = []
        self.born: dict[int, int] = {}  # by the number of the interval
        self.name = "start"
        self.gradients = self.start = self.peak = self.with_gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.opens and func.namespace == OPERATORS[:-2]:
            # Below autograd, as the formula runs there.
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = [identity(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for key in made:
            if key in self.made:
                self.born.setdefault(key, len(self.intervals))
        if made:
            self.count()
        return out

    def count(self) -> int:
        """Bytes alive, with gradients as they are at the moment."""
        for key in [key for key, (reference, _, _) in self.made.items() if reference.expired()]:
            del self.made[key]
            self.born.pop(key, None)
        living = sum(size for _, size, _ in self.made.values())
        self.peak = max(self.peak, living)
        self.with_gradients = max(self.with_gradients, living + self.gradients)
        return living

    def mark(self, name: str) -> None:
        """End an interval, and begin the one of this name."""
        living = self.count()
        numbers = self.start, living, self.peak, self.with_gradients, self.gradients
        self.intervals.append(Interval(self.name, *numbers))
        if name == "backward":
            self.keep()
        self.name, self.gradients = name, 0
        self.start = self.peak = self.with_gradients = living

    def keep(self) -> None:
        """Note of every interval so far what is left of it."""
        kept = [0] * len(self.intervals)
        for key, (_, size, _) in self.made.items():
            kept[self.born[key]] += size
        self.intervals = [replace(each, kept=size) for each, size in zip(self.intervals, kept, strict=True)]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Parameters lose their gradients as soon as they have them; the bytes are kept in mind until the next mark."""

        def drop(parameter: Tensor) -> None:
            self.count()
            assert parameter.grad is not None
            self.gradients += parameter.grad.untyped_storage().nbytes()
            parameter.grad = None

        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in trained]
        try:
            with self:
                yield
                self.mark("")
        finally:
            for handle in handles:
                handle.remove()


def mark_boundaries(timeline: Timeline, stacks: dict[str, nn.ModuleList]) -> None:
    """Let the blocks of `stacks` mark where each begins and ends, forward and backward: "<stack> <number>" and
    "<stack> <number> backward"; what comes after a stack is "after <stack>", forward, and "before <stack> backward"."""

    def watch(tensor: Any, name: str) -> None:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda gradient: timeline.mark(name))

    for stack, blocks in stacks.items():
        for number, block in enumerate(blocks):
            before = f"{stack} {number - 1} backward" if number else f"before {stack} backward"

            def enter(
                _: nn.Module, inputs: tuple[Any, ...], name: str = f"{stack} {number}", back: str = before
            ) -> None:
                timeline.mark(name)
                watch(inputs[0], back)

            block.register_forward_pre_hook(enter)

        def leave(_: nn.Module, __: Any, output: Tensor, stack: str = stack, last: int = len(blocks) - 1) -> None:
            timeline.mark(f"after {stack}")
            watch(output, f"{stack} {last} backward")

        blocks[-1].register_forward_hook(leave)
