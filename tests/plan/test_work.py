"""Planned FLOPs against PyTorch's own counter, on whole training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from known import nothing_new
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rae_scale.config import Config
from rae_scale.config.schema import EncoderConfig, EngineConfig, FlowConfig, LLMConfig, LossConfig, ModelConfig
from rae_scale.data.collate import Batch
from rae_scale.models import llm_zoo, zoo
from rae_scale.models.composite import build_scale_rae
from rae_scale.models.ddt import DDTHeadConfig
from rae_scale.models.dit import DiTConfig
from rae_scale.models.encoders import ENCODERS
from rae_scale.models.encoders.siglip_demo import SiglipDemoConfig, SiglipDemoEncoder
from rae_scale.models.flops import contrastive_cost, encoder_cost
from rae_scale.models.llm_zoo import LLMSpec
from rae_scale.parallel.checkpointing import apply_activation_checkpointing
from rae_scale.plan.encoders import encoder_shape
from rae_scale.plan.samples import Samples, usual_samples
from rae_scale.plan.work import Work, plan_work
from rae_scale.train.stages import DecoderStage, EncoderStage, GenerationStage, Stage

BATCH, LENGTH, SLOTS = 3, 30, 16
DIT = DiTConfig(in_channels=13, hidden_size=80, depth=2, num_heads=4, z_channels=72, grid_size=4, qk_norm=True)
LLM = LLMSpec(48, 2, 4, 2, 72, 211, tie_word_embeddings=True)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModelConfig:
    """Widths that SwiGLU pads, fewer heads of keys than of queries, and a wide head on the second DiT."""
    monkeypatch.setitem(zoo.DIT_ZOO, "dit-awkward", DIT)
    monkeypatch.setitem(zoo.DIT_ZOO, "dit-awkward-ddt", replace(DIT, ddt=DDTHeadConfig(176, 1, 4)))
    monkeypatch.setitem(llm_zoo.LLM_ZOO, "qwen2-awkward", LLM)
    SiglipDemoEncoder(SiglipDemoConfig(image_size=32, patch_size=8, channels=13, hidden_size=48)).save_pretrained(
        tmp_path / "encoder"
    )
    return ModelConfig(
        name="dit-awkward",
        llm=LLMConfig(name="qwen2-awkward"),
        encoder=EncoderConfig(name="siglip-demo", path=str(tmp_path / "encoder")),
    )


@pytest.fixture(autouse=True)
def plain_attention() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


def count(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def batch_of(kinds: str, labelled: int) -> Batch:
    """Samples of equal length. kinds: per sample, g generates its image, u reads it."""
    ids = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    labels[:, 1 : labelled + 1] = 1
    place = torch.tensor([SLOTS - 4] * BATCH)
    answers = torch.tensor([kind == "g" for kind in kinds])
    return Batch(
        input_ids=ids,
        labels=labels,
        attention_mask=torch.ones_like(ids),
        answer_start=torch.where(answers, place, -1),
        user_start=torch.where(answers, -1, place),
        pixels=torch.randint(256, (BATCH, 32, 32, 3), dtype=torch.uint8),
        has_image=torch.ones(BATCH, dtype=torch.bool),
        sample_index=torch.arange(BATCH),
        sample_ids=[str(row) for row in range(BATCH)],
        captions=[""] * BATCH,
    )


def step(stage: Stage, batch: Batch) -> None:
    with torch.no_grad():
        inputs = stage.prepare(batch, 0)
    stage.loss(stage.module, inputs, stage.counts(batch)).loss.backward()


def generation_stage(config: Config) -> GenerationStage:
    from rae_scale.models.encoders import build_encoder

    encoder = build_encoder(config.model.encoder)
    stage = GenerationStage(build_scale_rae(config.model, 13, SLOTS, None), encoder, FlowConfig(), seed=0)
    engine = config.engine
    apply_activation_checkpointing(stage.module, engine.activation_checkpointing, engine.saved_ops)
    return stage


def check_step(config: Config, kinds: str = "ggg") -> Work:
    """What one step of the real stage computes is planned to the last operation, and so are its model FLOPs."""
    stage, batch = generation_stage(config), batch_of(kinds, labelled=5)
    samples = Samples(LENGTH, 5, answers=kinds.count("g") / BATCH)
    work = plan_work(config, samples, micro_batch=BATCH, attention_kind="plain")
    assert count(lambda: step(stage, batch)) == round(BATCH * work.hardware)
    assert stage.flops(batch) == pytest.approx(BATCH * work.model, rel=1e-12)
    return work


@pytest.mark.parametrize("name", ["dit-awkward", "dit-awkward-ddt"])
@pytest.mark.parametrize("trains", [True, False])
def test_training_step(model: ModelConfig, name: str, trains: bool) -> None:
    llm = model.llm.model_copy(update={"train": trains, "connector": "mlp" if trains else "linear"})
    config = Config(model=model.model_copy(update={"name": name, "llm": llm}))
    check_step(config, "gug" if trains else "ggg")


def test_work_computed_again(model: ModelConfig) -> None:
    """Full: every block but the last product of the language model's. Selective: what the budget does not keep. Plain
    attention is two more products in the order of calls, so here the budget keeps none or all."""
    plain = check_step(Config(model=model))
    full = check_step(Config(model=model, engine=EngineConfig(activation_checkpointing="full")))
    assert full.model == plain.model
    assert full.hardware > 1.25 * plain.hardware
    keep = EngineConfig(activation_checkpointing="selective", saved_ops={"linear": -1, "attention": -1})
    assert check_step(Config(model=model, engine=keep)).hardware == plain.hardware


def test_selective_budget_keeps_the_first_products(model: ModelConfig) -> None:
    """By default of a DiT block adaLN, qkv and proj; of the language model's q, k and v."""
    engine = EngineConfig(activation_checkpointing="selective")
    work = plan_work(Config(model=model, engine=engine), Samples(LENGTH, 5)).parts
    inner = DIT.padded_inner_size
    assert work["DiT"].recomputed.products == 2 * DIT.depth * 16 * 3 * 80 * inner
    assert work["language model"].recomputed.products == 2 * LLM.num_hidden_layers * LENGTH * (48 * 48 + 2 * 48 * 72)
    assert work["DiT"].recomputed.attention == 0


