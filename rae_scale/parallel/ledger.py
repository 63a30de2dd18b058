"""A ledger of communication: what this process exchanged with others, counted while it happens.

For tests and benchmarks: nothing is recorded, patched or slowed down outside `with Ledger(mesh)`.

    with Ledger(mesh) as ledger:
        train_step(...)
    print(ledger)                                   # calls and bytes by kind and group
    assert ledger.volume() == zero_volume(...)      # rae_scale.engines.communication

How bytes are counted. The *payload* of a call is the size of the whole tensor on one rank: what an all-gather returns,
what a reduce-scatter or an all-to-all starts from, what an all-reduce or a broadcast holds before and after, what the
root of a gather or scatter holds. It is exact and equal on all ranks. What a rank *sends* is derived from it for ring
algorithms (`sent`). Groups of one rank move nothing and are left out.

How it sees calls. A `TorchDispatchMode` receives the c10d and functional operators below every Python interface: ours,
FSDP2's, DeepSpeed's (which binds torch's functions when it starts, so that patching them later would miss it) and C++
callers'. Autograd hands the mode on to the threads that it runs backward in, on CUDA too. Not seen: threads that were
started otherwise, and what a compiled graph or a CUDA graph replays.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel.mesh import Mesh

Kind = Literal[
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "send",
    "barrier",
    "object",
    "other",
]
"""object: the tensors by which torch exchanges pickled Python objects. send: point to point, counted at the sender.
other: a c10d operator that this file does not know."""

Volume = Counter[tuple[Kind, str]]
"""(kind, name of the group) -> payload bytes per rank."""

AXES_OF = {
    "tp": ("tp",),
    "sp": ("sp",),
    "shard": ("dp_shard", "sp"),
    "replicate": ("dp_replicate",),
    "dp": ("dp_replicate", "dp_shard", "sp"),
    "sample": ("sp", "tp"),
    "norm": ("dp_shard", "sp", "tp"),
    "world": ("dp_replicate", "dp_shard", "sp", "tp"),
}
"""The groups of a `Mesh` and the axes that their ranks differ in. Groups of the same ranks share the first name here:
without replicas, sequence and tensor parallelism, "shard" stands for dp, norm and world, too."""

OBJECT_FUNCTIONS = frozenset({"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"})

TRANSFERS: dict[str, tuple[Kind, str, bool]] = {
    "c10d::allreduce_": ("all_reduce", "tensors", False),
    "c10d::allreduce_coalesced_": ("all_reduce", "tensors", False),
    "c10d::allgather_": ("all_gather", "output_tensors", False),
    "c10d::_allgather_base_": ("all_gather", "output_tensor", False),
    "c10d::allgather_coalesced_": ("all_gather", "output_lists", False),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", "outputs", False),
    "c10d::reduce_scatter_": ("reduce_scatter", "input_tensors", False),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", "input_tensor", False),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs", False),
    "c10d::alltoall_": ("all_to_all", "input_tensors", False),
    "c10d::alltoall_base_": ("all_to_all", "input", False),
    "c10d::broadcast_": ("broadcast", "tensors", False),
    "c10d::reduce_": ("reduce", "tensors", False),
    "c10d::gather_": ("gather", "input_tensors", True),
    "c10d::gather_into_tensor_": ("gather", "input_tensor", True),
    "c10d::scatter_": ("scatter", "output_tensors", True),
    "c10d::send": ("send", "tensors", False),
    "c10d::barrier": ("barrier", "", False),
    "c10d::monitored_barrier_": ("barrier", "", False),
    "_c10d_functional::all_reduce": ("all_reduce", "input", False),
    "_c10d_functional::all_reduce_": ("all_reduce", "input", False),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", "inputs", False),
    "_c10d_functional::all_reduce_coalesced_": ("all_reduce", "inputs", False),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", "input", True),
    "_c10d_functional::all_gather_into_tensor_out": ("all_gather", "input", True),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", "inputs", True),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", "input", False),
    "_c10d_functional::reduce_scatter_tensor_out": ("reduce_scatter", "input", False),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", "inputs", False),
    "_c10d_functional::all_to_all_single": ("all_to_all", "input", False),
    "_c10d_functional::broadcast": ("broadcast", "input", False),
    "_c10d_functional::broadcast_": ("broadcast", "input", False),
}
"""Operator -> kind, the argument that the payload is read from, whether that is one rank's part of it only."""

SILENT = frozenset({"c10d::recv_", "c10d::recv_any_source_", "_c10d_functional::irecv"})
"""Operators that send nothing. Neither do those without a group among their arguments, such as waiting."""


class Entry(NamedTuple):
    """calls, payload [bytes] and sent [bytes] of one kind in one group, on this rank."""

    calls: int
    payload: int
    sent: float


@dataclass(frozen=True)
class Group:
    name: str
    size: int


def group_name(name: str, sizes: Mapping[str, int]) -> str | None:
    """The name under which a ledger counts the group `name` of a mesh with these axis sizes; None if it is one rank."""
    axes = spanned(name, sizes)
    if not axes:
        return None
    return next(other for other in AXES_OF if spanned(other, sizes) == axes)


