"""The ledger on torch's fake process groups: every rank of a large mesh in one process, nothing is really sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel import Mesh, build_mesh
from rae_scale.parallel.ledger import AXES_OF, Ledger, group_name, named_ranks, sent, sizes_of

CPU = torch.device("cpu")
X = 8 * 4  # bytes of x()


def fake_mesh(rank: int = 0, **sizes: int) -> Mesh:
    parallel = ParallelConfig(**sizes)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=parallel.world_size)
    return build_mesh(parallel, CPU)


@pytest.fixture(autouse=True)
def fake_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Groups for which the mesh asks for gloo are fake, too; gloo would wait for the other ranks."""
    plain = dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda ranks=None, backend=None: plain(ranks))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def x(count: int = 8) -> Tensor:
    return torch.ones(count)


def coalesced() -> None:
    with dist._coalescing_manager():
        dist.all_reduce(x())
        dist.all_reduce(x(2))


def differentiable() -> None:
    """Gather in forward, reduce-scatter in backward."""
    whole = functional.all_gather_tensor_autograd(x().requires_grad_() * 1, 0, dist.group.WORLD)
    whole.sum().backward()


def dtensor() -> None:
    """The running sum over a split dimension needs all of it: the operator itself gathers."""
    DTensor.from_local(x(), dist.init_device_mesh("cpu", (4,)), [Shard(0)]).cumsum(0)


# Functional results are used at once, `1 *`: torch complains about what nobody waited for.
CALLS: dict[str, tuple[Callable[[], object], dict[str, int]]] = {
    "all_reduce": (lambda: dist.all_reduce(x()), {"all_reduce": X}),
    "bfloat16": (lambda: dist.all_reduce(x().bfloat16()), {"all_reduce": X // 2}),
    "async": (lambda: dist.all_reduce(x(), async_op=True).wait(), {"all_reduce": X}),
    "coalesced": (coalesced, {"all_reduce": X + 8}),
    "all_gather": (lambda: dist.all_gather([x() for _ in range(4)], x()), {"all_gather": 4 * X}),
    "all_gather_into": (lambda: dist.all_gather_into_tensor(x(32), x()), {"all_gather": 4 * X}),
    "reduce_scatter": (lambda: dist.reduce_scatter(x(2), list(x().chunk(4))), {"reduce_scatter": X}),
    "reduce_scatter_tensor": (lambda: dist.reduce_scatter_tensor(x(2), x()), {"reduce_scatter": X}),
    "all_to_all": (lambda: dist.all_to_all(list(x().chunk(4)), list(x().chunk(4))), {"all_to_all": X}),
    "all_to_all_single": (lambda: dist.all_to_all_single(x(), x()), {"all_to_all": X}),
    "broadcast": (lambda: dist.broadcast(x(), 0), {"broadcast": X}),
    "reduce": (lambda: dist.reduce(x(), 0), {"reduce": X}),
    "gather": (lambda: dist.gather(x(), [x() for _ in range(4)]), {"gather": 4 * X}),
    "scatter": (lambda: dist.scatter(x(), [x() for _ in range(4)]), {"scatter": 4 * X}),
    "send": (lambda: dist.send(x(), 1), {"send": X}),
    "recv": (lambda: dist.recv(x(), 1), {}),
    "functional all_reduce": (lambda: 1 * functional.all_reduce(x(), "sum", dist.group.WORLD), {"all_reduce": X}),
    "functional all_gather": (
        lambda: 1 * functional.all_gather_tensor(x(), 0, dist.group.WORLD),
        {"all_gather": 4 * X},
    ),
    "functional reduce_scatter": (
        lambda: 1 * functional.reduce_scatter_tensor(x(), "sum", 0, dist.group.WORLD),
        {"reduce_scatter": X},
    ),
    "functional all_to_all": (
        lambda: 1 * functional.all_to_all_single(x(), None, None, dist.group.WORLD),
        {"all_to_all": X},
    ),
    "differentiable": (differentiable, {"all_gather": 4 * X, "reduce_scatter": 4 * X}),
    "dtensor": (dtensor, {"all_gather": 4 * X}),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch 2.15 renamed some functional ones
@pytest.mark.parametrize("name", CALLS)
def test_payload_of_each_collective(name: str) -> None:
    call, expected = CALLS[name]
    mesh = fake_mesh(dp_shard=4)
    with Ledger(mesh) as ledger:
        call()
    assert ledger.volume() == {(kind, "shard"): payload for kind, payload in expected.items()}
    assert all(calls == 1 for calls in ledger.calls.values())


def test_objects_and_barriers() -> None:
    mesh = fake_mesh(dp_shard=2)
    with Ledger(mesh) as ledger:
        mesh.barrier()
        dist.broadcast_object_list([{"a": 1}])
    assert set(ledger.calls) == {("barrier", "shard"), ("object", "shard")}
    assert set(ledger.volume()) == {("object", "shard")}


@pytest.mark.parametrize("rank", [0, 13])
def test_groups_of_a_mesh_by_name(rank: int) -> None:
    mesh = fake_mesh(rank, dp_replicate=2, dp_shard=2, sp=2, tp=2)
    assert mesh.device_mesh is not None
    groups = {
        "tp": mesh.tp_group,
        "sp": mesh.sp_group,
        "shard": mesh.device_mesh["shard"].get_group(),
        "replicate": mesh.device_mesh["replicate"].get_group(),
        "dp": mesh.dp_group,
        "sample": mesh.sample_group,
        "norm": mesh.norm_group,
        "world": dist.group.WORLD,
    }
    for name, group in groups.items():
        with Ledger(mesh) as ledger:
            dist.all_reduce(x(), group=group)
        assert ledger.volume() == {("all_reduce", name): X}
    stranger = dist.new_group(sorted([rank, 6]))
    with Ledger(mesh) as ledger:
        dist.all_reduce(x(), group=stranger)
    assert [group for _, group in ledger.volume()] == [f"ranks {min(rank, 6)},{max(rank, 6)}"]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"dp_shard": 2}, {"tp": None, "sp": None, "replicate": None, "sample": None, "shard": "shard"}),
        ({"dp_shard": 2}, {"dp": "shard", "norm": "shard", "world": "shard"}),
        ({"dp_replicate": 2, "dp_shard": 2}, {"shard": "shard", "norm": "shard", "dp": "dp", "world": "dp"}),
        ({"dp_shard": 2, "tp": 2}, {"dp": "shard", "sample": "tp", "norm": "norm", "world": "norm"}),
        ({"sp": 2, "tp": 2}, {"shard": "sp", "dp": "sp", "sample": "sample", "norm": "sample", "world": "sample"}),
    ],
)
def test_groups_of_the_same_ranks_share_a_name(sizes: dict[str, int], expected: dict[str, str | None]) -> None:
    all_sizes = sizes_of(ParallelConfig(**sizes))
    found = {name: group_name(name, all_sizes) for name in AXES_OF}
    assert {name: found[name] for name in expected} == expected
    # What a formula finds by axes is what a ledger finds by ranks.
    by_ranks = {name for ranks, name in named_ranks(Mesh(CPU, **all_sizes)).items() if len(ranks) > 1}
    assert by_ranks == set(found.values()) - {None}


