"""The memory of tensors over time, as PyTorch's profiler sees it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, RecordScope, _ExperimentalConfig
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MARK = "memory mark: "
ENTER, LEAVE = "[", "]"
PHASES = ("prepare", "forward", "backward", "optimizer")


class Mark(NamedTuple):
    """name: of the phase that begins, "" if none does; `ENTER` and `LEAVE` stand around a collective.

    released: address of a memory that a collective had, and the number of the mark before which it was allocated.
    tensors:  addresses of what the collective that ends here was given and has returned.
    """

    name: str
    released: tuple[tuple[int, int], ...]
    tensors: frozenset[int]


class Recording(TorchDispatchMode):
    """Everything that happens to tensors' memory while it is entered, and marks between.

    The profiler sees every allocation and release, those inside of operators too, but for releases that a thread of
    gloo's makes. So what a collective has is followed until it is gone, and a mark says so. Copies that gloo makes for
    itself do not count: NCCL's buffers are no tensors. (The profiler's low-level interface can be asked for memory
    alone; with all operators, reading the result takes minutes.)
    """

    def __enter__(self) -> Recording:
        options = (ProfilerState.KINETO, False, True, False, False, False, _ExperimentalConfig())
        config, kinds = ProfilerConfig(*options), {ProfilerActivity.CPU}
        self.marks: list[Mark] = []
        # Storage and address -> the newest mark at which a collective had it. A list of all of them, each time that one
        # was used, took longer to look through than ZeRO-3 took to train.
        self.followed: dict[tuple[int, int], tuple[int, StorageWeakRef]] = {}
        _prepare_profiler(config, kinds)
        _enable_profiler(config, kinds, {RecordScope.USER_SCOPE})
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        self.events: list[tuple[int, str, int, int]] = []  # time, name, address, bytes
        self.read(_disable_profiler().experimental_event_tree())
        self.events.sort(key=lambda event: event[0])

    def read(self, tree: list[Any]) -> None:
        for event in tree:
            fields = event.extra_fields
            address, size = (fields.ptr, fields.alloc_size) if event.name == "[memory]" else (0, 0)
            self.events.append((event.start_time_ns, event.name, address, size))
            self.read(event.children)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        collective = func.namespace in ("c10d", "_c10d_functional")
        if collective:
            self.mark(ENTER)
        out = func(*args, **(kwargs or {}))
        if collective:
            leaves = (leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor))
            storages = [leaf.untyped_storage() for leaf in leaves]
            for each in storages:
                reference = StorageWeakRef(each)
                self.followed[reference.cdata, each.data_ptr()] = len(self.marks), reference
            self.mark(LEAVE, frozenset(each.data_ptr() for each in storages))
        elif any(reference.expired() for _, reference in self.followed.values()):
            self.mark("")
        return out

    def mark(self, name: str, tensors: frozenset[int] = frozenset()) -> None:
        """Begin a phase, "<case> <phase>"; without a name, only say what is gone."""
        # Asked once: between two questions a thread may let go of it.
        expired = [key for key, (_, reference) in self.followed.items() if reference.expired()]
        gone = tuple((key[1], self.followed.pop(key)[0]) for key in expired)
        with torch.profiler.record_function(f"{MARK}{len(self.marks)}"):
            pass
        self.marks.append(Mark(name, gone, tensors))

    def peaks(self) -> dict[str, dict[str, int]]:
        """Case -> phase -> highest total within it, less the total at the case's mark "begin"."""
        living: dict[int, tuple[int, int]] = {}  # address -> bytes, mark before
        inside: dict[int, int] | None = None  # address -> bytes of what is allocated during a collective
        total = begin = number = 0
        peaks, phase, case = dict[str, dict[str, int]](), "", ""
        for _, event, address, change in self.events:
            if event == "[memory]" and inside is not None and change > 0:
                inside[address] = change
            elif event == "[memory]" and inside is not None and address in inside:
                del inside[address]
            elif event == "[memory]":
                total -= living.pop(address, (0, 0))[0]
                if change > 0:
                    living[address] = change, number
                    total += change
            elif event.startswith(MARK):
                number = int(event.removeprefix(MARK))
                name, released, tensors = self.marks[number]
                for gone, noted in released:
                    if gone in living and living[gone][1] < noted:
                        total -= living.pop(gone)[0]
                if name == ENTER:
                    inside = {}
                elif name == LEAVE:
                    for address, size in (inside or {}).items():
                        total -= living.pop(address, (0, 0))[0]
                        if address in tensors:
                            living[address] = size, number - 1
                            total += size
                    inside = None
                elif name:
                    case, phase = name.rsplit(" ", 1)
                    begin = total if phase == "begin" else begin
            if phase in PHASES:
                found = peaks.setdefault(case, {})
                found[phase] = max(found.get(phase, 0), total - begin)
        return peaks
