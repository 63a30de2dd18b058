from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rae_scale.models import ViTDecoder, ViTDecoderConfig, from_official
from rae_scale.models.decoder import unpatchify

CONFIG = ViTDecoderConfig(
    in_channels=6, hidden_size=16, depth=1, num_heads=2, intermediate_size=24, patch_size=4, image_size=12
)


def test_patches_and_image_equal_the_published_module(golden) -> None:
    reference = golden("decoder_tiny")
    decoder = from_official(reference.part("state."), reference.config)
    out = decoder(reference["in.z"])
    torch.testing.assert_close(out.logits, reference["out.logits"], atol=2e-5, rtol=0)
    expected = reference["out.image_before_denormalise"]
    torch.testing.assert_close(out.image_before_denormalise, expected, atol=2e-5, rtol=0)


def test_unpatchify_lays_tokens_and_pixels_out_row_by_row() -> None:
    patches = torch.arange(4 * 2 * 2 * 3).view(1, 4, 12)
    image = unpatchify(patches, patch_size=2)
    assert image.shape == (1, 3, 4, 4)
    token, row, column, colour = 2, 1, 0, 2  # token 2 is the lower left one
    assert image[0, colour, 2 + row, column] == patches[0, token, (row * 2 + column) * 3 + colour]


def test_decode_denormalises_and_clamps() -> None:
    torch.manual_seed(0)
    decoder = ViTDecoder(replace(CONFIG, image_mean=(0.2, 0.4, 0.6), image_std=(0.3, 0.3, 4.0)))
    torch.nn.init.normal_(decoder.pred.weight)
    z = torch.randn(2, 9, 6)
    pixels, raw = decoder.decode(z), decoder(z).image_before_denormalise
    assert pixels.shape == (2, 3, 12, 12)
    torch.testing.assert_close(pixels[:, 1], (raw[:, 1] * 0.3 + 0.4).clamp(0, 1))
    assert pixels[:, 2].min() == 0
    assert pixels[:, 2].max() == 1


def test_every_token_is_decoded_in_its_own_place_with_the_others_in_view() -> None:
    torch.manual_seed(0)
    decoder = ViTDecoder(CONFIG)
    z = torch.randn(1, 9, 6)
    order = torch.randperm(9)
    assert not torch.allclose(decoder(z).logits[:, order], decoder(z[:, order]).logits, atol=1e-4)
    changed = z.clone()
    changed[0, 0] += 1
    assert (decoder(changed).logits - decoder(z).logits).abs().amax(dim=-1).min() > 0


def test_a_decoder_built_on_the_meta_device_is_completed_by_init_weights() -> None:
    with torch.device("meta"):
        decoder = ViTDecoder(CONFIG)
    decoder.to_empty(device="cpu")
    decoder.init_weights()
    for (name, buffer), other in zip(decoder.named_buffers(), ViTDecoder(CONFIG).buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert set(decoder.state_dict()) == {name for name, _ in decoder.named_parameters()}


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 9, 8)])
def test_latents_of_another_shape_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"the decoder was built for \[9, 6\]"):
        ViTDecoder(CONFIG)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "ViT decoder: hidden_size=16 does not divide by num_heads=3"),
        ({"image_size": 14}, "image_size=14 does not divide by patch_size=4; choose 12"),
        ({"hidden_size": 18}, "hidden_size=18 does not divide by 4.*choose 20"),
    ],
)
def test_dimensions_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
