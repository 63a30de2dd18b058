"""WebSSL ViT-L, the self-supervised encoder of the paper's Table 4: a DINOv2 model trained on web images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rae_scale.models.encoders.base import FrozenEncoder
from rae_scale.models.pretrained import from_pretrained

if TYPE_CHECKING:
    from transformers import Dinov2Model

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class WebSSLEncoder(FrozenEncoder):
    """The model's last hidden state, its final LayerNorm included, without the class token."""

    def __init__(self, model: Dinov2Model, image_size: int) -> None:
        super().__init__(
            image_size=image_size,
            num_tokens=(image_size // model.config.patch_size) ** 2,
            channels=model.config.hidden_size,
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
        )
        self.model = model

    def encode(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).last_hidden_state[:, 1:]


def load_webssl(path: str | None, image_size: int = 224) -> WebSSLEncoder:
    """WebSSL ViT-L/14 with random weights, or the DINOv2-class model at `path` (folder or hub id).

    The model resizes its position table to the images, so the size is ours to say: 224 gives the 16 x 16 grid.
    ValueError if the weights cannot be read.
    """
    from transformers import Dinov2Config, Dinov2Model

    if path is not None:
        model = from_pretrained(Dinov2Model, path, "model.encoder.path", dtype=torch.float32)
    else:
        model = Dinov2Model(
            Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=224)
        )
    return WebSSLEncoder(model, image_size)
