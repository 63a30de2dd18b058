"""The real tokens of a padded batch of texts as one run, sample after sample.

Letters: B samples, L positions of the padded batch, N tokens of the run (filled up so that its shares are equal), P of
them here, T slots of an image, H channels.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rae_scale import ops
from rae_scale.models.tokens import Tokens

IGNORE_LABEL = -100


@dataclass(frozen=True)
class TextLayout:
    """What the host must know of a batch: sizes of tensors. Asking the device would mean waiting for it."""

    lengths: tuple[int, ...]
    """Tokens of each sample."""
    labelled: tuple[int, ...]
    """The tokens of the run whose next token is to be learned, ascending."""

    @classmethod
    def of(cls, attention_mask: Tensor, labels: Tensor | None = None) -> TextLayout:
        """Of a padded batch, both [B, L], -100 being no label. On the CPU this is cheap; elsewhere it waits."""
        real = attention_mask.bool().cpu()
        lengths = tuple(real.sum(dim=1).tolist())
        if labels is None:
            return cls(lengths, ())
        labelled = next_tokens(labels.cpu())[real] != IGNORE_LABEL
        return cls(lengths, tuple(labelled.nonzero()[:, 0].tolist()))


class PackedText(NamedTuple):
    """Where the tokens at hand come from, and where each position of the batch has gone."""

    sequences: ops.Sequences
    """The samples in the run."""
    first: int
    """Which token of the run is the first here."""
    row: Tensor
    """int64 [P]: the sample of each token here; any for the filling, which belongs to none."""
    column: Tensor
    """int64 [P]: its position in the padded batch."""
    real: Tensor
    """bool [P]: whether it is a token at all, not filling."""
    place: Tensor
    """int64 [B, L]: the token of the run that stands at each position; of no meaning on the padding."""

    def take(self, padded: Tensor) -> Tensor:
        """[P, ...] of the tokens here, from `padded` [B, L, ...]."""
        return padded[self.row, self.column]

    def labelled_here(self, layout: TextLayout) -> int:
        """How many of the tokens here have a label."""
        end = self.first + len(self.row)
        return bisect_left(layout.labelled, end) - bisect_left(layout.labelled, self.first)


def pack(attention_mask: Tensor, layout: TextLayout, tokens: Tokens) -> PackedText:
    """The run of the tokens that `attention_mask` [B, L] shows, and the share of it that `tokens` gives."""
    real = attention_mask.bool()
    total = sum(layout.lengths)
    length = tokens.padded(total)
    here = tokens.positions(length, real.device)
    flat = torch.nonzero_static(real.flatten(), size=length, fill_value=-1)[here, 0]
    from_batch = flat.clamp(min=0)
    starts = F.pad(real.sum(dim=1).cumsum(0), (1, 0)).int()
    return PackedText(
        sequences=ops.Sequences(starts, total, max(layout.lengths)),
        first=tokens.first(length),
        row=from_batch // real.shape[1],
        column=from_batch % real.shape[1],
        real=flat >= 0,
        place=(real.flatten().cumsum(0) - 1).view(real.shape),
    )


def next_tokens(labels: Tensor) -> Tensor:
    """What each position of `labels` [B, L] shall predict: the label after it, nothing at the end."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_LABEL)], dim=1)


def fill_slots(embeds: Tensor, values: Tensor, start: Tensor, text: PackedText) -> Tensor:
    """Put `values` [B, T, H] into the T slots that begin at the positions `start` [B], as far as they are among the
    tokens `embeds` [P, H]; a sample with -1 has none.

    Gather and where, no assignment and no loop: the gradient reaches both inputs and the host never waits for a value.
    """
    num_slots = values.shape[1]
    start = start[text.row]
    offset = text.column - start
    in_slot = text.real & (start >= 0) & (offset >= 0) & (offset < num_slots)
    spread = values.flatten(0, 1).index_select(0, text.row * num_slots + offset.clamp(0, num_slots - 1))
    return torch.where(in_slot[:, None], spread.to(embeds.dtype), embeds)


def read_slots(hidden: Tensor, num_slots: int, start: Tensor, text: PackedText) -> Tensor:
    """The slots that begin at the positions `start` [B], [B, T, H], from the tokens `hidden` [P, H]; zeros where it is
    -1 or a slot is not among the tokens here."""
    column = start[:, None] + torch.arange(num_slots, device=start.device)
    place = text.place.gather(1, column.clamp(0, text.place.shape[1] - 1)) - text.first
    here = (start[:, None] >= 0) & (place >= 0) & (place < len(hidden))
    states = hidden[place.clamp(0, len(hidden) - 1)]
    return torch.where(here[:, :, None], states, 0.0)


def query_block_mask(start: Tensor, num_slots: int, text: PackedText) -> Tensor:
    """bool [B, longest, longest]: which token of a sample sees which. Causal, and all slots see each other.

    start: int64 [B], the position of the first of the `num_slots` slots, -1 for none.
    """
    ordinal = torch.arange(text.sequences.max_length, device=start.device)
    # The tokens of a sample are counted without what its mask hides, so a slot's position is not its place.
    first = text.place.gather(1, start.clamp(min=0)[:, None]) - text.sequences.starts[:-1, None]
    in_slot = (start[:, None] >= 0) & (ordinal >= first) & (ordinal < first + num_slots)
    return (ordinal[:, None] >= ordinal) | (in_slot[:, :, None] & in_slot[:, None, :])
