from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rae_scale.config.schema import EncoderConfig
from rae_scale.models.decoder import unpatchify
from rae_scale.models.encoders import ENCODERS, build_encoder
from rae_scale.models.encoders.contrastive import (
    ContrastiveModel,
    ContrastiveOutput,
    TextTowerConfig,
    dense_loss,
    same_caption,
    sigmoid_loss,
)
from rae_scale.models.encoders.flux_vae import FluxVAEEncoder, load_flux_vae, pack, unpack
from rae_scale.models.encoders.siglip2 import Siglip2Encoder, load_siglip2
from rae_scale.models.encoders.siglip_demo import SiglipDemoConfig, SiglipDemoEncoder, load_siglip_demo, patchify
from rae_scale.models.encoders.webssl import WebSSLEncoder, load_webssl

SMALL = SiglipDemoConfig(
    image_size=16,
    patch_size=8,
    channels=6,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
)


def pixels(size: int, count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def small_siglip() -> torch.nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = SiglipVisionModel(config)
    randomise_norms(model)
    return model.eval()


def small_dinov2() -> torch.nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=70, patch_size=14
    )
    model = Dinov2Model(config)
    randomise_norms(model)
    return model.eval()


def small_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=3,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def randomise_norms(model: torch.nn.Module) -> None:
    """A norm with weight 1 and bias 0 would not show whether it was applied."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)


def test_siglip2_takes_the_state_before_the_final_norm_and_normalises_it() -> None:
    model = small_siglip()
    seen = []
    transformer = getattr(model, "vision_model", model)
    transformer.post_layernorm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    encoder, images = Siglip2Encoder(model), pixels(28)
    with torch.no_grad():
        latents = encoder(images)
        assert seen == []
        model(pixel_values=(images - 0.5) / 0.5)
    assert (encoder.image_size, encoder.num_tokens, encoder.channels) == (28, 4, 24)
    torch.testing.assert_close(latents, F.layer_norm(seen[0], (24,), eps=1e-6))


def test_webssl_keeps_the_final_norm_and_drops_the_class_token() -> None:
    model = small_dinov2()
    encoder, images = WebSSLEncoder(model, image_size=28), pixels(28)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model(pixel_values=(images - mean[:, None, None]) / std[:, None, None]).last_hidden_state
        latents = encoder(images)
    assert (encoder.image_size, encoder.num_tokens, encoder.channels) == (28, 4, 24)
    torch.testing.assert_close(latents, expected[:, 1:])


def test_vae_latents_are_shifted_scaled_and_packed() -> None:
    model = small_vae()
    encoder, images = FluxVAEEncoder(model, image_size=16), pixels(16)
    noise = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = model.encode(2 * images - 1).latent_dist
        mode, sampled = encoder(images), encoder(images, noise)
    assert (encoder.image_size, encoder.num_tokens, encoder.channels) == (16, 16, 12)
    expected = (posterior.mean - 0.1159) * 0.3611
    # Token 1 is the second 2 x 2 patch of the first row of patches; its entries run over channel, row, column.
    torch.testing.assert_close(mode[:, 1], expected[:, :, 0:2, 2:4].flatten(1))
    torch.testing.assert_close(unpack(mode), expected)
    torch.testing.assert_close(sampled - mode, pack(posterior.std) * noise * 0.3611)


def test_vae_decodes_its_own_latents() -> None:
    model = small_vae()
    encoder, images = FluxVAEEncoder(model, image_size=16), pixels(16)
    with torch.no_grad():
        decoded = encoder.decode(encoder(images))
        expected = model.decode(model.encode(2 * images - 1).latent_dist.mean).sample
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_vae_packing_matches_the_flux_layout() -> None:
    z = torch.randn(2, 3, 4, 6)
    flux = z.view(2, 3, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, 12)
    assert torch.equal(pack(z), flux)
    square = torch.randn(2, 3, 4, 4)
    assert torch.equal(unpack(pack(square)), square)


@pytest.mark.parametrize(
    ("load", "make", "wrap"),
    [
        (load_siglip2, small_siglip, Siglip2Encoder),
        (load_webssl, small_dinov2, lambda model: WebSSLEncoder(model, 224)),
        (load_flux_vae, small_vae, FluxVAEEncoder),
    ],
)
def test_loads_from_a_folder(tmp_path: Path, load, make, wrap) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    loaded, expected = load(str(tmp_path)), wrap(model)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_vae_loads_from_a_flux_repository(tmp_path: Path) -> None:
    small_vae().save_pretrained(tmp_path / "vae")
    assert load_flux_vae(str(tmp_path)).channels == 12


def test_siglip2_loads_from_the_two_tower_checkpoint(tmp_path: Path) -> None:
    """The published weights hold a text tower too."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 28, "patch_size": 14}
    text |= {"vocab_size": 30, "projection_size": 24, "bos_token_id": 1, "eos_token_id": 2}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path)
    loaded = load_siglip2(str(tmp_path))
    weight = model.state_dict()["vision_model.encoder.layers.0.mlp.fc1.weight"]
    assert torch.equal(loaded.transformer.layers[0].mlp.fc1.weight, weight)