def spanned(name: str, sizes: Mapping[str, int]) -> set[str]:
    """The axes that make the group `name` larger than one rank."""
    return {axis for axis in AXES_OF[name] if sizes[axis] > 1}


def sizes_of(axes: Mesh | ParallelConfig) -> dict[str, int]:
    """Sizes of the axes, slowest first."""
    return {name: getattr(axes, name) for name in AXES_OF["world"]}


def sent(kind: Kind, payload: int, size: int) -> float:
    """Bytes that a rank of `size` sends for `payload`, on average over the ranks.

    Rings: (n-1)/n of the payload, for an all-reduce twice that (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce
    algorithms for clusters of workstations", section 3). A broadcast or reduction passes the payload along a chain of
    n - 1 links. Parts of an all-to-all are taken as equal.
    """
    share = (size - 1) / size
    if kind == "all_reduce":
        return 2 * share * payload
    if kind in ("gather", "scatter"):
        return share * payload / size
    if kind in ("send", "other"):
        return float(payload)
    return share * payload


class Ledger(TorchDispatchMode):
    """Counts the collectives of this process by kind and by group of `mesh`. Can be entered again, and then adds up."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._names = named_ranks(mesh)
        self._groups: dict[str, Group] = {}
        self._sizes: dict[str, int] = {}
        self.calls: Counter[tuple[Kind, str]] = Counter()
        self.payload: Volume = Counter()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc, trace)
        # Groups may be gone, and their names used again, when the ledger is entered the next time.
        self._groups.clear()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(map(is_dtensor, types)):
            # Let it come back as the operators on local tensors, and the collectives, that it is made of.
            return NotImplemented
        name = getattr(getattr(func, "_schema", None), "name", "")
        if name.startswith(("c10d::", "_c10d_functional::")) and name not in SILENT:
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            self._record(name, named | (kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _record(self, operator: str, arguments: Mapping[str, Any]) -> None:
        group = self._group(arguments.get("process_group", arguments.get("group_name")))
        if group is None or group.size == 1:
            return
        kind, source, is_part = TRANSFERS.get(operator, ("other", "", False))
        payload = bytes_of(arguments.get(source)) * (group.size if is_part else 1)
        if exchanges_objects():
            kind = "object"
        self.calls[kind, group.name] += 1
        self.payload[kind, group.name] += payload
        self._sizes[group.name] = group.size

    def _group(self, found: Any) -> Group | None:
        """found: a group, torch's script object around one, or its name."""
        if found is None:
            return None
        if isinstance(found, str):
            process_group = dist.distributed_c10d._resolve_process_group(found)
        else:
            process_group = found if isinstance(found, dist.ProcessGroup) else dist.ProcessGroup.unbox(found)
        key = process_group.group_name
        if key not in self._groups:
            ranks = frozenset(dist.get_process_group_ranks(process_group))
            name = self._names.get(ranks) or f"ranks {','.join(map(str, sorted(ranks)))}"
            self._groups[key] = Group(name, len(ranks))
        return self._groups[key]

    def volume(self) -> Volume:
        """Payload bytes by (kind, group), without what moved none."""
        return +self.payload

    def entries(self) -> dict[tuple[Kind, str], Entry]:
        return {
            (kind, group): Entry(calls, payload, sent(kind, payload, self._sizes[group]))
            for (kind, group), calls in sorted(self.calls.items())
            for payload in (self.payload[kind, group],)
        }

    def __str__(self) -> str:
        lines = [f"{'kind':<15} {'group':<12} {'calls':>8} {'payload bytes':>16} {'sent bytes':>16}"]
        for (kind, group), entry in self.entries().items():
            lines.append(f"{kind:<15} {group:<12} {entry.calls:>8,} {entry.payload:>16,} {entry.sent:>16,.0f}")
        return "\n".join(lines)


def named_ranks(mesh: Mesh) -> dict[frozenset[int], str]:
    """The ranks of every group that this process belongs to -> its name.

    By ranks and not by the identity of the group: torch hands out one group object for several purposes where ranks
    coincide, and DeepSpeed makes copies.
    """
    sizes = sizes_of(mesh)
    ranks = torch.arange(mesh.world_size).view(tuple(sizes.values()))
    here = [int(index) for index in torch.unravel_index(torch.tensor(mesh.rank), ranks.shape)]
    names: dict[frozenset[int], str] = {}
    for name, axes in AXES_OF.items():
        mine = ranks[tuple(slice(None) if axis in axes else here[dim] for dim, axis in enumerate(sizes))]
        names.setdefault(frozenset(mine.flatten().tolist()), name)
    return names


def bytes_of(value: Any) -> int:
    """Of a tensor, or of all tensors in nested lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(bytes_of, value)) if isinstance(value, (list, tuple)) else 0


def is_dtensor(kind: type) -> bool:
    """Without importing DTensor, which takes half a second, where nobody has one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and issubclass(kind, module.DTensor)


def exchanges_objects() -> bool:
    """Whether torch is in the middle of exchanging Python objects, of which the operators themselves say nothing."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        code = frame.f_code
        if code.co_name in OBJECT_FUNCTIONS and code.co_filename == dist.distributed_c10d.__file__:
            return True
    return False
