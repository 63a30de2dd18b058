from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from rae_scale.config.schema import DataConfig, SourceConfig
from rae_scale.data.decode import decode_image
from rae_scale.data.loader import Loader, build_loader, data_fingerprint
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.quarantine import TooManyBadSamples
from rae_scale.data.record import BadSample, DecodedSample, Sample, Turn
from rae_scale.data.transforms import resize_square

SIZE = 8
Row = tuple[int, str, Any]

# Of the standard library, so that worker processes can unpickle it: this file is no module to them.
keep = attrgetter("sample_index", "sample_id", "pixels")


def refuse_even(sample: DecodedSample) -> Row:
    if int(sample.sample.captions[0].split()[-1]) % 2 == 0:
        raise BadSample("too long", "513 tokens")
    return keep(sample)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Loader[list[Row]]]:
    """load(folders, global_batch_size=12, ..., **of build_loader) -> Loader whose batches are lists of rows."""

    def make(
        folders: list[Path],
        *,
        prepare: Callable[[DecodedSample], Row] = keep,
        seed: int = 5,
        dp_rank: int = 0,
        dp_world: int = 1,
        start_step: int = 0,
        batch_of: Callable[[int], int] = lambda step: step,
        **config: Any,
    ) -> Loader[list[Row]]:
        settings = {"global_batch_size": 12, "num_workers": 0, "max_bad_fraction": 0.5, **config}
        sources = tuple(SourceConfig(path=str(f), weight=w) for f, w in zip(folders, (2.0, 1.0), strict=False))
        return build_loader(
            DataConfig(sources=sources, **settings),
            seed=seed,
            image_size=SIZE,
            prepare=prepare,
            collate=list,
            quarantine_path=tmp_path / "run" / "quarantine.jsonl",
            dp_rank=dp_rank,
            dp_world=dp_world,
            start_step=start_step,
            batch_of=batch_of,
        )

    return make


def take(loader: Loader[list[Row]], steps: int) -> list[list[list[Row]]]:
    """Steps of micro-batches of rows."""
    with loader:
        return [comparable(batches) for _, batches in zip(range(steps), loader, strict=False)]


def comparable(batches: list[list[Row]]) -> list[list[Row]]:
    """Pixels as bytes, to compare with ==."""
    return [[(row[0], row[1], row[2] if row[2] is None else row[2].tobytes()) for row in batch] for batch in batches]


def flat(steps: list[list[list[Row]]]) -> list[Row]:
    return [row for step in steps for batch in step for row in batch]


