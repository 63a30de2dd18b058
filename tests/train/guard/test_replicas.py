"""A bit that flips in one rank's copy of the parameters is found, named, and never saved."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from ranks import drift_alone, flips_alone, train_clean
from tiny_world import TinyWorld, read_metrics

from rae_scale.train.guard import replicas
from rae_scale.train.guard.replicas import checksum, checksums, describe, position_factors
from tests.train.guard.conftest import Together

CPU = torch.device("cpu")


def checksum_of(tensor: torch.Tensor) -> int:
    return int(checksums([tensor], CPU))


def test_each_single_bit_and_each_swap_changes_the_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "CHUNK", 8)  # several chunks, the last one short
    torch.manual_seed(0)
    tensor = torch.randn(21)
    before = checksum_of(tensor)
    seen = {before}
    for element in range(len(tensor)):
        for bit in range(32):
            flipped = tensor.clone()
            flipped.view(torch.int32)[element] ^= -(1 << 31) if bit == 31 else 1 << bit
            seen.add(checksum_of(flipped))
    for first in range(len(tensor)):
        for second in range(first):
            swapped = tensor.clone()
            swapped[[first, second]] = tensor[[second, first]]
            seen.add(checksum_of(swapped))
    assert len(seen) == 1 + 21 * 32 + 21 * 20 // 2


def test_the_checksum_is_the_formula() -> None:
    """In Python's integers, by which no overflow and no order of summation can hide."""
    tensor = torch.tensor([1.5, -2.0, 0.0, float("nan")], dtype=torch.bfloat16)
    factors = position_factors(4, CPU)
    bits = tensor.view(torch.int16).tolist()
    total = sum(value * factor for value, factor in zip(bits, factors.tolist(), strict=True)) % 2**64
    assert int(checksum(tensor, factors)) % 2**64 == total
    assert all(factor % 2 for factor in factors.tolist())


def test_not_a_number_equals_itself_and_signs_of_zero_differ() -> None:
    assert checksum_of(torch.tensor([float("nan")])) == checksum_of(torch.tensor([float("nan")]))
    assert checksum_of(torch.tensor([0.0])) != checksum_of(torch.tensor([-0.0]))
    assert checksum_of(torch.empty(0)) == 0


def test_the_majority_is_believed_and_two_are_a_pair() -> None:
    key, other = ("weight", "dit.x", (0, 0, 8)), ("ema", "dit.y", (0, 8, 16))
    hosts = ["a", "a", "b", "b"]
    message = describe(hosts, [{key: 7}, {key: 7}, {key: 9}, {key: 7}])
    assert "rank 2 on b: other bits than the majority in dit.x (weight)" in message
    message = describe(hosts, [{}, {other: 1}, {}, {other: 2}])
    assert "rank 1 on a, rank 3 on b: different bits in dit.y (ema); no majority tells which are right" in message


@pytest.mark.dist
def test_copies_of_two_ranks(together: Together) -> None:
    """Hybrid sharding holds all of a parameter's state twice, ZeRO 1 its gathered weights, ZeRO 3 nothing."""
    ours, theirs = (seen["flips"] for seen in together.seen)
    assert ours == theirs
    fsdp2, zero1, zero3 = ours
    assert [list(found["names"]) for found in (fsdp2, zero1, zero3)] == [
        ["ema", "exp_avg", "exp_avg_sq", "weight"],
        ["weight"],
        [],
    ]
    assert "all" in fsdp2["coverage"] and "would not show" in zero3["coverage"]
    for found in (fsdp2, zero1, zero3):
        assert found["messages"]["clean"] == found["messages"]["restored"] == ""
        for kind, name in found["names"].items():
            message = found["messages"][kind]
            assert f"different bits in {name} ({kind}); no majority tells which are right" in message, message
            assert f"rank 0 on {socket.gethostname()}" in message and "rank 1 on " in message


@pytest.mark.dist
def test_drift_ends_the_run_in_time_and_is_in_no_checkpoint(together: Together) -> None:
    for seen in together.seen:
        checked, saved, unchecked = seen["drift"]
        assert "replicas have drifted apart" in checked[0] and checked[1] == 5
        assert "replicas have drifted apart" in saved[0] and saved[1] == 4
        assert unchecked == ("", 8)
    saved_steps = (together.folder / "saved" / "checkpoints").glob("step-*")
    assert [path.name for path in saved_steps] == ["step-00000002"]
    assert not (together.folder / "checked" / "checkpoints").exists()
    assert len(read_metrics(together.folder / "checked")) == 5


@pytest.mark.dist
@pytest.mark.long
@pytest.mark.parametrize(
    ("sizes", "victim"), [({"dp_replicate": 3}, 2), ({"dp_replicate": 2, "dp_shard": 2}, 3)], ids=["three", "hybrid"]
)
def test_of_three_copies_the_odd_one_is_named(sizes: dict[str, int], victim: int, tmp_path: Path) -> None:
    ranks = math.prod(sizes.values())
    everyone = run_ranks(flips_alone, ranks, tmp_path, args=(sizes, victim), timeout=240)
    message = everyone[victim]["weight"]
    assert everyone[0]["weight"] == message  # all hear of it
    assert "rank 0 on " not in message
    if ranks == 3:
        assert "rank 2 on " in message and "rank 1 on " not in message
    else:  # ranks 1 and 3 hold the same half
        assert "rank 1 on " in message and "rank 3 on " in message


@pytest.mark.dist
@pytest.mark.long
@pytest.mark.parametrize("engine", ["fsdp2", "zero"])
def test_what_tensor_parallel_ranks_do_not_split_stays_alike(engine: str, world: TinyWorld, tmp_path: Path) -> None:
    settings = {"engine__name": engine, "parallel__tp": 2, "fault__replica_check_every": 1, "run__max_steps": 30}
    (tmp_path / "ranks").mkdir()
    args = ([world.tree(tmp_path / "run", **settings)], 20)
    for ((message, step),) in run_ranks(drift_alone, 2, tmp_path / "ranks", args=args, timeout=240):
        assert step == 20 and "rank 0 on " in message and "rank 1 on " in message


@pytest.mark.dist
@pytest.mark.long
def test_no_false_alarm_in_ten_thousand_steps(tmp_path: Path) -> None:
    assert run_ranks(train_clean, 2, tmp_path, args=(10_000,), timeout=1200) == [10_000] * 2