def test_siglip2_refuses_other_weights(tmp_path: Path) -> None:
    small_dinov2().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.encoder\.path=.*lack"):
        load_siglip2(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "image_size", "num_tokens", "channels"),
    [
        ("siglip2-so400m", 224, 256, 1152),
        ("webssl-l", 224, 256, 1024),
        ("flux-vae", 256, 256, 64),
        ("siglip-demo", 64, 16, 64),
    ],
)
def test_named_encoders_have_the_published_latents(name: str, image_size: int, num_tokens: int, channels: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(name=name))
        latents = encoder(torch.empty(2, 3, image_size, image_size))
    assert latents.shape == (2, num_tokens, channels)
    assert (encoder.image_size, encoder.num_tokens, encoder.channels) == (image_size, num_tokens, channels)
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_so400m_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(name="siglip2-so400m"))
    block = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    expected = 27 * block + 3 * 14 * 14 * 1152 + 1152 + 256 * 1152
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected


def test_unknown_name_and_wrong_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.encoder\.name='clip' .*siglip-demo"):
        build_encoder(EncoderConfig(name="clip"))
    with pytest.raises(ValueError, match=r"takes pixels \[B, 3, 16, 16\], got \[2, 3, 28, 28\]"):
        SiglipDemoEncoder(SMALL)(pixels(28))
    assert set(ENCODERS) == {"siglip2-so400m", "webssl-l", "flux-vae", "siglip-demo"}


def test_demo_latents_are_normalised_per_token_under_autocast_too() -> None:
    encoder = SiglipDemoEncoder(SMALL)
    plain = encoder(pixels(16))
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(pixels(16))
    for latents in (plain, half):
        assert latents.dtype == torch.float32
        torch.testing.assert_close(latents.mean(-1), torch.zeros(2, 4), rtol=0, atol=1e-2)
        torch.testing.assert_close(latents.var(-1, correction=0), torch.ones(2, 4), rtol=0, atol=1e-2)
    torch.testing.assert_close(plain.mean(-1), torch.zeros(2, 4), rtol=0, atol=1e-6)


def test_demo_sees_where_a_patch_stands() -> None:
    encoder = SiglipDemoEncoder(SMALL)
    image = pixels(16, count=1)
    moved = image.roll(8, dims=3)
    with torch.no_grad():
        assert not torch.allclose(encoder(image)[0, [1, 0, 3, 2]], encoder(moved)[0], atol=1e-3)


def test_patchify_is_the_decoders_inverse() -> None:
    images = pixels(16)
    assert torch.equal(unpatchify(patchify(images, 8), 8), images)


def test_demo_saves_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = SiglipDemoEncoder(SMALL)
    encoder.save_pretrained(tmp_path / "encoder")
    loaded = build_encoder(EncoderConfig(name="siglip-demo", path=str(tmp_path / "encoder")))
    assert torch.equal(loaded(pixels(16)), encoder(pixels(16)))


