"""SigLIP-2 So400m, the paper's encoder (section 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from rae_scale.models.encoders.base import FrozenEncoder
from rae_scale.models.pretrained import from_pretrained

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

NORM_EPS = 1e-6


class Siglip2Encoder(FrozenEncoder):
    """The last block's output, before the model's own final norm, through a LayerNorm without parameters.

    The official release takes the state before `post_layernorm` and normalises every token to mean 0 and variance 1.
    The image size and the number of tokens are the loaded model's (224 and 256 for the published one).
    """

    def __init__(self, model: SiglipVisionModel) -> None:
        config = model.config
        super().__init__(
            image_size=config.image_size,
            num_tokens=(config.image_size // config.patch_size) ** 2,
            channels=config.hidden_size,
            image_mean=(0.5, 0.5, 0.5),
            image_std=(0.5, 0.5, 0.5),
        )
        # transformers 4 keeps the transformer below `vision_model`, transformers 5 in the model itself. Only these two
        # parts are used: asking the whole model for hidden_states[-1] gives the state after post_layernorm in some
        # versions and before it in others, and would compute the pooling head for nothing.
        transformer = getattr(model, "vision_model", model)
        self.embeddings = transformer.embeddings
        self.transformer = transformer.encoder

    def encode(self, images: Tensor) -> Tensor:
        hidden = self.transformer(inputs_embeds=self.embeddings(images)).last_hidden_state
        return F.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPS)


def load_siglip2(path: str | None) -> Siglip2Encoder:
    """SigLIP-2 So400m/14 at 224 pixels with random weights, or the SigLIP vision model at `path` (folder or hub id).

    ValueError if the weights cannot be read.
    """
    from transformers import SiglipVisionConfig, SiglipVisionModel

    if path is not None:
        return Siglip2Encoder(from_pretrained(SiglipVisionModel, path, "model.encoder.path", dtype=torch.float32))
    config = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=224,
        patch_size=14,
    )
    return Siglip2Encoder(SiglipVisionModel(config))
