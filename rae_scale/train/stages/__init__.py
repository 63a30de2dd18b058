"""Training objectives: encoder, decoder, and generation (pretrain and finetune)."""

from rae_scale.train.stages.base import LossOutput, Stage, Totals
from rae_scale.train.stages.decoder import DecoderStage
from rae_scale.train.stages.encoder import EncoderStage
from rae_scale.train.stages.generation import GenerationStage

__all__ = ["DecoderStage", "EncoderStage", "GenerationStage", "LossOutput", "Stage", "Totals"]
