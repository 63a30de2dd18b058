"""Noise, time and dropout belong to a sample: not to a batch, and not to each other."""

from __future__ import annotations

import torch

from rae_scale import ops
from rae_scale.flow import Stream, drop_mask, sampling_noise

INDEX = torch.arange(1000, 1064)


def test_stream_numbers_are_fixed():
    """Runs are reproducible only as long as these values stay."""
    assert {stream.name: int(stream) for stream in Stream} == {"NOISE": 0, "TIME": 1, "DROP": 2, "SAMPLER": 3}


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    whole = sampling_noise(3, INDEX, (16, 8))
    assert whole.shape == (64, 16, 8) and whole.dtype == torch.float32
    parts = [sampling_noise(3, part, (16, 8)) for part in INDEX.split([1, 13, 50])]
    assert torch.equal(whole, torch.cat(parts))


def test_noise_changes_with_seed_and_sample():
    base = sampling_noise(3, INDEX, (8,))
    for other in (sampling_noise(4, INDEX, (8,)), base.roll(1, dims=0)):
        assert not (base == other).any()


def test_each_use_has_its_own_stream():
    uniforms = {stream: ops.philox_uniform(3, 0, INDEX, (), stream) for stream in Stream}
    assert torch.equal(sampling_noise(3, INDEX, (4,)), ops.philox_normal(3, 0, INDEX, (4,), Stream.SAMPLER))
    assert torch.equal(drop_mask(3, 0, INDEX, 0.5), uniforms[Stream.DROP] < 0.5)
    assert len({tuple(u.tolist()) for u in uniforms.values()}) == len(Stream)


def test_drop_mask_drops_the_given_fraction():
    index = torch.arange(20_000)
    mask = drop_mask(0, 5, index, 0.1)
    assert mask.dtype == torch.bool and mask.shape == index.shape
    assert abs(mask.float().mean() - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5
    assert not drop_mask(0, 5, index, 0.0).any()
    assert drop_mask(0, 5, index, 1.0).all()
    assert not torch.equal(mask, drop_mask(0, 6, index, 0.1))
