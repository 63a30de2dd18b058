"""Decoder config.json files of the RAE release and of diffusers, and ours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rae_scale.config import parse_config
from rae_scale.convert.decoder_files import (
    decoder_settings,
    from_diffusers_config,
    from_rae_config,
    to_diffusers_config,
    to_rae_config,
)
from rae_scale.models.zoo import DECODER_ZOO

XL = DECODER_ZOO["vit-xl"]
WEBSSL = replace(XL, in_channels=1024, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))


@pytest.mark.parametrize("cfg", [XL, WEBSSL, DECODER_ZOO["vit-tiny"], replace(XL, layer_norm_eps=1e-6)])
def test_there_and_back_in_the_releases_words(cfg: Any) -> None:
    assert from_rae_config(to_rae_config(cfg)) == cfg


@pytest.mark.parametrize("cfg", [XL, WEBSSL])
def test_a_released_config_gets_its_encoders_pixel_statistics(cfg: Any) -> None:
    released = {name: value for name, value in to_rae_config(cfg).items() if not name.startswith("image_m")}
    assert from_rae_config(released) == cfg


@pytest.mark.parametrize("cfg", [XL, WEBSSL, DECODER_ZOO["vit-b"]])
def test_there_and_back_in_diffusers_words(cfg: Any) -> None:
    assert from_diffusers_config(to_diffusers_config(cfg)) == cfg


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (DECODER_ZOO["vit-tiny"], r"4 x 4 tokens: diffusers .* wrong positions; use --to official-decoder"),
        (replace(XL, layer_norm_eps=1e-6), "layer_norm_eps=1e-06"),
        (replace(XL, in_channels=100), "multiples of 64"),
    ],
)
def test_what_diffusers_would_decode_otherwise_is_refused(cfg: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_diffusers_config(cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": [0.1]}, "latents_mean is set"),
        ({"scaling_factor": 0.5}, "scaling_factor is set"),
        ({"_class_name": "AutoencoderKL"}, "'AutoencoderKL'"),
        ({"encoder_patch_size": 16}, "14 x 14 tokens"),
    ],
)
def test_another_autoencoder_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_diffusers_config(to_diffusers_config(XL) | changes)
    config = to_diffusers_config(XL)
    del config["patch_size"]
    with pytest.raises(ValueError, match="no 'patch_size'"):
        from_diffusers_config(config)


@pytest.mark.parametrize(
    ("cfg", "names"),
    [
        (XL, ("vit-xl", "siglip2-so400m")),
        (WEBSSL, ("vit-xl", "webssl-l")),
        (DECODER_ZOO["vit-tiny"], ("vit-tiny", "siglip-demo")),
    ],
)
def test_a_decoder_is_found_by_its_sizes(cfg: Any, names: tuple[str, str]) -> None:
    config = parse_config(decoder_settings(cfg))
    assert (config.model.decoder.name, config.model.encoder.name) == names
    assert config.stage == "decoder"


@pytest.mark.parametrize(
    ("cfg", "message"),
    [(replace(XL, depth=27), "no named decoder has .*depth=27"), (replace(XL, in_channels=768), "768 channels")],
)
def test_a_decoder_without_a_name_is_refused(cfg: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_settings(cfg)
