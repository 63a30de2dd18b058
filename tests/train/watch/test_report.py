"""`rae-scale report` over a run that was killed and went on, and the ratio that the run logs itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_world import TinyWorld, read_metrics
from typer.testing import CliRunner

from rae_scale.cli.main import app
from rae_scale.train import setup, train
from rae_scale.train.callbacks import Callback

CANARY = "hf_canary0123456789"


class Dies(Exception):
    pass


class DieAt(Callback):
    def on_step_end(self, run: Any, metrics: Any) -> None:
        if run.step == 3:
            raise Dies(f"in step {run.step}")


@pytest.fixture(scope="module")
def interrupted(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 steps that died after 3 and went on from 2, with a secret in the environment."""
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    config = world.config(folder, run__save_every=2, run__tensorboard=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", CANARY)
        with patch.context() as dying, pytest.raises(Dies):
            build = setup.build_callbacks
            dying.setattr(setup, "build_callbacks", lambda *args: [*build(*args), DieAt()])
            train(config)
        train(config)
    return folder


def test_the_report_adds_up_and_knows_the_repeated_step(interrupted: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(interrupted), "--json"])
    assert result.exit_code == 0
    values = json.loads(result.output)
    assert (values["status"]["state"], values["attempts"], values["steps"]) == ("finished", 2, 4)
    assert values["productive_s"] + sum(values["lost_s"].values()) == pytest.approx(values["wall_s"])
    assert values["effective_time"] == pytest.approx(values["productive_s"] / values["wall_s"])
    assert all(values["lost_s"][cause] > 0 for cause in ("start", "data", "save", "repeated"))
    assert values["lost_s"]["evaluation"] == values["lost_s"]["skipped"] == 0


def test_people_get_a_table(interrupted: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(interrupted)])
    assert "step 4 of 4, 2 attempt(s), effective training time" in result.output
    for name in ("productive", "start-up", "repeated steps", "down between attempts", "wall"):
        assert any(line.startswith(name) for line in result.output.splitlines()), name


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code != 0 and "no training has begun there" in str(result.exception)


def test_the_run_logs_its_effective_time(interrupted: Path) -> None:
    ratios = [line["effective_time"] for line in read_metrics(interrupted)]
    assert len(ratios) == 4 and all(0 < ratio < 1 for ratio in ratios)


def test_the_error_is_in_the_status_and_in_the_log_of_its_attempt(interrupted: Path) -> None:
    events = [json.loads(line) for line in (interrupted / "events.jsonl").read_text().splitlines()]
    (end, last) = (event for event in events if event["event"] == "end")
    assert (end["state"], end["reason"]) == ("failed", "rank 0: Dies: in step 3")
    assert end["step"] == 3
    assert last["state"] == "finished"
    logs = [(interrupted / "logs" / attempt / "rank-00000.log").read_text() for attempt in ("1", "2")]
    assert "Dies: in step 3" in logs[0] and "Dies" not in logs[1] and "resumed" in logs[1]


def test_no_file_of_a_run_holds_what_is_in_the_environment(interrupted: Path) -> None:
    files = [path for path in interrupted.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