def quarantined(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture
def folders(shards) -> list[Path]:
    return [shards(31, "first"), shards(17, "second")]


def test_samples_come_decoded_resized_and_in_the_order_of_their_positions(load, folders) -> None:
    rows = flat(take(load(folders), 4))
    assert [row[0] for row in rows] == list(range(48))
    sources = [row[1].split(":")[0] for row in rows]
    assert sources.count("first") == 32
    assert all(re.fullmatch(r"(first|second):(\d+):\1-\2", row[1]) for row in rows)
    source, index, _ = rows[7][1].split(":")
    image = MDSReader(folders[source == "second"])[int(index)].image
    assert image is not None
    expected = resize_square(decode_image(image, 10**6), SIZE)
    assert np.array_equal(np.frombuffer(rows[7][2], np.uint8).reshape(SIZE, SIZE, 3), expected)


@pytest.mark.parametrize(("dp_world", "micro_batch_size"), [(1, 4), (1, 1), (2, None), (2, 3), (3, 2), (12, 1)])
def test_a_step_has_the_same_samples_in_every_layout(load, folders, dp_world: int, micro_batch_size: int) -> None:
    expected = take(load(folders), 3)
    ranks = [
        take(load(folders, dp_rank=rank, dp_world=dp_world, micro_batch_size=micro_batch_size), 3)
        for rank in range(dp_world)
    ]
    for step in range(3):
        batches = [batch for rank in ranks for batch in rank[step]]
        assert {len(batch) for batch in batches} == {micro_batch_size or 12 // dp_world}
        assert [row for batch in batches for row in batch] == expected[step][0]


def test_workers_change_nothing_and_leave_no_process(load, shards, image, tmp_path: Path) -> None:
    samples = [Sample(str(i), image(seed=i) if i % 7 else b"broken", (f"caption {i}",)) for i in range(40)]
    folder = shards(samples)
    expected = take(load([folder], micro_batch_size=4), 5)
    before = quarantined(tmp_path)
    (tmp_path / "run" / "quarantine.jsonl").unlink()
    with load([folder], micro_batch_size=4, num_workers=2) as loader:
        steps = [comparable(next(loader))]
        for worker in multiprocessing.active_children():
            # As a scheduler does before a time limit, to every process of the job: the run still wants its batches.
            os.kill(worker.pid, signal.SIGTERM)
        steps += [comparable(next(loader)) for _ in range(4)]
    assert steps == expected
    assert multiprocessing.active_children() == []
    # Steps that workers prepared ahead and nobody asked for are not counted.
    assert quarantined(tmp_path) == before != []
    assert (loader.quarantine.seen, loader.quarantine.used) == (60, 60 - len({row["position"] for row in before}))


@pytest.mark.long
def test_killed_workers_change_nothing(load, shards, image, tmp_path: Path) -> None:
    folder = shards([Sample(str(i), image(seed=i) if i % 7 else b"broken", (f"caption {i}",)) for i in range(40)])
    expected = take(load([folder], micro_batch_size=4), 9)
    before = quarantined(tmp_path)
    (tmp_path / "run" / "quarantine.jsonl").unlink()
    with load([folder], micro_batch_size=4, num_workers=2) as loader:
        steps = []
        for kill in ((), (0,), (1,), (0, 1)):  # first, second, both: as the kernel does when memory runs out
            workers = multiprocessing.active_children()
            for number in kill:
                os.kill(workers[number].pid, signal.SIGKILL)
            steps += [comparable(next(loader)) for _ in range(3 if kill == () else 2)]
            assert not any(workers[number].is_alive() for number in kill)
    assert steps == expected
    assert multiprocessing.active_children() == []
    assert quarantined(tmp_path) == before != []


ELASTIC = [(2, 1, None), (3, 2, 3), (2, 4, 1), (3, 3, 2), (1, 1, 4), (2, 12, None)]
"""Steps, ranks and micro-batch size, with a restart after each."""


def run_elastic(load, folders: list[Path], segments: list[tuple[int, int, int | None]], **config: Any) -> list[Row]:
    """The rows of all steps of all ranks, in the order of ranks and micro-batches."""
    rows, done = [], 0
    workers = config.pop("workers", (0,) * len(segments))
    for num_workers, (steps, dp_world, micro_batch_size) in zip(workers, segments, strict=True):
        settings = {**config, "dp_world": dp_world, "micro_batch_size": micro_batch_size, "num_workers": num_workers}
        ranks = [take(load(folders, dp_rank=r, start_step=done, **settings), steps) for r in range(dp_world)]
        rows += [row for step in range(steps) for rank in ranks for batch in rank[step] for row in batch]
        done += steps
    return rows


@pytest.mark.parametrize("lanes", [1, 4])
def test_each_position_comes_once_and_in_order_at_any_number_of_ranks(load, shards, image, lanes: int) -> None:
    broken = [Sample(f"b{i}", image(seed=i) if i % 9 else b"broken", ("caption",)) for i in range(50)]
    folders = [shards(31, "first"), shards(broken, "second")]
    settings = {"lanes": lanes, "shuffle_block": 8, "global_batch_size": 24}
    rows = run_elastic(load, folders, ELASTIC, **settings)
    assert [row[0] for row in rows] == list(range(13 * 24))
    assert rows == flat(take(load(folders, **settings), 13))


@pytest.mark.long
def test_worker_counts_change_nothing_at_any_number_of_ranks(load, folders) -> None:
    settings = {"lanes": 4, "shuffle_block": 8, "global_batch_size": 12}
    rows = run_elastic(load, folders, ELASTIC[:4], workers=(2, 1, 0, 2), **settings)
    assert rows == flat(take(load(folders, **settings), 10))


def test_resuming_at_a_step_is_the_same_as_running_through(load, folders) -> None:
    through = take(load(folders, micro_batch_size=4), 6)
    loader = load(folders, micro_batch_size=4, start_step=4)
    assert loader.step == 4
    assert take(loader, 2) == through[4:]
    assert loader.step == 6


def test_left_out_batches_are_passed_over(load, folders) -> None:
    through = take(load(folders, micro_batch_size=4), 7)
    skipping = {"micro_batch_size": 4, "batch_of": lambda step: step if step < 2 else step + 3}
    assert take(load(folders, **skipping), 4) == [*through[:2], *through[5:]]
    loader = load(folders, start_step=3, **skipping)
    assert take(loader, 1) == through[6:]
    assert loader.step == 4


def test_workers_that_are_started_anew_go_on_with_the_micro_batch_that_is_missing(load, folders) -> None:
    loader = load(folders, micro_batch_size=4, start_step=2, batch_of=lambda step: step if step < 4 else step + 9)
    numbers = list(islice(loader._numbers(0), 12))
    assert numbers == [6, 7, 8, 9, 10, 11, 39, 40, 41, 42, 43, 44]
    for taken in range(9):
        assert list(islice(loader._numbers(taken), 3)) == numbers[taken : taken + 3]


def test_the_seed_changes_the_order(load, folders) -> None:
    assert take(load(folders, seed=1), 1) != take(load(folders, seed=2), 1)


def test_the_global_random_state_is_left_alone(load, folders) -> None:
    before = torch.get_rng_state()
    take(load(folders), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_samples_are_replaced_the_same_way_in_every_layout(load, shards, image, tmp_path: Path) -> None:
    samples = [Sample(f"k{i}", image(seed=i) if i != 3 else image()[:-100], (f"caption {i}",)) for i in range(12)]
    folder = shards(samples)
    rows = flat(take(load([folder]), 2))
    assert [row[0] for row in rows] == list(range(24))
    assert not any(row[1].endswith(":k3") for row in rows)
    records = quarantined(tmp_path)
    assert len(records) >= 2  # once in each of the two epochs
    for record in records:
        assert (record["source"], record["index"], record["key"]) == (str(folder), 3, "k3")
        assert record["reason"] == "undecodable image"
        assert record["shard"].endswith(".mds")
    replaced = [row for row in rows if row[0] in {record["position"] for record in records}]
    again = [
        row for rank in range(2) for row in flat(take(load([folder], dp_rank=rank, dp_world=2, micro_batch_size=3), 2))
    ]
    assert all(row in again for row in replaced)


def test_corrupt_rows_are_replaced_too(load, shards, tmp_path: Path) -> None:
    folder = shards(12, shard_bytes=10**6)
    path = folder / "shard.00000.mds"
    was = path.read_bytes()
    path.write_bytes(was.replace(b'["caption 5"]', b'["caption 5"}'))
    index = folder / "index.json"  # corrupt from the beginning: the hash is that of the corrupt bytes
    hashes = [xxhash.xxh3_128_hexdigest(data) for data in (was, path.read_bytes())]
    index.write_text(index.read_text().replace(*hashes))
    rows = flat(take(load([folder]), 1))
    assert len(rows) == 12
    assert {(record["index"], record["reason"]) for record in quarantined(tmp_path)} == {(5, "corrupt row")}


def test_a_damaged_shard_is_listed_once_and_its_samples_are_replaced_and_counted(load, shards, tmp_path: Path) -> None:
    folder = shards(60)
    path = folder / "shard.00003.mds"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reader = MDSReader(folder)
    lost = {index for index in range(60) if reader.locate(index)[0] == 3}
    ranks = [load([folder], dp_rank=rank, dp_world=2, shuffle_block=20) for rank in range(2)]
    rows = [row for loader in ranks for row in flat(take(loader, 10))]
    assert sorted(row[0] for row in rows) == list(range(120))
    assert not lost & {int(row[1].split(":")[1]) for row in rows}
    (record,) = quarantined(tmp_path)
    assert (record["shard"], record["index"], record["samples"]) == (path.name, None, len(lost))
    assert record["lost"] == pytest.approx(len(lost) / 60)
    assert sum(loader.quarantine.replaced for loader in ranks) == 2 * len(lost)  # in each of two epochs
    assert all(loader.quarantine.seen == 60 for loader in ranks)
    limited = load([folder], shuffle_block=20, max_bad_fraction=0.9 * len(lost) / 60)
    with pytest.raises(TooManyBadSamples, match=rf"1 bad shards hold {len(lost) / 60:.2%} of the data"):
        take(limited, 10)


def test_what_prepare_refuses_is_replaced_and_listed_by_its_kind(load, shards, tmp_path: Path) -> None:
    rows = flat(take(load([shards(40)], prepare=refuse_even), 3))
    assert [row[0] for row in rows] == list(range(36))
    assert all(int(row[1].split("-")[-1]) % 2 for row in rows)
    assert {(record["reason"], record["detail"]) for record in quarantined(tmp_path)} == {("too long", "513 tokens")}


def test_a_source_without_any_good_sample_stops_the_run(load, shards, tmp_path: Path) -> None:
    folder = shards([Sample(str(i), b"broken", ("x",)) for i in range(9)])
    loader = load([folder], max_bad_fraction=1.0)
    with loader, pytest.raises(TooManyBadSamples, match=r"position 0: 16 samples of .* in a row .* undecodable image"):
        next(loader)
    assert len(quarantined(tmp_path)) == 16


def test_more_bad_samples_than_allowed_stop_the_run(load, shards, tmp_path: Path) -> None:
    folder = shards(40)
    loader = load([folder], prepare=refuse_even, max_bad_fraction=0.001)
    with loader, pytest.raises(TooManyBadSamples, match=r"too long \d+\), more than data.max_bad_fraction=0.001"):
        next(loader)


def test_images_above_max_pixels_are_refused(load, shards, tmp_path: Path) -> None:
    with pytest.raises(TooManyBadSamples, match="image too large"):
        take(load([shards(9)], max_pixels=100, max_bad_fraction=1.0), 1)


def test_text_only_samples_have_no_pixels(load, shards) -> None:
    turns = (Turn("human", "Hello"), Turn("gpt", "Hi"))
    rows = flat(take(load([shards([Sample("a", None, (), turns)])]), 1))
    assert [row[2] for row in rows] == [None] * 12


def test_other_errors_are_not_swallowed(load, shards) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        take(load([shards(9)], prepare=lambda sample: int("a mistake in the code")), 1)


def test_a_closed_loader_says_so(load, shards) -> None:
    loader = load([shards(9)])
    loader.close()
    with pytest.raises(ValueError, match="this loader is closed"):
        next(loader)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dp_world": 5}, r"data.global_batch_size=12 does not divide by data-parallel ranks=5"),
        ({"lanes": 5}, r"data.lanes=5 does not divide data.global_batch_size=12"),
        ({"micro_batch_size": 5}, r"samples per rank=12 does not divide by data.micro_batch_size=5"),
    ],
)
def test_batch_sizes_that_do_not_divide_are_named(load, shards, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load([shards(9)], **settings)


def test_sources_are_checked_first(load, shards, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.sources is empty"):
        load([])
    with pytest.raises(ValueError, match=r"gone/index\.json: no such file"):
        load([tmp_path / "gone"])
    with pytest.raises(ValueError, match=r"empty: holds no samples"):
        load([shards([], "empty")])


def test_the_fingerprint_names_the_data_and_the_mixture(folders, tmp_path: Path) -> None:
    def fingerprint(*sources: tuple[Path, float], **settings: int) -> str:
        configs = tuple(SourceConfig(path=str(path), weight=weight) for path, weight in sources)
        return data_fingerprint(DataConfig(sources=configs, **settings))

    first, second = folders
    moved = first.rename(tmp_path / "moved")
    usual = fingerprint((moved, 0.5), (second, 0.5))
    assert usual == fingerprint((moved, 1), (second, 1))
    # What changes no order is not part of it: a block that holds each source, and the batch size with a single lane.
    assert usual == fingerprint((moved, 1), (second, 1), shuffle_block=31, global_batch_size=7)
    others = [
        fingerprint((second, 1), (moved, 1)),
        fingerprint((moved, 2), (second, 1)),
        fingerprint((moved, 1)),
        fingerprint((moved, 1), (second, 1), shuffle_block=30),
        fingerprint((moved, 1), (second, 1), lanes=2),
        fingerprint((moved, 1), (second, 1), lanes=2, global_batch_size=1024),
        fingerprint((moved, 1), (second, 1), lanes=4),
        fingerprint((moved, 1), (second, 1), lanes=4, shuffle_block=31),
    ]
    assert usual not in others
    assert len(set(others)) == len(others)


def test_lanes_that_do_not_fit_the_ranks_are_named(load, folders, caplog: pytest.LogCaptureFixture) -> None:
    load(folders, lanes=4, dp_world=3).close()
    assert "data.lanes=4 over 3 data-parallel ranks: some ranks read parts of several lanes" in caplog.text
    caplog.clear()
    load(folders, lanes=4, dp_world=2).close()
    load(folders, lanes=2, dp_world=4).close()
    assert not caplog.records


def test_a_cache_that_is_smaller_than_the_working_set_is_named(
    load, folders, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folders).close()  # nothing is cached
    assert not caplog.records
    load(folders, cache_gb=0.001, fetch_attempts=2).close()
    assert "data.cache_gb, data.fetch_attempts: not used, every source is read where it lies" in caplog.text
    monkeypatch.setattr(MDSReader, "fetches", True)
    load(folders, cache_gb=0.00001).close()
    assert re.search(r"data.cache_gb=1e-05 is less than the \S+ GB that the shuffle blocks of one rank", caplog.text)