def test_demo_names_the_folder_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.encoder\.path=.*No such file"):
        load_siglip_demo(str(tmp_path))
    SiglipDemoEncoder(SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "channels": 7}))
    with pytest.raises(ValueError, match=r"(?s)model\.encoder\.path=.*to_latent"):
        load_siglip_demo(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "depth": 7}))
    with pytest.raises(ValueError, match=r"model\.encoder\.path=.*depth"):
        load_siglip_demo(str(tmp_path))


def test_demo_config_errors_name_the_numbers() -> None:
    with pytest.raises(ValueError, match="image_size=64 does not divide by patch_size=24"):
        SiglipDemoConfig(image_size=64, patch_size=24)
    with pytest.raises(ValueError, match="hidden_size=192 does not divide by num_heads=5"):
        SiglipDemoConfig(hidden_size=192, num_attention_heads=5)


def small_contrastive() -> ContrastiveModel:
    torch.manual_seed(0)
    text = TextTowerConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_attention_heads=2, max_length=6, embed_size=8
    )
    return ContrastiveModel(SiglipDemoEncoder(SMALL), text)


CAPTIONS = torch.tensor([[3, 4, 5, 0], [6, 7, 0, 0], [3, 4, 5, 0]])
CAPTION_MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]])


def test_contrastive_output_shapes_and_initial_temperature() -> None:
    out = small_contrastive()(pixels(16, count=3), CAPTIONS, CAPTION_MASK)
    for embed in (out.image_embed, out.text_embed):
        torch.testing.assert_close(embed.norm(dim=-1), torch.ones(3))
    assert out.image_embed.shape == (3, 8)
    assert out.dense_pixels.shape == (3, 4, 3 * 8 * 8)
    torch.testing.assert_close(out.logit_scale, torch.tensor([10.0]))
    torch.testing.assert_close(out.logit_bias, torch.tensor([-10.0]))


def test_text_tower_ignores_padding_and_minds_the_order() -> None:
    tower = small_contrastive().text
    with torch.no_grad():
        embeds = tower(CAPTIONS, CAPTION_MASK)
        longer = tower(F.pad(CAPTIONS, (0, 2), value=9), F.pad(CAPTION_MASK, (0, 2)))
        swapped = tower(CAPTIONS[:, [1, 0, 2, 3]], CAPTION_MASK)
    torch.testing.assert_close(embeds, longer, rtol=0, atol=1e-6)
    assert not torch.allclose(embeds[0], swapped[0], atol=1e-4)


def test_sigmoid_loss_by_hand() -> None:
    out = ContrastiveOutput(
        image_embed=torch.tensor([[1.0, 0.0], [0.6, 0.8]]),
        text_embed=torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        logit_scale=torch.tensor([2.0]),
        logit_bias=torch.tensor([-1.0]),
        dense_pixels=torch.empty(0),
    )
    logits = torch.tensor([[-1.0, 1.0], [0.6, 0.2]])
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    expected = torch.log1p(torch.exp(-signs * logits)).sum(dim=1)
    torch.testing.assert_close(sigmoid_loss(out, torch.eye(2, dtype=torch.bool)), expected)


def test_repeated_captions_are_positives() -> None:
    expected = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    assert torch.equal(same_caption(CAPTIONS), expected)


def test_dense_loss_is_zero_for_the_right_pixels_only() -> None:
    images = pixels(16)
    out = ContrastiveOutput(*[torch.empty(0)] * 4, dense_pixels=patchify(images, 8))
    assert torch.equal(dense_loss(out, images), torch.zeros(2))
    torch.testing.assert_close(dense_loss(out, images + 0.25), torch.full((2,), 0.25**2))


def test_a_few_steps_lower_both_losses_and_reach_every_parameter() -> None:
    model, images = small_contrastive(), pixels(16, count=3)
    images[2] = images[0]
    positives = same_caption(CAPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for _ in range(20):
        out = model(images, CAPTIONS, CAPTION_MASK)
        losses = torch.stack([sigmoid_loss(out, positives).mean(), dense_loss(out, images).mean()])
        history.append(losses.detach())
        optimizer.zero_grad()
        losses.sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        optimizer.step()
    assert (history[-1] < 0.9 * history[0]).all()
