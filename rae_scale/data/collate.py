"""Samples of different lengths to one batch of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from rae_scale.data.chat import TokenizedSample
from rae_scale.data.transforms import to_float
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
    """uint8 [B, S, S, 3], zeros in samples without an image. On the host no one touches a pixel after its resize:
    turning it to channels first takes 5 times as long as to stack it, floats are 4 times as much to move."""
    has_image: Tensor
    """bool [B]."""
    sample_index: Tensor
    """int64 [B], position in the data order: the key of the sample's noise and time."""
    sample_ids: list[str]
    """Names of the samples, for error messages."""
    captions: list[str]
    latents: Tensor | None = None
    """bfloat16 or int8 [B, T, C] from a latent cache, zeros in samples without an image; `pixels` are then empty."""
    latent_scales: Tensor | None = None
    """float32 [B, T], beside int8."""
    layout: TextLayout | None = None
    """What the host knows of the texts once they are on another device."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def images(self) -> Tensor:
        """float32 [B, 3, S, S] in [0, 1], made where the batch lies: what encoders take."""
        return to_float(self.pixels)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory: copies to a GPU from there overlap with its work."""
        return self._with(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`, and with its `layout`."""
        layout = self.layout or TextLayout.of(self.attention_mask, self.labels)
        return replace(self._with(lambda tensor: tensor.to(device, non_blocking=True)), layout=layout)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


def collate(
    samples: Sequence[TokenizedSample],
    pixels: Sequence[np.ndarray | None],
    *,
    image_size: int,
    pad_id: int,
    sample_index: Sequence[int],
    sample_ids: Sequence[str],
    captions: Sequence[str],
) -> Batch:
    """Pad `samples` to the longest of them and stack.

    pixels: uint8 [image_size, image_size, 3], or None for a sample without an image.
    pad_id: the tokenizer's padding token. All sequences are aligned with `samples`.
    """
    length = max(len(sample.input_ids) for sample in samples)
    shape = (len(samples), length)
    # NumPy's: it takes a list of numbers straight into a row, several times as fast as a tensor does.
    input_ids = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE_LABEL, np.int64)
    attention_mask = np.zeros(shape, np.int64)
    for row, sample in enumerate(samples):
        end = len(sample.input_ids)
        input_ids[row, :end] = sample.input_ids
        labels[row, :end] = sample.labels
        attention_mask[row, :end] = 1
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        attention_mask=torch.from_numpy(attention_mask),
        answer_start=torch.tensor([sample.answer_start for sample in samples]),
        user_start=torch.tensor([sample.user_start for sample in samples]),
        pixels=stack_images(pixels, image_size),
        has_image=torch.tensor([image is not None for image in pixels]),
        sample_index=torch.tensor(sample_index, dtype=torch.int64),
        sample_ids=list(sample_ids),
        captions=list(captions),
    )


def stack_images(images: Sequence[np.ndarray | None], size: int) -> Tensor:
    """uint8 [B, size, size, 3] of images [size, size, 3], zeros for None. Images that are the rows of one array
    `[B, size, size, 3]`, in order, are that array and are not copied."""
    block = images[0].base if images[0] is not None else None
    if isinstance(block, np.ndarray) and block.shape == (len(images), size, size, 3) and are_rows(images, block):
        return torch.from_numpy(block)
    stacked = np.zeros((len(images), size, size, 3), np.uint8)
    for row, image in zip(stacked, images, strict=True):
        if image is not None:
            row[:] = image
    return torch.from_numpy(stacked)


def are_rows(images: Sequence[np.ndarray | None], block: np.ndarray) -> bool:
    """Whether the images are all of `block`, in order."""
    start, step = block.ctypes.data, block.strides[0]
    return all(
        image is not None
        and image.base is block
        and image.ctypes.data == start + row * step
        and image.shape == block.shape[1:]
        and image.strides == block.strides[1:]
        for row, image in enumerate(images)
    )
