"""Philox against the generator's published answers, against big-integer arithmetic, and as a source of noise."""

from __future__ import annotations

import math

import pytest
import torch

from rae_kernels import philox_normal, philox_uniform
from rae_kernels.philox import box_muller, philox_4x32, philox_words

MASK32 = 0xFFFFFFFF


def philox_reference(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers, as the paper writes it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right & MASK32, (left >> 32) ^ c[3] ^ k[1], left & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c


@pytest.mark.parametrize(
    ("counter", "seed", "answer"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK32] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(counter, seed, answer):
    words = philox_4x32(*(torch.tensor([c]) for c in counter), seed)
    assert [int(word) for word in words] == answer
    assert philox_reference(counter, [seed & MASK32, seed >> 32]) == answer


@pytest.mark.parametrize(
    ("seed", "step", "sample", "stream"),
    [
        (0, 0, 0, 0),
        (1234567, 30_000, 2**32 + 17, 3),
        (2**64 - 1, 2**32 - 1, 2**48 - 1, 2**16 - 1),
        (2**63 + 5, 2**31, 2**40, 2**15),
    ],
)
def test_counter_layout_is_the_documented_one(seed, step, sample, stream):
    words = philox_words(seed, step, torch.tensor([sample]), num_groups=5, stream=stream)
    for group in range(5):
        counter = [group, sample & MASK32, (sample >> 32) | (stream << 16), step]
        assert words[0, group].tolist() == philox_reference(counter, [seed & MASK32, seed >> 32])


def test_every_field_separates_the_numbers():
    base = {"seed": 3, "step": 5, "sample": 7, "stream": 1}
    changes = [{}, {"seed": 3 + 2**32}, {"seed": 4}, {"step": 6}, {"sample": 7 + 2**32}, {"sample": 7 + 2**40}]
    changes += [{"sample": 8}, {"stream": 2}, {"step": 1, "stream": 5}]
    drawn = set()
    for change in changes:
        field = base | change
        words = philox_words(field["seed"], field["step"], torch.tensor([field["sample"]]), 2, field["stream"])
        drawn |= {tuple(group) for group in words[0].tolist()}
    assert len(drawn) == 2 * len(changes)


def test_a_sample_is_the_same_in_any_batch_and_shape():
    index = torch.tensor([11, 2**40, 0, 12])
    batch = philox_normal(9, 4, index, (3, 5), stream=1)
    assert batch.shape == (4, 3, 5)
    for row, sample in enumerate(index):
        alone = philox_normal(9, 4, sample[None], (15,), stream=1)
        assert torch.equal(batch[row].flatten(), alone[0])
    longer = philox_normal(9, 4, index, (40,), stream=1)
    assert torch.equal(longer[:, :15], batch.flatten(1))


def test_scalars_per_sample():
    assert philox_uniform(0, 0, torch.arange(6), (), stream=2).shape == (6,)


def test_uniform_numbers_fill_the_half_open_interval():
    u = philox_uniform(1, 0, torch.arange(50), (2000,), stream=0)
    assert u.dtype == torch.float32
    assert 0.0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1.0
    counts = torch.histc(u, bins=20, min=0, max=1)
    expected = u.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


def test_normal_numbers_have_the_moments_of_a_normal():
    x = philox_normal(1, 0, torch.arange(50), (4000,), stream=0).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # Neighbours within a group share one Box-Muller radius; they must be uncorrelated all the same.
    for lag in (1, 2, 3, 4):
        assert abs((x[:, lag:] * x[:, :-lag]).mean()) < 4 / math.sqrt(n)
    assert abs((x[1:] * x[:-1]).mean()) < 4 / math.sqrt(n)


def test_the_smallest_uniform_number_makes_a_finite_normal():
    """Two words in 2**32 map to exactly 0, whose logarithm is infinite."""
    torch.testing.assert_close(box_muller(torch.zeros(1, 4)), torch.tensor([[5.67769, 0.0, 5.67769, 0.0]]))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((-1, 0, 0), "seed"), ((2**64, 0, 0), "seed"), ((0, 2**32, 0), "step"), ((0, 0, -1), "stream")],
)
def test_fields_out_of_range_are_named(arguments, name):
    seed, step, stream = arguments
    with pytest.raises(ValueError, match=name):
        philox_normal(seed, step, torch.arange(2), (4,), stream)


@pytest.mark.parametrize("sample_index", [torch.arange(3, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int64)])
def test_sample_index_must_be_int64_of_one_axis(sample_index):
    with pytest.raises(ValueError, match=r"int64 \[B\]"):
        philox_uniform(0, 0, sample_index, (4,), 0)
