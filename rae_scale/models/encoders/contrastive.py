"""Training of the demo's encoder: images and captions pulled together by the sigmoid loss of SigLIP, plus a dense loss.

The sigmoid loss alone leaves the tokens free to carry the image in any arrangement, and a decoder needs to know what is
where. SigLIP 2 adds dense losses for the same reason; here the cheapest one will do: every latent token must tell the
pixels of its own patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_scale import ops
from rae_scale.models.encoders.siglip_demo import (
    POSITION_STD,
    SiglipDemoEncoder,
    TransformerBlock,
    init_linears,
    patchify,
)

INITIAL_LOGIT_SCALE = math.log(10.0)  # SigLIP, section 3.2
INITIAL_LOGIT_BIAS = -10.0


@dataclass(frozen=True)
class TextTowerConfig:
    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_length: int = 64
    embed_size: int = 128


class ContrastiveOutput(NamedTuple):
    image_embed: Tensor
    """[B, E], unit length."""
    text_embed: Tensor
    """[B, E], unit length."""
    logit_scale: Tensor
    """[1], the factor itself, not its logarithm."""
    logit_bias: Tensor
    """[1]."""
    dense_pixels: Tensor
    """[B, T, patch * patch * 3], each token's guess of its own patch, in [0, 1] up to error."""


class TextTower(nn.Module):
    """Caption tokens to one vector: causal transformer, then the mean over the real tokens.

    Causal so that the padding on the right needs no mask: no real token sees it.
    """

    def __init__(self, cfg: TextTowerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.pos_embed = nn.Parameter(torch.randn(cfg.max_length, cfg.hidden_size) * POSITION_STD)
        causal = partial(ops.attention, is_causal=True)
        self.blocks = nn.ModuleList(
            TransformerBlock(cfg.hidden_size, cfg.num_attention_heads, cfg.intermediate_size, attention=causal)
            for _ in range(cfg.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(cfg.hidden_size)
        self.project = nn.Linear(cfg.hidden_size, cfg.embed_size)
        init_linears(self)
        nn.init.normal_(self.embed.weight, std=POSITION_STD)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map input_ids, attention_mask int64 [B, L], right padded, L <= `max_length`, to [B, E]."""
        x = self.embed(input_ids) + self.pos_embed[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        real = attention_mask[:, :, None].to(x.dtype)
        return self.project((self.norm(x) * real).sum(dim=1) / real.sum(dim=1))


class ImagePool(nn.Module):
    """Latents [B, T, C] to one vector [B, E]: attention pooling, token features weighted by a learned query."""

    def __init__(self, channels: int, hidden_size: int, embed_size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(channels, hidden_size), nn.GELU(), nn.LayerNorm(hidden_size))
        self.score = nn.Linear(hidden_size, 1)
        self.project = nn.Linear(hidden_size, embed_size)
        init_linears(self)

    def forward(self, latents: Tensor) -> Tensor:
        features = self.features(latents)
        return self.project((self.score(features).softmax(dim=1) * features).sum(dim=1))


class ContrastiveModel(nn.Module):
    """The encoder in training, and what only its training needs: text tower, image pool, dense head.

    Image embedding and dense head both read the finished latents, after their LayerNorm, so that what the DiT will
    generate carries both meaning and local detail.
    """

    def __init__(self, vision: SiglipDemoEncoder, text: TextTowerConfig) -> None:
        super().__init__()
        self.vision = vision
        self.text = TextTower(text)
        self.pool = ImagePool(vision.cfg.channels, vision.cfg.hidden_size, text.embed_size)
        self.dense = nn.Linear(vision.cfg.channels, 3 * vision.cfg.patch_size**2)
        init_linears(self.dense)
        # One entry rather than none: sharded engines split parameters along a dimension.
        self.log_logit_scale = nn.Parameter(torch.full((1,), INITIAL_LOGIT_SCALE))
        self.logit_bias = nn.Parameter(torch.full((1,), INITIAL_LOGIT_BIAS))

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> ContrastiveOutput:
        """Embed pixels [B, 3, S, S] in [0, 1] and their captions, int64 [B, L] right padded with mask [B, L]."""
        latents = self.vision(pixels)
        return ContrastiveOutput(
            image_embed=F.normalize(self.pool(latents).float(), dim=-1),
            text_embed=F.normalize(self.text(input_ids, attention_mask).float(), dim=-1),
            logit_scale=self.log_logit_scale.exp(),
            # A copy: a parameter handed out as it is would be emptied by engines that shard it after the forward.
            logit_bias=self.logit_bias.clone(),
            dense_pixels=self.dense(latents),
        )


def sigmoid_loss(output: ContrastiveOutput, positives: Tensor) -> Tensor:
    """SigLIP's loss of each image against every caption of the batch: float32 [B], to be averaged over images.

    positives: bool [B, B], whether caption j describes image i (`same_caption`). Under data parallelism each rank
    contrasts its own samples only: the negatives, and so the loss, depend on the local batch size.
    """
    logits = output.image_embed @ output.text_embed.T * output.logit_scale + output.logit_bias
    sign = torch.where(positives, 1.0, -1.0)
    return -F.logsigmoid(sign * logits).sum(dim=1)


def same_caption(input_ids: Tensor) -> Tensor:
    """bool [B, B]: which pairs of samples have equal captions. input_ids: int64 [B, L], equally padded.

    Short captions repeat within a batch; taken as negatives, the repeats would contradict the diagonal.
    """
    return (input_ids[:, None] == input_ids[None]).all(dim=-1)


def dense_loss(output: ContrastiveOutput, pixels: Tensor) -> Tensor:
    """Mean squared error of each sample's patches: float32 [B]. pixels: [B, 3, S, S] in [0, 1].

    Squared, since most of a picture may be background: an absolute error is content with a median that shows nothing.
    """
    patch_size = math.isqrt(output.dense_pixels.shape[2] // 3)
    return (output.dense_pixels.float() - patchify(pixels, patch_size)).square().mean(dim=(1, 2))
