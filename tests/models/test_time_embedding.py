from __future__ import annotations

import math

import pytest
import torch

from rae_scale.models.time_embedding import TimeEmbedding, fourier_frequencies


def test_frequencies_are_those_of_the_official_release() -> None:
    frequencies = fourier_frequencies()
    expected = torch.tensor([0.164998, -0.428739, -0.0242669, 0.149424])
    torch.testing.assert_close(frequencies[:4], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(frequencies[254:], torch.tensor([-0.787297, -0.199504]), atol=1e-6, rtol=0)
    assert frequencies.sum().item() == pytest.approx(-12.88859, abs=1e-4)


def test_drawing_the_frequencies_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fourier_frequencies()
    assert torch.equal(before, torch.get_rng_state())


def test_features_are_the_sines_and_then_the_cosines() -> None:
    embedding = TimeEmbedding(8)
    embedding.mlp = torch.nn.Identity()
    t = torch.tensor([0.0, 0.25])
    angles = 2 * math.pi * t[:, None] * fourier_frequencies()
    torch.testing.assert_close(embedding(t), torch.cat([angles.sin(), angles.cos()], dim=-1))


def test_result_is_float32_and_unchanged_under_autocast() -> None:
    torch.manual_seed(0)
    embedding, t = TimeEmbedding(16), torch.rand(5)
    expected = embedding(t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedding(t.bfloat16().float()), embedding(t.bfloat16()))
        result = embedding(t)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_frequencies_are_not_in_the_state_dict() -> None:
    assert set(TimeEmbedding(8).state_dict()) == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}
