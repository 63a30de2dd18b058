"""From decoded samples to batches, in the loader's workers: what each stage wants of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from rae_scale.data.chat import ChatTokenizer, SampleTooLong, TokenizedSample
from rae_scale.data.collate import Batch, collate
from rae_scale.data.latents import Latents
from rae_scale.data.record import BadSample, DecodedSample
from rae_scale.data.tokenizer import encode_captions
from rae_scale.models.packing import IGNORE_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_TEXT = TokenizedSample([], [], answer_start=-1, user_start=-1)


@dataclass(frozen=True)
class PreparedSample:
    tokens: TokenizedSample
    pixels: np.ndarray | None
    """uint8 [S, S, 3]."""
    sample_index: int
    sample_id: str
    caption: str
    has_image: bool
    latents: Latents | None
    """[T, C], in place of pixels."""


class BatchMaker(Protocol):
    """Picklable, for workers. `prepare` raises BadSample for a sample that the stage cannot use."""

    @property
    def image_size(self) -> int: ...

    def prepare(self, decoded: DecodedSample) -> PreparedSample: ...

    def collate(self, samples: Sequence[PreparedSample]) -> Batch: ...


@dataclass(frozen=True)
class ConversationBatches:
    """Conversations as token sequences, with or without an image (stages `pretrain` and `finetune`)."""

    chat: ChatTokenizer
    prompt_template: str
    image_size: int

    def prepare(self, decoded: DecodedSample) -> PreparedSample:
        try:
            turns = decoded.sample.conversation(self.prompt_template)
            tokens = self.chat.encode(turns, has_image=decoded.has_image)
        except SampleTooLong as error:
            raise BadSample("too long", str(error)) from None
        except ValueError as error:
            raise BadSample("bad conversation", str(error)) from None
        return prepared(decoded, tokens)

    def collate(self, samples: Sequence[PreparedSample]) -> Batch:
        return stack(samples, self.image_size, self.chat.tokenizer.pad_token_id)


@dataclass(frozen=True)
class ImageBatches:
    """Images alone: no conversation, no tokens (stage `decoder`)."""

    image_size: int

    def prepare(self, decoded: DecodedSample) -> PreparedSample:
        if decoded.pixels is None:
            raise BadSample("no image", "this stage trains on images")
        return prepared(decoded, NO_TEXT)

    def collate(self, samples: Sequence[PreparedSample]) -> Batch:
        return stack(samples, self.image_size, pad_id=0)


@dataclass(frozen=True)
class CaptionBatches(ImageBatches):
    """Images and the tokens of their captions, without a conversation around them (stage `encoder`)."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def prepare(self, decoded: DecodedSample) -> PreparedSample:
        if not decoded.sample.captions:
            raise BadSample("no caption", "this stage trains on images with their captions")
        return super().prepare(decoded)

    def collate(self, samples: Sequence[PreparedSample]) -> Batch:
        ids, mask = encode_captions(self.tokenizer, [sample.caption for sample in samples], self.max_length)
        labels = torch.full_like(ids, IGNORE_LABEL)
        return replace(super().collate(samples), input_ids=ids, attention_mask=mask, labels=labels)


def prepared(decoded: DecodedSample, tokens: TokenizedSample) -> PreparedSample:
    return PreparedSample(
        tokens=tokens,
        pixels=decoded.pixels,
        sample_index=decoded.sample_index,
        sample_id=decoded.sample_id,
        caption=next(iter(decoded.sample.captions), ""),
        has_image=decoded.has_image,
        latents=decoded.latents,
    )


def stack(samples: Sequence[PreparedSample], image_size: int, pad_id: int) -> Batch:
    latents = [sample.latents for sample in samples if sample.latents is not None]
    batch = collate(
        [sample.tokens for sample in samples],
        [sample.pixels for sample in samples],
        image_size=0 if latents else image_size,
        pad_id=pad_id,
        sample_index=[sample.sample_index for sample in samples],
        sample_ids=[sample.sample_id for sample in samples],
        captions=[sample.caption for sample in samples],
    )
    return with_latents(batch, latents, [sample.has_image for sample in samples]) if latents else batch


def with_latents(batch: Batch, latents: Sequence[Latents], has_image: Sequence[bool]) -> Batch:
    scales = [kept.scales for kept in latents if kept.scales is not None]
    return replace(
        batch,
        has_image=torch.tensor(has_image),
        latents=torch.stack([kept.values for kept in latents]),
        latent_scales=torch.stack(scales) if scales else None,
    )