def test_sees_backward_in_another_thread() -> None:
    """Autograd runs the 61st backward inside a backward in a thread of its pool, which takes over the caller's modes in
    the same way as the threads that serve GPUs."""
    threads: list[int] = []

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value: Tensor, depth: int) -> Tensor:  # type: ignore[no-untyped-def]
            ctx.depth = depth
            return value.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
            if ctx.depth == 0:
                threads.append(threading.get_ident())
                dist.all_reduce(x())
            else:
                with torch.enable_grad():
                    Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).sum().backward()
            return gradient, None

    mesh = fake_mesh(dp_shard=2)
    with Ledger(mesh) as ledger:
        Nested.apply(torch.ones(1, requires_grad=True), 70).sum().backward()
    assert threads and threads[0] != threading.get_ident()
    assert ledger.volume() == {("all_reduce", "shard"): X}


def test_counts_only_while_entered_and_only_what_moves() -> None:
    mesh = fake_mesh(dp_shard=2)
    alone = dist.new_group([0])
    ledger = Ledger(mesh)
    dist.all_reduce(x())
    assert not ledger.calls
    for _ in range(2):
        with ledger:
            dist.all_reduce(x())
            dist.all_reduce(x(), group=alone)
        dist.all_reduce(x())
    assert ledger.calls == {("all_reduce", "shard"): 2}
    assert ledger.volume() == {("all_reduce", "shard"): 2 * X}
    entry = ledger.entries()["all_reduce", "shard"]
    assert (entry.calls, entry.payload, entry.sent) == (2, 2 * X, 2 * X)
    assert "all_reduce" in str(ledger) and "64" in str(ledger)


def test_bytes_sent_in_a_ring() -> None:
    assert sent("all_gather", 800, 4) == sent("reduce_scatter", 800, 4) == sent("all_to_all", 800, 4) == 600
    assert sent("all_reduce", 800, 4) == 1200
    assert sent("broadcast", 800, 4) == sent("reduce", 800, 4) == 600
    assert sent("gather", 800, 4) == 150  # three of four ranks send a quarter
    assert sent("barrier", 0, 4) == 0
