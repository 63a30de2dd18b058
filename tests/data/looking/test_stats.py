from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rae_scale.data.looking import stats as stats_module
from rae_scale.data.looking.plots import panels, save_tensorboard
from rae_scale.data.looking.stats import stats
from rae_scale.data.looking.units import UNNAMED, corpus_of
from rae_scale.data.record import Sample


def test_a_build(built: Path) -> None:
    found = stats(built)
    assert (found.samples, found.found.items) == (10, 10)
    assert found.units == {"00000-web-0": 7, "00001-web-1": 0, "00002-flux-0": 3}
    assert found.by_corpus == {"web": 7, "flux": 3}
    assert found.left_out == {"undecodable image": 2, "no image": 1, "duplicate": 1}
    assert found.found.formats == {"JPEG": 7, "PNG": 3}
    said = json.loads(json.dumps(found.as_json()))
    width = said["distributions"]["image width, pixels"]
    assert (width["count"], width["least"], width["median"], width["most"]) == (10, 24, 24, 32)
    assert sum(width["histogram"]["counts"]) == 10
    assert said["distributions"]["caption, tokens"] is None


def test_processes_and_samples_add_up(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = stats(built, count=None).as_json()
    monkeypatch.setattr(stats_module, "TASK_SAMPLES", 2)
    assert stats(built, count=None).as_json() == everything
    few = stats(built, count=4)
    assert (few.samples, few.found.items, few.units) == (10, 4, {"00000-web-0": 7, "00001-web-1": 0, "00002-flux-0": 3})


@pytest.mark.long
def test_worker_processes_find_the_same(built: Path) -> None:
    assert stats(built, count=None, workers=2).as_json() == stats(built, count=None).as_json()


def test_captions_are_counted_in_characters_and_tokens(shards, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str):
        assert name == "words"
        return lambda text: SimpleNamespace(input_ids=text.split())

    monkeypatch.setattr("rae_scale.data.tokenizer.load_tokenizer", load)
    samples = [Sample("0", None, ("a photo of a red circle", "circle")), Sample("1", None, ("a",))]
    found = stats(shards(samples), tokenizer="words").found
    assert (found.characters.counts, found.text_only) == ({23: 1, 6: 1, 1: 1}, 2)
    assert found.tokens.counts == {6: 1, 1: 2}
    assert not len(found.captions_per_image)  # there is no image


def test_a_tar_and_what_is_wrong_with_it(tar, image) -> None:
    found = stats(tar([("0.jpg", image()), ("0.txt", b"a"), ("1.jpg", b"no"), ("1.txt", b"b")]))
    assert (found.samples, found.found.rejected) == (2, {"undecodable image": 1})


@pytest.mark.parametrize(
    ("unit", "corpus"),
    [("00012-cc12m-0012", "cc12m"), ("00000-sa_000001", "sa"), ("00003-web", "web"), ("00004-7", UNNAMED)],
)
def test_units_of_a_corpus(unit: str, corpus: str) -> None:
    assert corpus_of(unit) == corpus


def test_all_that_was_found_has_a_panel(built: Path) -> None:
    assert list(panels(stats(built))) == [
        "image width, pixels",
        "image height, pixels",
        "aspect, width / height",
        "image file, bytes",
        "caption, characters",
        "captions per image",
        "samples by corpus",
        "image formats",
        "left out when built",
    ]


@pytest.mark.long
def test_tensorboard_gets_a_figure_per_panel(built: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = stats(built)
    save_tensorboard(found, tmp_path / "tb")
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert len(events.Tags()["images"]) == len(panels(found))
