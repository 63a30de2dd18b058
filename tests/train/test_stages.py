"""Every stage's loss, alone and through a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import TinyWorld, read_metrics

from rae_scale.config import Config
from rae_scale.config.schema import EncoderConfig, LossConfig
from rae_scale.data.collate import Batch
from rae_scale.data.loader import build_loader
from rae_scale.data.record import Turn
from rae_scale.infer.export import export
from rae_scale.models.encoders import build_encoder
from rae_scale.train import train
from rae_scale.train.parts import Parts, build_parts
from rae_scale.train.stages import GenerationStage
from rae_scale.train.stages.decoder import loss_terms
from rae_scale.train.stages.generation import by_timestep

CPU = torch.device("cpu")


def first_batch(config: Config, parts: Parts) -> Batch:
    loader = build_loader(
        config.data,
        seed=config.run.seed,
        image_size=parts.batches.image_size,
        prepare=parts.batches.prepare,
        collate=parts.batches.collate,
        quarantine_path="/dev/null",
    )
    with loader:
        return next(loader)[0]


@pytest.fixture
def generation(world: TinyWorld, tmp_path: Path) -> tuple[GenerationStage, Batch]:
    config = world.config(tmp_path, data__global_batch_size=20)
    parts = build_parts(config, CPU)
    assert isinstance(parts.stage, GenerationStage)
    # At its random start the model's last layer is zero, which would hide what reaches it.
    torch.manual_seed(3)
    for parameter in parts.stage.module.dit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return parts.stage, first_batch(config, parts)


def share(stage: GenerationStage, batch: Batch, totals: dict[str, float], step: int = 0) -> torch.Tensor:
    return stage.loss(stage.module, stage.prepare(batch, step), totals).loss


def part(batch: Batch, rows: slice) -> Batch:
    per_sample = {name: value[rows] for name, value in vars(batch).items() if name != "layout" and value is not None}
    return replace(batch, **per_sample, layout=None)


def test_the_batch_has_every_kind_of_sample(generation: tuple[GenerationStage, Batch]) -> None:
    _, batch = generation
    generated, understood = batch.answer_start >= 0, batch.user_start >= 0
    assert generated.any() and understood.any() and not batch.has_image.all()
    assert not (generated & understood).any()


def test_shares_add_up_however_the_batch_is_cut(generation: tuple[GenerationStage, Batch]) -> None:
    stage, batch = generation
    totals = stage.counts(batch)
    whole = share(stage, batch, totals)
    cut = sum(share(stage, part(batch, slice(i, i + 5)), totals) for i in range(0, 20, 5))
    assert cut.item() == pytest.approx(whole.item(), rel=1e-5)
    output = stage.loss(stage.module, stage.prepare(batch, 0), totals)
    text, flow = (
        float(total.detach()) / float(count) for total, count in (output.sums["loss_text"], output.sums["loss_flow"])
    )
    assert whole.item() == pytest.approx(text + 2.0 * flow, rel=1e-5)


def test_only_generated_images_have_a_flow_loss(generation: tuple[GenerationStage, Batch]) -> None:
    stage, batch = generation
    assert stage.counts(batch)["answer_images"] == int((batch.answer_start >= 0).sum()) < int(batch.has_image.sum())
    inputs = stage.prepare(batch, 0)
    others = batch.answer_start < 0
    x_t = inputs.x_t.clone()
    x_t[others] += 1.0
    totals = stage.counts(batch)
    assert torch.equal(
        stage.loss(stage.module, inputs, totals).loss,
        stage.loss(stage.module, replace(inputs, x_t=x_t), totals).loss,
    )


def test_a_step_without_answer_images_has_no_flow_loss(generation: tuple[GenerationStage, Batch]) -> None:
    stage, batch = generation
    text_only = replace(batch, answer_start=torch.full_like(batch.answer_start, -1))
    totals = stage.counts(text_only)
    assert totals["answer_images"] == 0
    output = stage.loss(stage.module, stage.prepare(text_only, 0), totals)
    assert float(output.sums["loss_flow"][1]) == 0
    assert output.loss.item() == pytest.approx(output.sums["loss_text"][0].item() / totals["labelled_tokens"])


def test_noise_depends_on_step_and_sample_alone(generation: tuple[GenerationStage, Batch]) -> None:
    stage, batch = generation
    whole, late = stage.prepare(batch, 4), stage.prepare(part(batch, slice(12, 20)), 4)
    for name in ("x_t", "t", "drop"):
        assert torch.equal(getattr(whole, name)[12:], getattr(late, name))
    assert not torch.equal(stage.prepare(batch, 5).x_t, whole.x_t)


def test_the_loss_is_against_the_noise_that_was_put_in(generation: tuple[GenerationStage, Batch]) -> None:
    stage, batch = generation
    inputs, outputs = stage.prepare(batch, 4), []

    def module(**arguments: Any) -> Any:
        outputs.append(stage.module(**arguments))
        return outputs[-1]

    total, _ = stage.loss(module, inputs, stage.counts(batch)).sums["loss_flow"]
    t = inputs.t[:, None, None]
    eps = (inputs.x_t - (1 - t) * inputs.features) / t
    error = (outputs[0].velocity - (eps - inputs.features)).square().mean(dim=(1, 2))
    torch.testing.assert_close(total, error[inputs.has_answer].sum(), rtol=1e-3, atol=0)


def test_the_condition_is_dropped_as_often_as_asked(world: TinyWorld, tmp_path: Path) -> None:
    for probability in (0.0, 1.0):
        config = world.config(tmp_path, model__class_dropout_prob=probability)
        parts = build_parts(config, CPU)
        assert parts.stage.prepare(first_batch(config, parts), 0).drop.float().mean() == probability


def test_the_time_shift_follows_the_latents_unless_it_is_set(world: TinyWorld, tmp_path: Path) -> None:
    derived = build_parts(world.config(tmp_path), CPU).stage
    assert isinstance(derived, GenerationStage) and derived.alpha == (16 * 16 / 4096) ** 0.5
    given = build_parts(world.config(tmp_path, flow__shift=3.0), CPU).stage
    assert isinstance(given, GenerationStage) and given.alpha == 3.0


def test_markup_is_labelled_only_when_asked(world: TinyWorld, tmp_path: Path) -> None:
    turns = [Turn("human", "hello"), Turn("gpt", "good day")]
    labelled = []
    for wanted in (False, True):
        batches = build_parts(world.config(tmp_path, data__label_markup=wanted), CPU).batches
        labelled.append(sum(label >= 0 for label in batches.chat.encode(turns, has_image=False).labels))
    assert labelled[1] > labelled[0] > 0


def test_reconstruction_terms_are_the_ones_with_a_weight() -> None:
    predicted, pixels = torch.full((2, 3, 4, 4), 0.75), torch.full((2, 3, 4, 4), 0.25)
    (only,) = loss_terms(LossConfig(l1=1.0))
    assert only.name == "l1"
    terms = {term.name: term for term in loss_terms(LossConfig(l1=0.5, l2=5.0))}
    assert {name: term.weight for name, term in terms.items()} == {"l1": 0.5, "l2": 5.0}
    assert terms["l1"].per_image(predicted, pixels).tolist() == [0.5, 0.5]
    assert terms["l2"].per_image(predicted, pixels).tolist() == [0.25, 0.25]


def test_the_flow_loss_is_sorted_into_bins_of_time() -> None:
    flow, t = torch.tensor([1.0, 2.0, 4.0, 8.0, 0.0]), torch.tensor([0.0, 0.19, 0.5, 1.0, 0.95])
    bins = by_timestep(flow, t, torch.tensor([1.0, 1.0, 0.5, 1.0, 0.0]))
    found = {name: (float(total), float(count)) for name, (total, count) in bins.items()}
    assert found == {
        "loss_flow_bin_0": (3.0, 2.0),
        "loss_flow_bin_1": (0.0, 0.0),
        "loss_flow_bin_2": (4.0, 0.5),
        "loss_flow_bin_3": (0.0, 0.0),
        "loss_flow_bin_4": (8.0, 1.0),
    }


def test_flops_count_what_was_asked_for(generation: tuple[GenerationStage, Batch]) -> None:
    stage, batch = generation
    halves = [stage.flops(part(batch, rows)) for rows in (slice(0, 10), slice(10, 20))]
    assert sum(halves) == pytest.approx(stage.flops(batch))
    padded = replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, 7)),
        labels=torch.nn.functional.pad(batch.labels, (0, 7), value=-100),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (0, 7)),
    )
    assert stage.flops(padded) == stage.flops(batch)


def test_the_decoder_stage_learns_pixels(world: TinyWorld, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"optim__schedule": "constant", "loss__l1": 0.5, "data__max_bad_fraction": 0.2}
    train(world.config(tmp_path, stage="decoder", run__max_steps=30, **settings))
    lines = read_metrics(tmp_path)
    assert lines[-1]["loss_l1"] < 0.8 * lines[0]["loss_l1"]
    assert lines[0]["loss"] == pytest.approx(0.5 * lines[0]["loss_l1"], rel=1e-6)
    assert "loss_flow" not in lines[0] and "loss_text" not in lines[0]
    # Text without a picture is no sample of this stage: listed, and another one taken in its place.
    assert "no image" in (tmp_path / "quarantine.jsonl").read_text()


def test_the_encoder_stage_learns_and_its_export_is_an_encoder(world: TinyWorld, tmp_path: Path) -> None:
    settings = {"model__encoder__path": None, "data__global_batch_size": 4, "optim__schedule": "constant"}
    train(world.config(tmp_path / "run", stage="encoder", run__max_steps=12, **settings))
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["loss_contrastive"] < 0.7 * lines[0]["loss_contrastive"]
    assert lines[-1]["loss_dense"] < 0.7 * lines[0]["loss_dense"]
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss_contrastive"] + lines[0]["loss_dense"], rel=1e-6)
    folder = export(tmp_path / "run", tmp_path / "encoder")
    encoder = build_encoder(EncoderConfig(name="siglip-demo", path=str(folder)))
    assert encoder(torch.rand(1, 3, 64, 64)).shape == (1, 16, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stage": "encoder", "model__encoder": {"name": "webssl-l"}},
            "stage=encoder.*set model.encoder.name=siglip-demo",
        ),
        ({"stage": "decoder", "model__decoder__name": "vit-tiny"}, "vit-tiny.*makes 64 px images.*choose the decoder"),
        ({"model__llm__tokenizer": None}, "model.llm.tokenizer is not set"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    world: TinyWorld, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_parts(world.config(tmp_path, **changes), CPU)
