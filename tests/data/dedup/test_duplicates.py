from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash

from rae_scale.data.dedup import Duplicates, find_duplicates, near, write_fingerprints
from rae_scale.data.dedup.near import block_masks, bucket_pairs, choose_blocks, find_near, near_pairs, split

Entry = tuple[int, int | None]  # content, look


@pytest.fixture
def units(tmp_path: Path):
    """units([[(content, look), ...], ...]) -> files of fingerprints. Positions count up in steps of ten."""

    def write(contents: list[list[Entry]]) -> list[Path]:
        paths = []
        for unit, entries in enumerate(contents):
            records = [
                struct.pack("<16sQII", content.to_bytes(16, "big"), look or 0, 10 * number, look is not None)
                for number, (content, look) in enumerate(entries)
            ]
            paths.append(tmp_path / f"{unit}.fingerprints")
            write_fingerprints(paths[-1], records)
        return paths

    return write


def listed(duplicates: Duplicates) -> list[tuple[int, int, int, int, bool]]:
    return [tuple(entry) for entry in duplicates.table.tolist()]


def test_the_first_of_equal_contents_is_kept(units) -> None:
    paths = units([[(5, None), (6, None)], [], [(6, None), (7, None), (5, None), (6, None)]])
    found = find_duplicates(paths)
    assert listed(found) == [(2, 0, 0, 10, False), (2, 20, 0, 0, False), (2, 30, 0, 10, False)]
    assert (found.samples, found.exact, found.near) == (6, 3, 0)
    assert len(found.of_unit(0)) == len(found.of_unit(1)) == 0
    assert found.of_unit(2)["position"].tolist() == [0, 20, 30]


def test_contents_that_share_half_of_their_hash_are_not_equal(units) -> None:
    assert not listed(find_duplicates(units([[(1, None), (1 + 2**64, None), (2**64, None), (2**127, None)]])))


def test_no_samples_have_no_duplicates(units) -> None:
    for distance in (None, 0, 3):
        assert find_duplicates([], distance).samples == find_duplicates(units([[], []]), distance).samples == 0


def test_near_looks_count_only_when_asked_for(units) -> None:
    paths = units([[(1, 0b0), (2, 0b111), (3, None)], [(4, 0b1111), (5, 2**63), (6, None)]])
    assert not listed(find_duplicates(paths))
    assert not listed(find_duplicates(paths, 0))
    assert listed(find_duplicates(paths, 1)) == [(1, 0, 0, 10, True), (1, 10, 0, 0, True)]
    # 1111 is four from 0, but three of what is gone by then: it stays when 111 goes.
    assert listed(find_duplicates(paths, 3)) == [(0, 10, 0, 0, True), (1, 10, 0, 0, True)]


def test_equals_of_what_goes_name_what_stays(units) -> None:
    paths = units([[(1, 0b0), (2, 0b1), (2, 0b1), (3, 0b1)]])
    assert listed(find_duplicates(paths, 1)) == [(0, 10, 0, 0, True), (0, 20, 0, 0, False), (0, 30, 0, 0, True)]


def random_units(seed: int) -> list[list[Entry]]:
    random = np.random.default_rng(seed)
    looks = [int(look) for look in random.integers(0, 2**64, 60, dtype=np.uint64)]
    entries: list[Entry] = []
    for _ in range(500):
        look = looks[random.integers(len(looks))]
        for bit in random.integers(0, 64, random.integers(0, 5)):
            look ^= 1 << int(bit)
        content = xxhash.xxh3_128_intdigest(random.bytes(2)[:1] + bytes([random.integers(0, 2)]))
        entries.append((content, look if random.random() < 0.9 else None))
    by_content = dict(reversed(entries))  # equal bytes have an equal look
    entries = [(content, by_content[content]) for content, _ in entries]
    cuts = sorted(random.integers(0, 500, 6).tolist())
    return [entries[begin:end] for begin, end in zip([0, *cuts], [*cuts, 500], strict=True)]


