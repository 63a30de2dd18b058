"""Stages `pretrain` and `finetune`: text and flow losses of the whole model (paper section 3.1 and appendix A)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rae_scale import ops
from rae_scale.config.schema import FlowConfig
from rae_scale.data.collate import Batch
from rae_scale.data.latents import dequantise
from rae_scale.flow import Stream, drop_mask, resolve_alpha, sample_time
from rae_scale.models.composite import ScaleRAE, group_of
from rae_scale.models.encoders import FrozenEncoder
from rae_scale.models.flops import Cost, dit_cost, encoder_cost, linear, llm_cost
from rae_scale.models.packing import IGNORE_LABEL
from rae_scale.train.stages.base import LossOutput, Totals

TIMESTEP_BINS = 5  # of equal width; a rising loss near t = 1 (prompt ignored) or t = 0 (detail lost) hides in the mean


@dataclass(frozen=True)
class FlowInputs:
    """A batch with its place on the path; all tensors [B, ...] on the training device."""

    batch: Batch
    step: int
    """Of which the noise is."""
    features: Tensor
    """[B, T, C] clean encoder tokens, float32."""
    x_t: Tensor
    """[B, T, C] noisy latents, float32."""
    t: Tensor
    """[B] times, 1 is noise."""
    drop: Tensor
    """bool [B], the condition becomes the null vector."""

    @property
    def has_answer(self) -> Tensor:
        return self.batch.answer_start >= 0


class GenerationStage:
    """loss = text_weight * (sum CE / labelled tokens) + flow_weight * (sum flow loss / answer images).

    Both divisors are global: they count the tokens and images of the whole step, on all ranks. A rank that computes a
    slice of the image tokens has that fraction of its samples' flow losses, and counts as much of an image.
    """

    def __init__(
        self, model: ScaleRAE, encoder: FrozenEncoder, flow: FlowConfig, *, seed: int, encodes: bool = True
    ) -> None:
        """encodes: whether batches bring pixels; else they bring latents, and the encoder says what these are like."""
        self.module: ScaleRAE = model
        self.encoder = encoder
        self.encodes = encodes
        self.encode: Callable[[Tensor], Tensor] = encoder
        """To be replaced where ranks share the work."""
        self.flow = flow
        self.seed = seed
        self.alpha = resolve_alpha(flow, encoder.num_tokens * encoder.channels)
        self.drop_prob = model.dit.cfg.class_dropout_prob
        self.llm_trains = any(parameter.requires_grad for parameter in model.conditioner.llm.parameters())

    def group_of(self, parameter_name: str) -> str:
        return group_of(parameter_name)

    def counts(self, batch: Batch) -> dict[str, float]:
        return {
            "labelled_tokens": float(labelled_positions(batch).sum()),
            "answer_images": float((batch.answer_start >= 0).sum()),
        }

    def prepare(self, batch: Batch, step: int) -> FlowInputs:
        """Encode the images once: a sample's one image is either what the LLM reads or what the DiT generates."""
        features = self.features(batch)
        index = batch.sample_index
        t = sample_time(self.flow, self.seed, step, index, self.alpha)
        return FlowInputs(
            batch=batch,
            step=step,
            features=features,
            x_t=ops.flow_interpolate(features, t, seed=self.seed, step=step, sample_index=index, stream=Stream.NOISE),
            t=t,
            drop=drop_mask(self.seed, step, index, self.drop_prob),
        )

    def features(self, batch: Batch) -> Tensor:
        """Clean latents, float32 [B, T, C]."""
        if batch.latents is None:
            return self.encode(batch.images()).float()
        return dequantise(batch.latents, batch.latent_scales)

    def loss(self, module: nn.Module, inputs: FlowInputs, totals: Totals) -> LossOutput:
        batch = inputs.batch
        output = module(
            input_ids=batch.input_ids,
            labels=batch.labels,
            attention_mask=batch.attention_mask,
            answer_start=batch.answer_start,
            user_start=batch.user_start,
            user_features=inputs.features,
            x_t=inputs.x_t,
            t=inputs.t,
            drop=inputs.drop,
            layout=batch.layout,
        )
        fraction = output.velocity.shape[1] / inputs.features.shape[1]
        answered = inputs.has_answer.float() * fraction
        flow = ops.flow_matching_loss(
            output.velocity,
            inputs.features,
            seed=self.seed,
            step=inputs.step,
            sample_index=batch.sample_index,
            stream=Stream.NOISE,
            first_token=output.first_token,
            weight=answered,
        )
        # A step without any labelled token (or answer image) has a sum of 0 to divide: by 1, not by 0.
        tokens, images = max(1.0, totals["labelled_tokens"]), max(1.0, totals["answer_images"])
        text_share = self.flow.text_weight * output.text_loss_sum / tokens
        flow_share = self.flow.flow_weight * flow.sum() / images
        labelled = labelled_positions(batch).sum()
        sums = {
            "loss_text": (output.text_loss_sum, labelled * fraction),
            "loss_flow": (flow.sum(), answered.sum()),
            **by_timestep(flow.detach(), inputs.t, answered),
        }
        # Text loss is known per batch only: if it is not finite, every sample of the batch is named.
        return LossOutput(text_share + flow_share, (flow + output.text_loss_sum).detach(), sums)

    def flops(self, batch: Batch) -> float:
        """Padding counts as nothing, nor does the DiT where no image is generated: both are waste, not progress."""
        lengths = batch.attention_mask.sum(dim=1, dtype=torch.float64)
        counts = self.counts(batch)
        images, answers = float(batch.has_image.sum()), counts["answer_images"]
        llm = llm_cost(
            self.module.conditioner.llm.config,
            float(lengths.sum()),
            float(lengths.square().sum()),
            counts["labelled_tokens"],
        )
        hidden = self.module.conditioner.llm.config.hidden_size
        tokens, channels = self.encoder.num_tokens, self.encoder.channels
        projector = linear(tokens, channels, hidden) + linear(tokens, hidden, hidden)
        generator = dit_cost(self.module.dit.cfg)
        for layer in (part for part in self.module.connector.modules() if isinstance(part, nn.Linear)):
            generator += linear(tokens, layer.in_features, layer.out_features)
        language: Cost = llm + projector * (images - answers)
        return (
            (encoder_cost(self.encoder).forward * images if self.encodes else 0.0)
            + (language.training if self.llm_trains else language.frozen_training)
            + generator.training * answers
        )


def labelled_positions(batch: Batch) -> Tensor:
    """bool [B, L - 1]: positions whose next token is to be learned."""
    return batch.labels[:, 1:] != IGNORE_LABEL


def by_timestep(flow: Tensor, t: Tensor, answered: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Sum and count of the flow loss [B] in each bin of t [B].

    answered: [B], how much of each sample's answer image `flow` is of: 0 where there is none.
    """
    index = (t * TIMESTEP_BINS).long().clamp(max=TIMESTEP_BINS - 1)
    total = flow.new_zeros(TIMESTEP_BINS).index_add_(0, index, flow)
    count = flow.new_zeros(TIMESTEP_BINS).index_add_(0, index, answered)
    return {f"loss_flow_bin_{i}": (total[i], count[i]) for i in range(TIMESTEP_BINS)}
