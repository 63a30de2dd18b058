"""The memory between the thread that copies and the thread that writes."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rae_scale.state import CheckpointError
from rae_scale.state import staging as staging_module
from rae_scale.state.staging import Staging

BLOCK = 4096  # bytes of the smallest block
LARGE = torch.arange(1024.0)  # exactly one of them


def take(staging: Staging, numel: int) -> Tensor:
    return torch.cat([part.clone() for part in staging.take(numel)])


def in_thread(action: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    return thread, results


def test_elements_come_out_as_they_were_put_in_at_that_moment() -> None:
    staging = Staging(1 << 20, pinned=False)
    source = torch.arange(6.0).view(2, 3).requires_grad_()
    assert staging.put(source.t())  # not contiguous
    assert staging.put(torch.tensor(7.0))
    assert staging.put(torch.zeros(0, 3))
    assert staging.put(source.bfloat16())
    with torch.no_grad():
        source.zero_()
    assert take(staging, 6).tolist() == [0, 3, 1, 4, 2, 5]
    assert take(staging, 1).tolist() == [7]
    assert list(staging.take(0)) == []
    last = take(staging, 6)
    assert last.tolist() == [0, 1, 2, 3, 4, 5]
    assert last.dtype == torch.float32 and not last.requires_grad


@pytest.mark.parametrize("limit", [1, 2 * BLOCK, 3 * BLOCK + 5, 50_000, 1 << 30])
@pytest.mark.parametrize("shape", [(3000,), (70, 40), (3, 1, 1000), (1000, 3)], ids=str)
def test_any_tensor_passes_through_any_buffer(limit: int, shape: tuple[int, ...]) -> None:
    staging = Staging(limit, pinned=False)
    tensors = [torch.randn(*shape), torch.randn(5), torch.randn(*reversed(shape)).permute(*reversed(range(len(shape))))]
    thread, results = in_thread(lambda: [staging.put(tensor) for tensor in tensors * 3])
    for tensor in tensors * 3:
        assert torch.equal(take(staging, tensor.numel()), tensor.flatten())
    thread.join(5)
    assert results == [[True] * 9]
    assert staging.allocated_bytes <= max(BLOCK, limit)


@pytest.mark.parametrize(("limit", "blocks"), [(1, 1), (2 * BLOCK, 2), (3 * BLOCK, 3), (3 * BLOCK + 100, 3)])
def test_putting_waits_where_the_buffer_is_full(limit: int, blocks: int) -> None:
    staging = Staging(limit, pinned=False)
    done: list[bool] = []
    thread, _ = in_thread(lambda: done.extend(staging.put(LARGE) for _ in range(6)))
    thread.join(0.3)
    assert thread.is_alive()
    for _ in range(6):
        assert torch.equal(take(staging, 1024), LARGE)
    thread.join(5)
    assert done == [True] * 6
    assert staging.allocated_bytes == blocks * BLOCK


def test_a_block_is_used_again_when_the_taker_is_done_with_it_and_not_before() -> None:
    staging = Staging(1, pinned=False)
    staging.put(LARGE)
    taken = staging.take(1024)
    part = next(taken)
    thread, results = in_thread(lambda: staging.put(LARGE + 1))
    thread.join(0.3)
    assert thread.is_alive()
    assert torch.equal(part, LARGE)
    assert next(taken, None) is None
    thread.join(5)
    assert results == [True]


def test_each_element_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = staging_module.copy_to_host
    monkeypatch.setattr(
        staging_module, "copy_to_host", lambda place, part: copied.append(part.numel()) or copy(place, part)
    )
    staging = Staging(1 << 20, pinned=False)
    staging.put(torch.zeros(30, 40).t())
    assert copied == [1200]


def test_when_the_taker_gives_up_the_putting_thread_is_told() -> None:
    staging = Staging(1, pinned=False)
    thread, results = in_thread(lambda: [staging.put(LARGE), staging.put(LARGE)])
    thread.join(0.2)
    staging.abandon()
    thread.join(5)
    assert results == [[True, False]]


def test_when_the_putting_thread_gives_up_the_taker_is_told() -> None:
    staging = Staging(1, pinned=False)
    threading.Timer(0.2, staging.break_off, ["the copy failed"]).start()
    with pytest.raises(CheckpointError, match="the copy failed"):
        take(staging, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_from_a_gpu_through_pinned_memory() -> None:
    staging = Staging(1 << 22, pinned=True)
    source = torch.randn(300, 500, device="cuda")
    expected = source.t().cpu()
    assert staging.put(source.t())
    source.zero_()
    part = next(staging.take(source.numel()))
    assert part.is_pinned()
    assert torch.equal(part.view(500, 300), expected)