def by_hand(contents: list[list[Entry]], distance: int | None) -> set[tuple[int, int]]:
    """What goes, by comparing each sample with all that are kept."""
    seen: set[int] = set()
    kept: list[int] = []
    gone = set()
    for unit, entries in enumerate(contents):
        for number, (content, look) in enumerate(entries):
            is_near = (
                distance is not None and look is not None and any((look ^ k).bit_count() <= distance for k in kept)
            )
            if content in seen or is_near:
                gone.add((unit, 10 * number))
            elif look is not None:
                kept.append(look)
            seen.add(content)
    return gone


@pytest.mark.parametrize("distance", [None, 0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("samples_at_once", [1000, 40])
def test_the_rule_holds_for_any_samples_however_they_are_split(units, distance, samples_at_once: int) -> None:
    contents = random_units(0)
    found = find_duplicates(units(contents), distance, samples_at_once=samples_at_once)
    assert {(unit, position) for unit, position, *_ in listed(found)} == by_hand(contents, distance)
    table = found.table
    assert np.all((table["of_unit"] < table["unit"]) | (table["of_position"] < table["position"]))
    gone = {(unit, position) for unit, position, *_ in listed(found)}
    for unit, position, of_unit, of_position, is_near in listed(found):
        assert (of_unit, of_position) not in gone, "what is named stays"
        content, look = contents[unit][position // 10]
        kept_content, kept_look = contents[of_unit][of_position // 10]
        if is_near:
            assert look is not None and kept_look is not None and distance is not None
            assert (look ^ kept_look).bit_count() <= distance
        elif distance is None:
            assert content == kept_content


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 6, 8])
def test_no_pair_of_bits_is_missed_by_the_tables(distance: int) -> None:
    random = np.random.default_rng(distance)
    for blocks in range(distance + 1, distance + 5):
        masks = block_masks(blocks, distance)
        flips = np.zeros(300, np.uint64)
        for _ in range(distance):
            flips |= np.uint64(1) << random.integers(0, 64, 300, dtype=np.uint64)
        assert np.all(np.any([flips & mask == 0 for mask in masks], axis=0))
    assert distance < choose_blocks(73_000_000, distance) <= distance + 8


def test_every_pair_comes_once_and_only_buckets_are_compared() -> None:
    random = np.random.default_rng(0)
    looks = np.unique(random.integers(0, 2**5, 200, dtype=np.uint64) << random.integers(0, 59, 200, dtype=np.uint64))
    expected = [
        late << 32 | early
        for late in range(len(looks))
        for early in range(late)
        if (int(looks[late]) ^ int(looks[early])).bit_count() <= 3
    ]
    assert near_pairs(looks, 3, 50).tolist() == expected and len(expected) > 1000
    mask = np.uint64(0xFFF0)
    compared = [
        (int(a), int(b))
        for one, other in bucket_pairs(looks, np.arange(len(looks), dtype=np.uint32), mask)
        for a, b in zip(one, other, strict=True)
    ]
    assert all((looks[a] ^ looks[b]) & mask == 0 for a, b in compared)
    assert len({frozenset(pair) for pair in compared}) == len(compared)


def test_parts_are_of_about_equal_size_whatever_the_mask_leaves() -> None:
    looks = np.arange(4000, dtype=np.uint64)
    parts = list(split(looks, np.uint64(0xFFFF), 500))
    assert len(parts) == 8 and max(map(len, parts)) < 600
    assert sorted(np.concatenate(parts).tolist()) == list(range(4000))


def test_chains_do_not_pull_in_what_is_far() -> None:
    chain = np.array([0b0, 0b1, 0b11, 0b111, 0b1111], np.uint64)
    dropped, kept = find_near(chain, 1, 100)
    assert list(zip(dropped.tolist(), kept.tolist(), strict=True)) == [(1, 0), (3, 2)]


def test_a_distance_that_cannot_be_is_refused(units, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = units([[(number, number) for number in range(40)]])
    for distance in (-1, 9):
        with pytest.raises(ValueError, match="choose 0 to 8"):
            find_duplicates(paths, distance)
    monkeypatch.setattr(near, "MAX_PAIRS", 100)
    with pytest.raises(ValueError, match="choose a smaller distance"):
        find_duplicates(paths, 6)


def test_a_damaged_file_is_named(units) -> None:
    paths = units([[(1, None)], [(2, None)]])
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"1\.fingerprints: damaged"):
        find_duplicates(paths)
