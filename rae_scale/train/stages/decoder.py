"""Stage `decoder`: pixels from the latents of a frozen encoder (paper section 2 and appendix A)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from rae_scale.config.schema import LossConfig
from rae_scale.data.collate import Batch
from rae_scale.models.decoder import ViTDecoder
from rae_scale.models.encoders import FrozenEncoder
from rae_scale.models.flops import decoder_cost, encoder_cost
from rae_scale.train.stages.base import LossOutput, Totals


@dataclass(frozen=True)
class LossTerm:
    """One part of the reconstruction loss.

    `per_image(predicted, pixels)` maps two [B, 3, S, S] in [0, 1] to float32 [B]; the total is the weighted sum of
    the terms' means over images.
    """

    name: str
    weight: float
    per_image: Callable[[Tensor, Tensor], Tensor]


def l1(predicted: Tensor, pixels: Tensor) -> Tensor:
    return (predicted - pixels).abs().flatten(1).mean(dim=1)


def l2(predicted: Tensor, pixels: Tensor) -> Tensor:
    return (predicted - pixels).square().flatten(1).mean(dim=1)


def loss_terms(cfg: LossConfig) -> list[LossTerm]:
    """The terms that `loss` gives a weight."""
    terms = [LossTerm("l1", cfg.l1, l1), LossTerm("l2", cfg.l2, l2)]
    return [term for term in terms if term.weight > 0]


@dataclass(frozen=True)
class DecoderInputs:
    latents: Tensor
    """[B, T, C]."""
    pixels: Tensor
    """[B, 3, S, S] in [0, 1]."""


class DecoderStage:
    """loss = sum over terms of weight * (sum over images / global images)."""

    def __init__(self, decoder: ViTDecoder, encoder: FrozenEncoder, cfg: LossConfig) -> None:
        self.module: ViTDecoder = decoder
        self.encoder = encoder
        self.terms = loss_terms(cfg)

    def group_of(self, parameter_name: str) -> str:
        return "decoder"

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"images": float(len(batch))}

    def prepare(self, batch: Batch, step: int) -> DecoderInputs:
        pixels = batch.images()
        return DecoderInputs(self.encoder(pixels), pixels)

    def loss(self, module: nn.Module, inputs: DecoderInputs, totals: Totals) -> LossOutput:
        # Not clamped as in `decode`: a pixel that is too bright must still be pulled back.
        image = module(inputs.latents).image_before_denormalise.float()
        predicted = image * self.module.image_std + self.module.image_mean
        values = {term.name: term.per_image(predicted, inputs.pixels) for term in self.terms}
        per_sample = sum((term.weight * values[term.name] for term in self.terms), start=image.new_zeros(len(image)))
        sums = {f"loss_{name}": (value.sum(), len(value)) for name, value in values.items()}
        return LossOutput(per_sample.sum() / totals["images"], per_sample.detach(), sums)

    def flops(self, batch: Batch) -> float:
        per_image = encoder_cost(self.encoder).forward + decoder_cost(self.module.cfg).training
        return per_image * len(batch)
