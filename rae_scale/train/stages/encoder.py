"""Stage `encoder`: the demo's own contrastive encoder, trained with captions and a dense pixel loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rae_scale.config.schema import LossConfig
from rae_scale.data.collate import Batch
from rae_scale.models.encoders.contrastive import ContrastiveModel, dense_loss, same_caption, sigmoid_loss
from rae_scale.models.flops import contrastive_cost
from rae_scale.train.stages.base import LossOutput, Totals


@dataclass(frozen=True)
class EncoderInputs:
    pixels: Tensor
    """[B, 3, S, S] in [0, 1]."""
    input_ids: Tensor
    attention_mask: Tensor
    """Of the captions, [B, L]."""


class EncoderStage:
    """loss = contrastive * (sum of sigmoid losses / images) + dense * (sum of pixel errors / images).

    The contrastive loss compares the samples of one forward: other than everywhere else, micro-batch size and number
    of ranks change it.
    """

    def __init__(self, model: ContrastiveModel, cfg: LossConfig) -> None:
        self.module: ContrastiveModel = model
        self.cfg = cfg

    def group_of(self, parameter_name: str) -> str:
        return "encoder"

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"images": float(len(batch))}

    def prepare(self, batch: Batch, step: int) -> EncoderInputs:
        return EncoderInputs(batch.images(), batch.input_ids, batch.attention_mask)

    def loss(self, module: nn.Module, inputs: EncoderInputs, totals: Totals) -> LossOutput:
        output = module(inputs.pixels, inputs.input_ids, inputs.attention_mask)
        contrastive = sigmoid_loss(output, same_caption(inputs.input_ids))
        dense = dense_loss(output, inputs.pixels)
        per_sample = self.cfg.contrastive * contrastive + self.cfg.dense * dense
        sums = {
            "loss_contrastive": (contrastive.sum(), len(contrastive)),
            "loss_dense": (dense.sum(), len(dense)),
        }
        return LossOutput(per_sample.sum() / totals["images"], per_sample.detach(), sums)

    def flops(self, batch: Batch) -> float:
        return contrastive_cost(self.module, caption_tokens=batch.input_ids.shape[1]).training * len(batch)
