"""The data path's benchmark on a few small pictures. What starts processes is marked long."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from rae_scale.bench import data
from rae_scale.bench.data import DATA, READERS, bench_data, compare, make_readers, row_of
from rae_scale.bench.data_pictures import made_samples, make_shards, write_tars
from rae_scale.bench.data_race import Lap, ReaderFailed, Result, cpu_seconds, lap, memory, race, start
from rae_scale.bench.data_readers import BareLoop, PillowTransform, WebDataset
from rae_scale.bench.harness import Base, sweep_points
from rae_scale.bench.record_report import to_markdown
from rae_scale.bench.session import Session
from rae_scale.config.paths import resolve_path
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.record import Sample
from rae_scale.data.transforms import ImageTransform, resize_square
from rae_scale.train.batches import ImageBatches

ALONE = Session(torch.device("cpu"), 1)
SIZE = 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("pictures"), images=6, size=48)


def base(shards: Path, *overrides: str) -> Base:
    tree = {"data": {"sources": [{"path": str(shards)}], "global_batch_size": 4, "num_workers": 0}}
    return Base(tree, overrides, "test")


def test_made_pictures_are_always_the_same_and_as_large_as_photographs() -> None:
    first, again = (list(made_samples(2, 512)) for _ in range(2))
    assert first == again and first[0].image != first[1].image
    for sample in first:
        assert sample.image is not None and 50_000 < len(sample.image) < 90_000


def test_other_readers_get_a_copy_of_the_images_that_ours_begins_with(shards: Path, tmp_path: Path) -> None:
    config = base(shards).config()
    readers = make_readers(config, ImageBatches(SIZE), ["rae-scale", "bare loop", "webdataset"], 10, tmp_path)
    assert list(readers) == ["rae-scale", "bare loop", "webdataset"]
    bare, tars = readers["bare loop"], readers["webdataset"]
    assert isinstance(bare, BareLoop) and isinstance(tars, WebDataset)
    originals, copies = MDSReader(shards), MDSReader(bare.shards)
    assert len(copies) == 10 and len({sample.key for sample in copies}) == 10
    assert bare.distinct == 6
    assert {copies[number].image for number in range(6)} == {sample.image for sample in originals}
    assert len(tars.tars) == 4
    for reader in readers.values():
        batches = reader.open()
        assert list(islice(batches, 2)) == [4, 4]
        batches.close()


def test_images_keep_their_format_in_tars(tmp_path: Path) -> None:
    samples = []
    for format in ("PNG", "WEBP", "JPEG"):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, format)
        samples.append(Sample(format, buffer.getvalue(), (format,)))
    paths = write_tars(tmp_path / "tars", samples, 2)
    batches = WebDataset(paths, SIZE, 1, 0).open()
    assert list(islice(batches, 3)) == [1, 1, 1]
    batches.close()


def test_the_customary_pipeline_sees_what_ours_sees() -> None:
    pixels = np.random.default_rng(0).integers(80, 176, (60, 90, 3), dtype=np.uint8)
    values = PillowTransform(SIZE)(Image.fromarray(pixels))
    assert values.dtype == torch.float32 and values.is_contiguous()
    assert np.abs(values.permute(1, 2, 0).numpy() * 255 - resize_square(pixels, SIZE)).max() <= 1.01


def test_the_bare_loop_transforms_every_image_in_turn(shards: Path) -> None:
    seen = []

    class Spy(ImageTransform):
        def __call__(self, data: bytes, sample_index: int, out: np.ndarray | None = None) -> np.ndarray:
            seen.append(simplejpeg.decode_jpeg_header(data)[0])
            return super().__call__(data, sample_index, out)

    batches = BareLoop(shards, Spy(SIZE, 10_000), batch=4, distinct=6).open()
    assert list(islice(batches, 3)) == [4, 4, 4] and seen == [48] * 12
    batches.close()


def test_what_was_ready_before_the_clock_started_does_not_count() -> None:
    taken = []

    def counted():
        for number in range(1000):
            taken.append(number)
            yield 5

    found = lap(counted(), workers=3)
    assert found.images == 3 * 5 and len(taken) == 2 * 3 + 3
    assert found.wall > 0
    assert lap(counted(), workers=0).images == 5


def test_a_reader_is_opened_anew_for_each_start() -> None:
    opened, closed = [], []

    class Counted:
        def open(self):
            opened.append(None)
            try:
                while True:
                    yield 1
            finally:
                closed.append(None)

    first, batches = start(Counted(), 3)  # type: ignore[arg-type]
    assert (len(first), len(opened), len(closed)) == (3, 3, 2)
    batches.close()


def test_cpu_time_and_memory_are_of_this_process() -> None:
    before = cpu_seconds()
    sum(range(200_000))
    assert before < cpu_seconds()
    assert 10e6 < memory() < 1e11


def test_rows_hold_rates_and_a_failed_reader_says_why(shards: Path) -> None:
    config = base(shards).config()
    laps = [Lap(8, 0.4, 0.2), Lap(8, 0.4, 0.2)]
    results = {"bare loop": Result([1.0], laps, 5_000_000), "streaming": ReaderFailed("its process ended")}
    found = row_of("bare loop", config, lambda: results)
    assert found.measures["batch"].median == pytest.approx(0.2)  # of 4 images
    assert found.values["images_per_s"] == pytest.approx(20)
    assert found.values["images_per_core_s"] == pytest.approx(40)
    assert found.values["megabytes"] == 5
    with pytest.raises(ValueError, match="its process ended"):
        row_of("streaming", config, lambda: results)


def test_an_absent_library_is_said_to_be_absent(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="streaming is not installed: pip install mosaicml-streaming"):
        row_of("streaming", base(shards).config(), lambda: {})


def test_readers_are_compared_round_by_round() -> None:
    """Medians of the ratios: in the second round the machine was ten times as slow for all."""

    def result(*cpu: float) -> Result:
        return Result([1.0], [Lap(2, 1.0, seconds) for seconds in cpu])

    results = {
        "rae-scale": result(2.0, 20.0, 2.0),
        "bare loop": result(1.8, 18.0, 1.9),
        "webdataset": result(5.0, 50.0, 6.0),
        "streaming": ReaderFailed("gone"),
    }
    assert compare("rae-scale", results) == {"of_bare": pytest.approx(0.9)}
    assert compare("bare loop", results) == {}
    assert compare("webdataset", results) == {"of_bare": pytest.approx(0.36), "slower": pytest.approx(2.5)}
    assert compare("streaming", results) == {}
    assert compare("rae-scale", {"rae-scale": result(1.0)}) == {}


def test_what_cannot_be_measured_is_refused(shards: Path) -> None:
    with pytest.raises(ValueError, match=r"engine.precision changes nothing that `bench data` measures"):
        bench_data(base(shards, "engine.precision=fp32"), ALONE, image_size=SIZE)
    with pytest.raises(ValueError, match="--reader='ours': choose from rae-scale, bare loop"):
        bench_data(base(shards), ALONE, image_size=SIZE, only=["ours"])


@pytest.mark.long  # four processes, of which one imports mosaicml-streaming
def test_all_readers_side_by_side(shards: Path) -> None:
    tokenizer = f"model.llm.tokenizer={resolve_path('asset:demo/tokenizer')}"
    given = base(shards, tokenizer, "model.name=dit-demo")
    points = sweep_points(["data.micro_batch_size=2,3"])
    record = bench_data(given, ALONE, points, image_size=SIZE, repeats=2, starts=2)
    *rows, refused = record.rows
    assert "does not divide the 4 samples" in (refused.failed or "")
    assert [row.varied["reader"] for row in rows] == list(READERS)
    for row in rows:
        assert row.failed is None
        assert (row.measures["batch"].repeats, row.measures["first"].repeats) == (2, 2)
        assert row.settings["samples"] == 6 and row.settings["text"]["image_tokens"] == 16
    assert {"of_bare", "images_per_s", "megabytes"} <= rows[0].values.keys()
    assert "of the bare loop" in to_markdown(DATA, record)


@pytest.mark.long  # starts processes
def test_a_reader_that_fails_does_not_end_the_race(shards: Path, tmp_path: Path) -> None:
    transform = ImageTransform(SIZE, 10_000)
    readers = {"good": BareLoop(shards, transform, 2, 6), "bad": BareLoop(tmp_path / "none", transform, 2, 6)}
    found = race(readers, workers=0, rounds=2, starts=1)
    assert isinstance(found["good"], Result) and [lap.images for lap in found["good"].laps] == [2, 2]
    assert isinstance(found["bad"], ReaderFailed) and "none" in str(found["bad"])
