"""The smallest world that the whole pipeline runs in: pictures of one colour, their captions, and models to match."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rae_scale.config import Config, parse_config
from rae_scale.data.mds_writer import MDSWriter
from rae_scale.data.record import Sample, Turn
from rae_scale.data.tokenizer import train_tokenizer
from rae_scale.models.encoders.siglip_demo import SiglipDemoConfig, SiglipDemoEncoder
from rae_scale.train.callbacks import Callback

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230), "yellow": (240, 220, 40)}
IMAGE_SIZE = 16
SAMPLES = 40


@dataclass(frozen=True)
class TinyWorld:
    """Folders of shards, tokenizer and encoder weights."""

    data: str
    tokenizer: str
    encoder: str

    def tree(self, run_dir: Path, **changes: Any) -> dict[str, Any]:
        """Settings of a `pretrain` run as a nested dict; `changes` are dotted keys with `__` for the dots."""
        tree: dict[str, Any] = {
            "stage": "pretrain",
            "run": {"dir": str(run_dir), "max_steps": 4, "save_every": 0, "device": "cpu", "tensorboard": False},
            "model": {
                "name": "dit-tiny",
                "llm": {"name": "qwen2-tiny", "tokenizer": self.tokenizer},
                "encoder": {"name": "siglip-demo", "path": self.encoder},
                "decoder": {"name": "vit-test"},
            },
            "data": {
                "sources": [{"path": self.data}],
                "global_batch_size": 8,
                "num_workers": 0,
                "max_seq_len": 128,
            },
            "optim": {"groups": {"llm": {"lr": 1e-3}, "dit": {"lr": 2e-3, "betas": [0.9, 0.95]}}},
            "engine": {"name": "eager", "precision": "fp32"},
        }
        for dotted, value in changes.items():
            *sections, key = dotted.split("__")
            section = tree
            for name in sections:
                section = section.setdefault(name, {})
            section[key] = value
        if tree["stage"] in ("encoder", "decoder"):
            tree["optim"]["groups"] = {tree["stage"]: {"lr": 2e-3}}
        return tree

    def config(self, run_dir: Path, **changes: Any) -> Config:
        return parse_config(self.tree(run_dir, **changes))


def make_world(folder: Path) -> TinyWorld:
    samples = [make_sample(number) for number in range(SAMPLES)]
    write_shards(folder / "data", samples)
    texts = [text for sample in samples for text in (*sample.captions, *(turn.value for turn in sample.turns))]
    train_tokenizer(texts, 300, folder / "tokenizer")
    torch.manual_seed(1)
    small = SiglipDemoConfig(
        IMAGE_SIZE,
        patch_size=4,
        channels=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    SiglipDemoEncoder(small).save_pretrained(folder / "encoder")
    return TinyWorld(*(str(folder / name) for name in ("data", "tokenizer", "encoder")))


def write_shards(folder: Path, samples: list[Sample]) -> None:
    folder.mkdir()
    writer = MDSWriter(folder)
    for sample in samples:
        writer.write(sample)
    writer.finish()


def make_sample(number: int) -> Sample:
    """Mostly captioned pictures; every tenth asks about its picture, every tenth is text alone."""
    name = list(COLOURS)[number % len(COLOURS)]
    image, key = picture(COLOURS[name]), f"sample-{number}"
    if number % 10 == 3:
        return Sample(key, image, (f"a {name} picture",), (Turn("human", "<image>\nWhich colour?"), Turn("gpt", name)))
    if number % 10 == 7:
        return Sample(key, None, (), (Turn("human", "Name a colour."), Turn("gpt", name)))
    return Sample(key, image, (f"a {name} picture",))


def picture(colour: tuple[int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), colour).save(file, format="PNG")
    return file.getvalue()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def train_rank(tree: dict[str, Any], poisoned: int | None = None, signal_at: int | None = None) -> None:
    """What one of several processes does.

    poisoned: global position of a sample whose noise is not a number: a loss that is not finite on one rank alone.
    signal_at: the step after which the last rank, and no other, is asked to stop.
    """
    from rae_scale.train import setup
    from rae_scale.train.stages import GenerationStage

    if poisoned is not None:
        GenerationStage.prepare = poisoning(GenerationStage.prepare, poisoned)
    if signal_at is not None and os.environ["RANK"] == "1":
        build = setup.build_callbacks
        setup.build_callbacks = lambda *args: [SignalAt(signal_at), *build(*args)]
    setup.train(parse_config(tree))


def poisoning(prepare: Callable[..., Any], position: int) -> Callable[..., Any]:
    def poisoned(stage: Any, batch: Any, step: int) -> Any:
        inputs = prepare(stage, batch, step)
        inputs.x_t[batch.sample_index == position] = float("nan")
        return inputs

    return poisoned


class SignalAt(Callback):
    """Sends this process a signal between two steps."""

    main_only = False

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, metrics: dict[str, Any]) -> None:
        if run.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
