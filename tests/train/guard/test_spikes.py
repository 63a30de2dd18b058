"""Steps whose loss or gradient stands out change nothing, on any rank, and a resumed run judges as one that went on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from faulty import RANK_1_FAULTS, RANK_1_FULL, WATCH_SPIKES, curve, faulty_loss
from harness import run_ranks
from ranks import faults_alone
from tiny_world import SignalAt, TinyWorld, read_metrics

from rae_scale.config.schema import FaultConfig
from rae_scale.train import setup, train
from rae_scale.train.guard.skips import MOST_NAMED, worst
from rae_scale.train.guard.spikes import LEAST_KEPT, Spikes
from rae_scale.train.stages import GenerationStage
from tests.train.guard.conftest import Together


def test_the_limit_is_a_multiple_of_the_median_of_kept_steps() -> None:
    spikes = Spikes(FaultConfig(spike_factor=3, grad_spike_factor=2, spike_window=4))
    for loss in (1.0, 9.0, 2.0):
        spikes.keep(loss, 10 * loss)
        assert spikes.limit("loss") == math.inf
    spikes.keep(3.0, 30.0)
    assert spikes.limit("loss") == 3 * 2.5 and spikes.limit("grad_norm") == 2 * 25.0
    spikes.keep(4.0, 40.0)  # the first one is forgotten
    assert spikes.limit("loss") == 3 * 3.5


def test_a_long_window_need_not_be_full() -> None:
    spikes = Spikes(FaultConfig(spike_factor=2, spike_window=1000))
    for _ in range(LEAST_KEPT):
        assert spikes.limit("loss") == math.inf
        spikes.keep(1.0, 1.0)
    assert spikes.limit("loss") == 2.0


def test_without_factors_nothing_is_a_spike_and_nothing_is_kept() -> None:
    spikes = Spikes(FaultConfig(spike_window=1))
    spikes.keep(1.0, 1.0)
    assert spikes.limit("loss") == spikes.limit("grad_norm") == math.inf
    assert spikes.state() == {"skips_in_row": 0, "loss": [], "grad_norm": []}


def test_the_state_survives_json_and_counts_skips_in_a_row() -> None:
    cfg = FaultConfig(spike_factor=2, spike_window=2)
    spikes, other = Spikes(cfg), Spikes(cfg)
    spikes.keep(0.1 + 0.2, 1.0)
    spikes.keep(1 / 3, 1.0)
    spikes.skip()
    spikes.skip()
    other.load(json.loads(json.dumps(spikes.state())))
    assert other.skips_in_row == 2 and other.limit("loss") == spikes.limit("loss") < math.inf
    other.keep(1.0, 1.0)
    assert other.skips_in_row == 0


def test_the_worst_samples_are_named() -> None:
    import torch

    ids = [f"s{number}" for number in range(20)]
    losses = torch.arange(20.0)
    named = [sample_id for _, sample_id in worst([(ids[:10], losses[:10]), (ids[10:], losses[10:])])]
    assert named == ids[::-1][:MOST_NAMED]
    losses[[3, 4]] = torch.tensor([float("nan"), float("-inf")])
    assert sorted(worst([(ids, losses)])) == [(math.inf, "s3"), (math.inf, "s4")]


@pytest.mark.parametrize("fault", ["loss spike", "gradient spike"])
def test_a_spike_is_skipped_and_named_and_a_resumed_run_sees_it_too(
    fault: str, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Position 45 is in step 6; the second run is stopped after step 3, so the median comes from its checkpoint.
    monkeypatch.setattr(GenerationStage, "loss", faulty_loss({45: fault}))
    settings = WATCH_SPIKES | {"data__micro_batch_size": 4}
    train(world.config(tmp_path / "straight", **settings))
    lines = read_metrics(tmp_path / "straight")
    assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert (lines[5]["loss"] > 1e3) == (fault == "loss spike")
    (entry,) = [json.loads(line) for line in (tmp_path / "straight" / "skipped.jsonl").read_text().splitlines()]
    assert (entry["step"], entry["batch"], entry["positions"]) == (6, 5, [40, 48])
    assert entry["reason"].startswith("the loss" if fault == "loss spike" else "the gradients")
    assert len(entry["sample_ids"]) == MOST_NAMED and entry["sample_ids"][0].startswith("data:")

    build = setup.build_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(setup, "build_callbacks", lambda *args: [SignalAt(3), *build(*args)])
        train(world.config(tmp_path / "stopped", **settings))
    assert len(read_metrics(tmp_path / "stopped")) == 3
    train(world.config(tmp_path / "stopped", **settings))
    assert curve(read_metrics(tmp_path / "stopped")) == curve(lines)


def check_one_sided_faults(seen: list[tuple[list[bool], list[int]]]) -> None:
    for unchanged, skipped in seen:
        assert unchanged == [False] * 3 + [True] * 4 + [False]
        assert skipped == [0, 0, 0, 1, 2, 3, 4, 4]


def check_records(run_dir: Path) -> None:
    entries = [json.loads(line) for line in (run_dir / "skipped.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [4, 5, 6, 7]
    reasons = ("loss is not finite", "gradients are not finite", "gradients are a spike", "loss is a spike")
    assert all(reason in entry["reason"] for reason, entry in zip(reasons, entries, strict=True))
    assert all(entry["sample_ids"] for entry in entries)
    # Rank 1 could not write its part of step 4, and both went on.
    assert sorted(path.name[-1] for path in (run_dir / "checkpoints").glob("step-*")) == ["2", "6", "8"]
    assert read_metrics(run_dir)[-1]["save_failures"] == 1


@pytest.mark.dist
def test_what_goes_wrong_on_one_rank_changes_no_bit_on_any(together: Together) -> None:
    for seen in together.seen:
        assert len(seen["faults"]) == 2
        check_one_sided_faults(seen["faults"])
    for name in ("fsdp2", "zero"):
        check_records(together.folder / name)


@pytest.mark.dist
@pytest.mark.long
@pytest.mark.parametrize("sizes", [{"dp_shard": 2}, {"tp": 2}, {"sp": 2}], ids=["dp", "tp", "sp"])
def test_nor_where_nothing_is_held_twice(sizes: dict[str, int], world: TinyWorld, tmp_path: Path) -> None:
    settings = WATCH_SPIKES | {f"parallel__{axis}": size for axis, size in sizes.items()}
    trees = [
        world.tree(tmp_path / f"{name}{stage}", engine__name=name, engine__zero_stage=stage, **settings)
        for name, stage in (("fsdp2", 3), ("zero", 1), ("zero", 3))
    ]
    (tmp_path / "ranks").mkdir()
    args = (trees, RANK_1_FAULTS, RANK_1_FULL)
    for seen in run_ranks(faults_alone, 2, tmp_path / "ranks", args=args, timeout=240):
        check_one_sided_faults(seen)
    for tree in trees:
        check_records(Path(tree["run"]["dir"]))
