"""The sampling benchmark with random tiny models, and with the demo's shipped ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from rae_scale.bench import sample
from rae_scale.bench.harness import Base, sweep_points
from rae_scale.bench.record_report import to_markdown
from rae_scale.bench.sample import SAMPLE, Drawer, LoadedDrawer, bench_sample, random_drawer
from rae_scale.bench.session import Session
from rae_scale.config import Config
from rae_scale.config.paths import ASSET_ROOT

CPU = torch.device("cpu")
ALONE = Session(CPU, 1)
TREE = {
    "model": {"name": "dit-tiny", "llm": {"name": "qwen2-tiny"}, "decoder": {"name": "vit-test"}},
    "engine": {"precision": "fp32"},
    "data": {"global_batch_size": 2},
    "sampler": {"steps": 2},
}
RANDOM: Callable[[Config], Drawer] = partial(random_drawer, device=CPU, text_tokens=5)


def test_steps_guidance_and_batch_size_each_have_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, float]] = []
    real = sample.sample_latents

    def counted(model, batch, cfg, **options):
        calls.append((len(batch), cfg.steps, cfg.guidance))
        return real(model, batch, cfg, **options)

    monkeypatch.setattr(sample, "sample_latents", counted)
    built: list[Config] = []

    def drawer(config: Config) -> Drawer:
        built.append(config)
        return RANDOM(config)

    points = sweep_points(["sampler.steps=1,2", "sampler.guidance=1.0,3.0", "data.global_batch_size=1,2"])
    record = bench_sample(Base(TREE, (), "test"), drawer, ALONE, points, weights="random", repeats=1)
    assert len(record.rows) == 8 and len(built) == 1  # one model serves all of them
    assert {(count, steps, guidance) for count, steps, guidance in calls} == {
        (count, steps, guidance) for count in (1, 2) for steps in (1, 2) for guidance in (1.0, 3.0)
    }
    for row in record.rows:
        assert set(row.measures) == {"latents", "decode", "total"}
        count = row.varied["data.global_batch_size"]
        assert row.values["images_per_s"] == pytest.approx(count / row.measures["total"].median)
        assert row.values["seconds_per_image"] == pytest.approx(row.measures["total"].median / count)
    assert "| steps 1, guidance 1.0, global_batch_size 2 |" in to_markdown(SAMPLE, record)


def test_another_model_is_built_anew() -> None:
    built: list[str] = []

    def drawer(config: Config) -> Drawer:
        built.append(config.model.decoder.name)
        return RANDOM(config)

    points = sweep_points(["model.decoder.name=vit-test,vit-tiny"])
    record = bench_sample(Base(TREE, (), "test"), drawer, ALONE, points, weights="random", repeats=1)
    assert built == ["vit-test", "vit-tiny"] and all(row.measures for row in record.rows)


def test_a_decoder_of_another_grid_is_refused() -> None:
    base = Base(TREE, ("model.decoder.name=vit-b",), "test")
    with pytest.raises(ValueError, match=r"'vit-b' decodes 256 tokens, but model.name='dit-tiny' makes 16"):
        sample.random_decode(base.config(), CPU)


def test_the_shipped_model_draws_and_keeps_its_own_settings() -> None:
    loaded = LoadedDrawer(ASSET_ROOT / "demo/model", CPU)
    given = ("data.global_batch_size=1", "sampler.steps=1")
    points = sweep_points(["model.qk_norm=true,false"])
    record = bench_sample(Base(loaded.tree(), given, "test"), loaded, ALONE, points, weights="loaded", repeats=1)
    assert [bool(row.measures) for row in record.rows] == [False, True]
    assert "model.* is overridden, but the checkpoint's own settings hold" in (record.rows[0].failed or "")


def test_settings_of_training_are_refused() -> None:
    with pytest.raises(ValueError, match=r"optim.ema_decay changes nothing that `bench sample` measures"):
        bench_sample(Base(TREE, ("optim.ema_decay=0.9",), "test"), RANDOM, ALONE, weights="random")
