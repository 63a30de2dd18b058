"""How far kept latents are from those that were given."""

from __future__ import annotations

import pytest
import torch

from rae_scale.data.latents import LatentDtype, Latents, dequantise, quantise, sample_bytes


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    """Normalised tokens, as encoders give them, some with a channel that stands out."""
    values = torch.randn(8, 16, 96, generator=torch.Generator().manual_seed(0))
    values[:, ::3, 5] *= 12
    return torch.nn.functional.layer_norm(values, values.shape[-1:])


def test_bf16_is_off_by_half_its_last_bit(latents: torch.Tensor) -> None:
    back = dequantise(*quantise(latents, "bf16"))
    assert ((back - latents).abs() <= latents.abs() * 2**-8).all()
    assert torch.equal(dequantise(*quantise(back, "bf16")), back)


def test_int8_is_off_by_half_a_step_of_its_token(latents: torch.Tensor) -> None:
    kept = quantise(latents, "int8")
    assert kept.scales is not None and kept.scales.shape == latents.shape[:-1]
    largest = latents.abs().amax(dim=-1, keepdim=True)
    back = dequantise(*kept)
    assert ((back - latents).abs() <= largest * (1 / 254 + 1e-6)).all()
    assert (back.abs().amax(dim=-1, keepdim=True) - largest).abs().max() < 1e-5, "the largest itself is kept"


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_each_token_is_rounded_by_itself(latents: torch.Tensor, dtype: LatentDtype) -> None:
    whole, alone = quantise(latents, dtype), quantise(latents[3, 4:6], dtype)
    assert torch.equal(whole.values[3, 4:6], alone.values)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_zeros_stay_zeros(dtype: LatentDtype) -> None:
    assert not dequantise(*quantise(torch.zeros(2, 3, 4), dtype)).any()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_the_bytes_are_those_of_the_tensors(latents: torch.Tensor, dtype: LatentDtype) -> None:
    kept: Latents = quantise(latents[0], dtype)
    assert sample_bytes(16, 96, dtype) == sum(tensor.nbytes for tensor in kept if tensor is not None)
