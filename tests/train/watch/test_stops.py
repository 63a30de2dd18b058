"""A signal on one of two ranks, at every moment of a run: all stop together, and going on is never having stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny_world import TinyWorld, read_metrics

from rae_scale.state import latest_checkpoint, read_weights

from .stops import MOMENTS, stop_at_every_moment

STEPS = 5
OFTEN = {"fault__heartbeat_s": 0.1, "fault__stop_grace_s": 0.3}
LAYOUT = {"run__max_steps": STEPS, "engine__name": "fsdp2", "parallel__dp_shard": 2, "optim__ema_decay": 0.9}
MORE: dict[str, dict[str, Any]] = {
    "during_a_save": {"run__save_every": 2},
    "while_drawing": {"run__sample_every": 2, "run__sample_prompts": ["a red picture"], "sampler__steps": 3},
}
LEFT = {  # moment: (step, checkpoint, why)
    "between_steps": (3, "step-00000003", "SIGTERM on rank 1"),
    "twice": (3, "step-00000003", "SIGTERM on rank 1"),
    "during_a_save": (2, "step-00000002", "SIGUSR1 on rank 1"),
    "while_drawing": (2, "step-00000002", "SIGTERM on rank 1"),
    "while_data_hangs": (3, "step-00000003", "SIGTERM on rank 0"),
    "in_start_up": (0, None, "SIGTERM on rank 1"),
}

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(["while_data_hangs"], id="data"),
        pytest.param(sorted(MOMENTS.keys() - {"while_data_hangs"}), marks=pytest.mark.long, id="all-others"),
    ],
)
def test_a_stop_saves_says_so_and_is_nowhere_to_be_seen_afterwards(
    world: TinyWorld, decoder: str, tmp_path: Path, moments: list[str]
) -> None:
    (tmp_path / "ranks").mkdir()
    settings = {
        name: world.tree(tmp_path / name, **LAYOUT, **OFTEN, model__decoder__path=decoder, **MORE.get(name, {}))
        for name in ("straight", *moments)
    }
    run_ranks(stop_at_every_moment, 2, tmp_path / "ranks", args=(settings,), timeout=240)
    for moment in moments:
        check(tmp_path / moment, tmp_path / "straight", moment)


def check(run: Path, straight: Path, moment: str) -> None:
    left = json.loads((run / "stopped.json").read_text())
    step, checkpoint, reason = LEFT[moment]
    status = left["status"]
    assert (status["state"], status["step"], status["reason"]) == ("requeue", step, reason)
    assert (status["max_steps"], status["world_size"], status["attempt"]) == (STEPS, 2, 1)
    assert left["latest"] == checkpoint
    assert left["pictures"] == []

    again = json.loads((run / "status.json").read_text())
    assert (again["state"], again["step"], again["attempt"]) == ("finished", STEPS, 2)
    assert losses(run) == losses(straight)
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        ours, theirs = state(run, kind), state(straight, kind)
        assert ours and ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def losses(run: Path) -> list[dict[str, Any]]:
    return [{name: line[name] for name in ("step", "loss", "loss_flow", "grad_norm")} for line in read_metrics(run)]


def state(run: Path, kind: Any) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    return read_weights(checkpoint, kind=kind)
