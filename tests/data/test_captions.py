from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from rae_scale.config.schema import DataConfig, SourceConfig
from rae_scale.data.captions import draw_caption
from rae_scale.data.draws import Draw, uniform
from rae_scale.data.loader import build_loader
from rae_scale.data.record import Sample

keep = attrgetter("sample_id", "sample.captions")
CAPTIONS = ("long", "short", "tags")


def drawn(weights: tuple[float, ...], seed: int = 0, count: int = 2000) -> list[str]:
    sample = Sample("k", None, CAPTIONS, caption_weights=weights)
    return [draw_caption(sample, seed, index)[0].captions[0] for index in range(count)]


def test_captions_are_drawn_by_weight() -> None:
    counts = Counter(drawn((3.0, 1.0, 0.0)))
    assert set(counts) == {"long", "short"}
    assert counts["long"] / 2000 == pytest.approx(0.75, abs=0.03)


def test_without_weights_they_are_equally_likely() -> None:
    assert all(count / 2000 == pytest.approx(1 / 3, abs=0.035) for count in Counter(drawn(())).values())


def test_the_choice_is_a_function_of_seed_and_index() -> None:
    assert drawn((), seed=1, count=50) == drawn((), seed=1, count=50) != drawn((), seed=2, count=50)


def test_the_number_tells_which_and_only_that_one_is_left() -> None:
    sample = Sample("k", b"image", CAPTIONS, metadata={"a": 1}, caption_weights=(0.0, 0.0, 5.0))
    chosen, number = draw_caption(sample, 0, 0)
    assert (number, chosen.captions, chosen.image, chosen.metadata) == (2, ("tags",), b"image", {"a": 1})


@pytest.mark.parametrize("captions", [(), ("only",)])
def test_nothing_is_drawn_where_there_is_no_choice(captions: tuple[str, ...]) -> None:
    sample = Sample("k", None, captions, caption_weights=(1.0,) * len(captions))
    assert draw_caption(sample, 0, 0) == (sample, 0)


def test_the_loader_draws_and_names_the_caption_alike_in_every_layout(
    shards: Callable[[list[Sample]], Path],
) -> None:
    folder = shards([Sample(f"k{number}", None, CAPTIONS, caption_weights=(1.0, 1.0, 0.0)) for number in range(4)])

    def seen(**settings: Any) -> list[tuple[str, tuple[str, ...]]]:
        config = DataConfig(sources=(SourceConfig(path=str(folder)),), num_workers=0, **settings)
        with build_loader(
            config, seed=1, image_size=8, prepare=keep, collate=list, quarantine_path=os.devnull
        ) as loader:
            batches = (batch for step in loader for batch in step)
            return list(islice(chain.from_iterable(batches), 24))

    found = seen(caption_choice="weighted", global_batch_size=8)
    assert found == seen(caption_choice="weighted", global_batch_size=8, micro_batch_size=2)
    assert {captions for _, captions in found} == {("long",), ("short",)}
    for sample_id, (caption,) in found:
        assert sample_id.endswith(f":caption {CAPTIONS.index(caption)}")
    for sample_id, captions in seen(global_batch_size=8):
        assert "caption" not in sample_id and captions == CAPTIONS


def test_uses_of_a_sample_share_no_numbers() -> None:
    numbers = [uniform(seed, index, draw) for seed in range(3) for index in range(500) for draw in Draw]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.02)