def test_logits_in_chunks_are_computed_twice(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["rae_kernels.linear_cross_entropy"], "LOGITS_BYTES", 7 * 211 * 4)
    work = check_step(Config(model=model))
    assert work.parts["language model"].recomputed.products == 2 * 5 * 48 * 211


def test_fused_attention_computes_scores_once_more(model: ModelConfig) -> None:
    config, samples = Config(model=model), Samples(LENGTH, 5)
    plain = plan_work(config, samples, attention_kind="plain").parts["DiT"]
    fused = plan_work(config, samples).parts["DiT"]
    assert fused.backward.attention - plain.backward.attention == 0.5 * plain.forward.attention > 0


def test_decoder_stage(model: ModelConfig) -> None:
    decoder = model.decoder.model_copy(update={"name": "vit-tiny"})
    encoder = model.encoder.model_copy(update={"path": None})
    for checkpointing in ("none", "full"):
        engine = EngineConfig(activation_checkpointing=checkpointing)
        config = Config(
            stage="decoder", model=model.model_copy(update={"decoder": decoder, "encoder": encoder}), engine=engine
        )
        frozen = SiglipDemoEncoder(SiglipDemoConfig()).requires_grad_(False)
        stage = DecoderStage(zoo.build_decoder(decoder, frozen.channels), frozen, LossConfig())
        apply_activation_checkpointing(stage.module, checkpointing, {})
        pixels = SimpleNamespace(images=lambda: torch.rand(BATCH, 3, 64, 64))
        work = plan_work(config, attention_kind="plain")

        def run(stage: Any = stage, pixels: Any = pixels) -> None:
            with torch.no_grad():
                latents = stage.prepare(pixels, 0).latents
            stage.module(latents).logits.sum().backward()

        assert count(run) == round(BATCH * work.hardware)
        assert work.model == stage.flops(range(BATCH)) / BATCH  # type: ignore[arg-type]


def test_encoder_stage(model: ModelConfig, tmp_path: Path) -> None:
    from rae_scale.models.encoders.contrastive import ContrastiveModel, TextTowerConfig

    vision = SiglipDemoEncoder(SiglipDemoConfig())
    contrastive = ContrastiveModel(vision, TextTowerConfig(vocab_size=100))
    stage = EncoderStage(contrastive, LossConfig())
    ids = torch.ones(BATCH, 7, dtype=torch.int64)
    pixels = torch.zeros(BATCH, 3, 64, 64)
    config = Config(stage="encoder", model=model.model_copy(update={"encoder": EncoderConfig(name="siglip-demo")}))
    work = plan_encoder_stage(config, contrastive)

    def run() -> None:
        output = contrastive(pixels, ids, ids)
        (output.image_embed.sum() + output.text_embed.sum() + output.dense_pixels.sum()).backward()

    assert count(run) == round(BATCH * work.hardware)
    assert work.model == contrastive_cost(contrastive, 7).training
    assert stage.module is contrastive


def plan_encoder_stage(config: Config, module: nn.Module) -> Work:
    """Its vocabulary is the tokenizer's, which there is none of here; it does not enter the FLOPs."""
    from rae_scale.plan import models

    cached = models._trained_module
    models._trained_module = lambda stage, model: (module, str)  # type: ignore[assignment]
    try:
        return plan_work(config, Samples(7, 0), attention_kind="plain")
    finally:
        models._trained_module = cached


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_without_building_it(name: str) -> None:
    """Shape and cost are those of the real encoder."""
    if name == "flux-vae":
        pytest.importorskip("diffusers")
    with torch.device("meta"):
        real = ENCODERS[name](None)
    shape = encoder_shape(EncoderConfig(name=name))
    assert shape.cost == encoder_cost(real)
    assert (shape.image_size, shape.num_tokens, shape.channels) == (real.image_size, real.num_tokens, real.channels)


def test_encoder_forward_is_counted_once(model: ModelConfig) -> None:
    from rae_scale.models.encoders import build_encoder

    encoder, config = build_encoder(model.encoder), Config(model=model)
    work = plan_work(config).parts["encoder"]
    with torch.no_grad():
        assert count(lambda: encoder(torch.rand(BATCH, 3, 32, 32))) == BATCH * work.hardware == BATCH * work.model


def test_usual_samples_fit_the_longest_sequence(model: ModelConfig) -> None:
    config = Config(model=model)
    assert usual_samples(config).tokens == SLOTS + 32 + 64
    short = config.model_copy(update={"data": config.data.model_copy(update={"max_seq_len": 60})})
    assert usual_samples(short).tokens == 60
    with pytest.raises(ValueError, match="labelled"):
        Samples(10, 11)
    with pytest.raises(ValueError, match="not-there"):
        encoder_shape(EncoderConfig(name="not-there"))


def test_planning_again_builds_and_runs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search asks thousands of times."""
    config = Config(model=ModelConfig(name="dit-tiny", llm=LLMConfig(name="qwen2-tiny")))
    plan_work(config)
    with nothing_new(monkeypatch):
        plan_work(config)
