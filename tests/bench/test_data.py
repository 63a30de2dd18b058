"""The data path's benchmark on a few pictures of the shapes world, without workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rae_scale.bench.data import DATA, batch_times, bench_data, make_shards, one_thread
from rae_scale.bench.harness import Base, sweep_points
from rae_scale.bench.record_report import to_markdown
from rae_scale.bench.session import Session
from rae_scale.config.paths import resolve_path

ALONE = Session(torch.device("cpu"), 1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shapes"), images=12, size=48)


def base(shards: Path, *overrides: str) -> Base:
    tree = {"data": {"sources": [{"path": str(shards)}], "global_batch_size": 4, "num_workers": 0}}
    return Base(tree, overrides, "test")


def test_images_alone_beside_the_bare_loop(shards: Path) -> None:
    points = sweep_points(["data.micro_batch_size=2,4,3"])
    record = bench_data(base(shards), ALONE, points, image_size=32, repeats=4, starts=2)
    assert "does not divide the 4 samples" in (record.rows[2].failed or "")
    for row in record.rows[:2]:
        assert {name: measure.repeats for name, measure in row.measures.items()} == {
            "batch": 4,
            "bare": 4,
            "first": 2,
            "index": 3,
        }
        assert row.values["images_per_s"] == pytest.approx(4 / row.measures["batch"].median)
        assert row.values["bare_images_per_s"] == pytest.approx(4 / row.measures["bare"].median)
        rates = row.values["images_per_s"], row.values["bare_images_per_s"]
        assert row.values["of_bare"] == pytest.approx(rates[0] / rates[1])
        assert row.settings["samples"] == 12 and row.settings["text"] is None and row.facts["precision"] is None
    assert "of the bare loop" in to_markdown(DATA, record)


def test_the_same_images_elsewhere_are_the_same_settings(shards: Path, tmp_path: Path) -> None:
    again = make_shards(tmp_path, images=12, size=48)
    others = make_shards(tmp_path / "others", images=11, size=48)
    rows = [
        bench_data(base(folder), ALONE, image_size=32, repeats=1, starts=1).rows[0]
        for folder in (shards, again, others)
    ]
    assert rows[0].settings_hash == rows[1].settings_hash != rows[2].settings_hash


def test_with_a_tokenizer_captions_become_conversations(shards: Path) -> None:
    tokenizer = f"model.llm.tokenizer={resolve_path('asset:demo/tokenizer')}"
    record = bench_data(base(shards, tokenizer, "model.name=dit-demo"), ALONE, image_size=32, repeats=1, starts=1)
    text = record.rows[0].settings["text"]
    assert text["image_tokens"] == 16 and text["vocabulary"] > 256 and "{caption}" in text["template"]


def test_what_was_ready_before_the_clock_started_does_not_count() -> None:
    class Counted:
        taken = 0

        def __next__(self) -> list[int]:
            self.taken += 1
            return []

    loader = Counted()
    assert len(batch_times(loader, workers=3, repeats=5)) == 5  # type: ignore[arg-type]
    assert loader.taken == 2 * 3 + 5 * 3


def test_settings_of_the_model_are_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"engine.precision changes nothing that `bench data` measures"):
        bench_data(base(shards, "engine.precision=fp32"), ALONE, image_size=32)


def test_one_thread_inside_only() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
