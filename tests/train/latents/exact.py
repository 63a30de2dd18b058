"""An encoder whose latents do not depend on what else is in the batch, to the last bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rae_scale.models.encoders.siglip_demo import SiglipDemoEncoder

ENCODE = SiglipDemoEncoder.encode


def exact(monkeypatch: pytest.MonkeyPatch, *, bf16: bool) -> None:
    """Image by image: a matrix product of more rows may sum in another order. bf16: what it gives, as some do."""

    def encode(self: SiglipDemoEncoder, images: Tensor) -> Tensor:
        latents = torch.cat([ENCODE(self, image[None]) for image in images])
        return latents.bfloat16() if bf16 else latents

    monkeypatch.setattr(SiglipDemoEncoder, "encode", encode)


def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: SiglipDemoEncoder, images: Tensor) -> Tensor:
        raise AssertionError("the encoder runs")

    monkeypatch.setattr(SiglipDemoEncoder, "encode", encode)
