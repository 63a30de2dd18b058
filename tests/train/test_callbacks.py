from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_world import TinyWorld, read_metrics

from rae_scale.train import train
from rae_scale.train.callbacks.metrics_log import keep_lines
from rae_scale.train.callbacks.progress import describe
from rae_scale.train.callbacks.samples import save_grid
from rae_scale.train.callbacks.tensorboard import tag

PICTURES: dict[str, Any] = {
    "run__sample_every": 2,
    "run__sample_prompts": ["a red picture", "a blue picture", "a green picture"],
    "sampler__steps": 2,
    "sampler__guidance": 2.0,
}


def write_lines(path: Path, *texts: str) -> None:
    path.write_text("".join(texts))


def test_later_steps_and_a_torn_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, '{"step": 1}\n', '{"step": 2}\n', '{"step": 3}\n', '{"st')
    keep_lines(path, lambda line: line["step"] <= 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_complete_log_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, '{"step": 1}\n')
    before = path.stat().st_mtime_ns
    keep_lines(path, lambda line: line["step"] <= 1)
    keep_lines(tmp_path / "missing.jsonl", lambda line: True)
    assert path.stat().st_mtime_ns == before and not (tmp_path / "missing.jsonl").exists()


def test_tensorboard_shows_scalars_and_pictures(world: TinyWorld, decoder: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(world.config(tmp_path, run__max_steps=3, run__tensorboard=True, model__decoder__path=decoder, **PICTURES))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("loss/flow")}
    assert logged == pytest.approx({line["step"]: line["loss_flow"] for line in read_metrics(tmp_path)})
    assert {"loss/total", "grad_norm/llm", "lr/dit", "speed/images_per_second"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-00000002.png", "step-00000003.png"]


def test_pictures_do_not_change_the_training(world: TinyWorld, decoder: str, tmp_path: Path) -> None:
    settings = {"run__max_steps": 3, "optim__ema_decay": 0.5, "model__decoder__path": decoder}
    train(world.config(tmp_path / "with", **settings, **PICTURES))
    train(world.config(tmp_path / "without", **settings))
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1]


def test_without_a_decoder_there_is_one_warning_and_no_picture(
    world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(world.config(tmp_path, run__max_steps=2, **PICTURES))
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["no sample pictures: model.decoder.path is not set, so latents cannot be decoded"]
    assert not (tmp_path / "samples").exists()


def test_a_grid_is_filled_row_by_row(tmp_path: Path) -> None:
    pictures = torch.zeros(3, 3, 2, 2)
    pictures[0, 0], pictures[1, 1], pictures[2, 2] = 1, 1, 1
    save_grid(pictures, tmp_path / "grid.png")
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (4, 4)
    corners = [grid.getpixel(at) for at in ((0, 0), (2, 0), (0, 2), (2, 2))]
    assert corners == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def test_the_progress_line_says_what_matters() -> None:
    metrics = {"loss": 1.23456, "loss_flow": None, "grad_norm": 0.5, "mfu": 0.412, "skipped": 2}
    assert describe(metrics, 61.2) == "loss 1.2346  grad 0.5  MFU 41.2%  skipped 2  ETA 0:01:01"


def test_a_terminal_gets_a_live_line(world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr("rae_scale.train.callbacks.progress.Console", lambda **options: console)
    train(world.config(tmp_path, run__max_steps=2))
    assert "2/2" in screen.getvalue() and "ETA" in screen.getvalue()


def test_scalars_are_sorted_into_panels() -> None:
    names = ("loss", "loss_flow_bin_0", "grad_norm", "grad_norm_llm", "lr_dit", "step_s")
    assert [tag(name) for name in names] == [
        "loss/total",
        "loss/flow_bin_0",
        "grad_norm/total",
        "grad_norm/llm",
        "lr/dit",
        "speed/step_s",
    ]
