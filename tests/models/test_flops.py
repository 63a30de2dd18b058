"""The closed FLOP formulas against PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rae_scale.models.conditioner import Conditioner
from rae_scale.models.ddt import DDTHeadConfig
from rae_scale.models.decoder import ViTDecoder, ViTDecoderConfig
from rae_scale.models.dit import DiT, DiTConfig
from rae_scale.models.encoders.contrastive import ContrastiveModel, TextTowerConfig
from rae_scale.models.encoders.flux_vae import FLUX_CONFIG, FluxVAEEncoder
from rae_scale.models.encoders.siglip2 import Siglip2Encoder
from rae_scale.models.encoders.siglip_demo import SiglipDemoConfig, SiglipDemoEncoder
from rae_scale.models.encoders.webssl import WebSSLEncoder
from rae_scale.models.flops import (
    PEAK_BF16_FLOPS,
    contrastive_cost,
    decoder_cost,
    dit_cost,
    encoder_cost,
    linear,
    llm_cost,
    peak_flops,
)
from rae_scale.models.llm_zoo import LLMSpec

BATCH = 3


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    # Made of plain products: a fused backward computes the scores twice, and the counter counts them twice.
    with sdpa_kernel(SDPBackend.MATH):
        yield


def count(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def dit_inputs(cfg: DiTConfig) -> tuple[Tensor, Tensor, Tensor]:
    tokens = cfg.num_tokens
    x, y = torch.zeros(BATCH, tokens, cfg.in_channels), torch.zeros(BATCH, tokens, cfg.z_channels, requires_grad=True)
    return x, torch.zeros(BATCH), y


# 8 * 48 // 3 = 128: no padding, so that the counter sees the logical width.
DIT = DiTConfig(in_channels=16, hidden_size=48, depth=2, num_heads=4, z_channels=32, grid_size=4)
DDT = DiTConfig(
    in_channels=16, hidden_size=48, depth=2, num_heads=4, z_channels=32, grid_size=4, ddt=DDTHeadConfig(96, 2, 4)
)
DECODER = ViTDecoderConfig(
    in_channels=24, hidden_size=64, depth=2, num_heads=4, intermediate_size=96, patch_size=4, image_size=16
)


@pytest.mark.parametrize("cfg", [DIT, DDT], ids=["plain", "ddt"])
def test_dit(cfg: DiTConfig) -> None:
    model, inputs = DiT(cfg), dit_inputs(cfg)
    assert count(lambda: model.forward_tokens(*inputs)) == BATCH * dit_cost(cfg).forward
    trained = count(lambda: model.forward_tokens(*inputs).sum().backward())
    assert trained == pytest.approx(BATCH * dit_cost(cfg).training, rel=0.01)


def test_dit_padding_is_not_counted() -> None:
    cfg = DiTConfig(in_channels=16, hidden_size=60, depth=1, num_heads=5, z_channels=60, grid_size=4)
    padding = DiT(cfg).blocks[0].mlp.padded_size - 8 * 60 // 3
    assert padding > 0
    padded = count(lambda: DiT(cfg).forward_tokens(*dit_inputs(cfg)))
    assert padded == BATCH * (dit_cost(cfg) + linear(cfg.num_tokens, 60, 3 * padding)).forward


def test_decoder() -> None:
    model, latents = ViTDecoder(DECODER), torch.zeros(BATCH, 16, 24, requires_grad=True)
    assert count(lambda: model(latents)) == BATCH * decoder_cost(DECODER).forward
    assert count(lambda: model(latents).logits.sum().backward()) == BATCH * decoder_cost(DECODER).training


def siglip2() -> Siglip2Encoder:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    shape = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    return Siglip2Encoder(SiglipVisionModel(SiglipVisionConfig(**shape, image_size=32, patch_size=8)))


def webssl() -> WebSSLEncoder:
    from transformers import Dinov2Config, Dinov2Model

    shape = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4)
    return WebSSLEncoder(Dinov2Model(Dinov2Config(**shape, image_size=32, patch_size=8)), image_size=32)


def flux_vae() -> FluxVAEEncoder:
    diffusers = pytest.importorskip("diffusers")
    config = {**FLUX_CONFIG, "block_out_channels": (8, 16, 32, 32), "norm_num_groups": 4}
    return FluxVAEEncoder(diffusers.AutoencoderKL(**config), image_size=64)


def siglip_demo() -> SiglipDemoEncoder:
    return SiglipDemoEncoder(SiglipDemoConfig(image_size=32, patch_size=8, channels=16, hidden_size=48))


@pytest.mark.parametrize("build", [siglip2, webssl, flux_vae, siglip_demo])
def test_encoder(build: Callable[[], nn.Module]) -> None:
    encoder = build()
    pixels = torch.zeros(BATCH, 3, encoder.image_size, encoder.image_size)
    with torch.no_grad():
        assert count(lambda: encoder(pixels)) == BATCH * encoder_cost(encoder).forward


def test_an_encoder_without_a_formula_is_named() -> None:
    with pytest.raises(ValueError, match="SimpleNamespace: no FLOP formula"):
        encoder_cost(SimpleNamespace(num_tokens=4))


def test_contrastive_model() -> None:
    model = ContrastiveModel(siglip_demo(), TextTowerConfig(vocab_size=100))
    ids, mask = torch.ones(BATCH, 7, dtype=torch.int64), torch.ones(BATCH, 7, dtype=torch.int64)
    pixels = torch.zeros(BATCH, 3, 32, 32)
    assert count(lambda: model(pixels, ids, mask)) == BATCH * contrastive_cost(model, caption_tokens=7).forward


@pytest.mark.parametrize("trained", [True, False])
def test_language_model(trained: bool) -> None:
    from transformers import Qwen2ForCausalLM

    config = LLMSpec(48, 2, 4, 2, 96, 320, tie_word_embeddings=False).to_qwen2()
    llm = Qwen2ForCausalLM(config).requires_grad_(trained)
    model = Conditioner(llm, num_queries=4, user_channels=16)
    embeds = torch.zeros(BATCH, 11, 48, requires_grad=True)
    labelled = 5

    def forward() -> Tensor:
        mask = torch.ones(BATCH, 1, 11, 11, dtype=torch.bool)
        hidden = model.llm.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        return model.llm.lm_head(hidden.flatten(0, 1)[:labelled])

    cost = llm_cost(config, BATCH * 11, BATCH * 11**2, labelled)
    assert count(forward) == pytest.approx(cost.forward, rel=0.01)  # the counter also sees RoPE's outer product
    trained_flops = cost.training if trained else cost.frozen_training
    assert count(lambda: forward().sum().backward()) == pytest.approx(trained_flops, rel=0.01)


def test_only_gpus_known_by_name_have_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in {"NVIDIA H200": PEAK_BF16_FLOPS["NVIDIA H200"], "NVIDIA H200 NVL": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak
