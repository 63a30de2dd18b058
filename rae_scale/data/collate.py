"""Samples of different lengths to one batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rae_scale.data.chat import TokenizedSample
from rae_scale.models.packing import IGNORE_LABEL, TextLayout


@dataclass(frozen=True)
class Batch:
    """B samples; L is the length of the longest."""

    input_ids: Tensor
    """int64 [B, L], right padded."""
    labels: Tensor
    """int64 [B, L] aligned with `input_ids`, -100 where nothing is to be learned."""
    attention_mask: Tensor
    """int64 [B, L], 0 on the padding."""
    answer_start: Tensor
    """int64 [B], first slot of the image to generate; -1 if there is none."""
    user_start: Tensor
    """int64 [B], first slot of the image to understand; -1 if there is none."""
    pixels: Tensor
    """float32 [B, 3, S, S] in [0, 1], zeros in samples without an image."""
    has_image: Tensor
    """bool [B]."""
    sample_index: Tensor
    """int64 [B], position in the data order: the key of the sample's noise and time."""
    sample_ids: list[str]
    """Names of the samples, for error messages."""
    captions: list[str]
    layout: TextLayout | None = None
    """What the host knows of the texts once they are on another device."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`, and with its `layout`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {
            name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved, layout=self.layout or TextLayout.of(self.attention_mask, self.labels))


def collate(
    samples: Sequence[TokenizedSample],
    pixels: Sequence[Tensor | None],
    *,
    image_size: int,
    pad_id: int,
    sample_index: Sequence[int],
    sample_ids: Sequence[str],
    captions: Sequence[str],
) -> Batch:
    """Pad `samples` to the longest of them and stack.

    pixels: float32 [3, image_size, image_size] in [0, 1], or None for a sample without an image.
    pad_id: the tokenizer's padding token. All sequences are aligned with `samples`.
    """
    length = max(len(sample.input_ids) for sample in samples)
    shape = (len(samples), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_LABEL, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for row, sample in enumerate(samples):
        end = len(sample.input_ids)
        input_ids[row, :end] = torch.tensor(sample.input_ids)
        labels[row, :end] = torch.tensor(sample.labels)
        attention_mask[row, :end] = 1
    blank = torch.zeros(3, image_size, image_size)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        attention_mask=attention_mask,
        answer_start=torch.tensor([sample.answer_start for sample in samples]),
        user_start=torch.tensor([sample.user_start for sample in samples]),
        pixels=torch.stack([blank if image is None else image for image in pixels]),
        has_image=torch.tensor([image is not None for image in pixels]),
        sample_index=torch.tensor(sample_index, dtype=torch.int64),
        sample_ids=list(sample_ids),
        captions=list(captions),
    )
