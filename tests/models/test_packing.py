"""Padded batches as one run of tokens: where everything goes and comes from, in the whole run and in slices of it."""

from __future__ import annotations

import torch
from torch import Tensor

from rae_scale.models.packing import (
    IGNORE_LABEL,
    PackedText,
    TextLayout,
    fill_slots,
    next_tokens,
    pack,
    query_block_mask,
    read_slots,
)
from rae_scale.models.tokens import AllTokens

T = 3  # slots of an image
# The first sample fills the batch, the second is short, the third has a hidden token on its left.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
LABELS = torch.tensor([[-100, 7, -100, -100, -100, 8], [-100, 9, 9, -100, -100, -100], [-100] * 6])


class Slice(AllTokens):
    """The `rank`-th of four equal runs, without a group to talk to."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def padded(self, length: int) -> int:
        return length + -length % 4

    def first(self, length: int) -> int:
        return self.rank * length // 4

    def positions(self, length: int, device: torch.device) -> Tensor:
        return torch.arange(length // 4) + self.first(length)


def packed(rank: int | None = None) -> PackedText:
    return pack(MASK, TextLayout.of(MASK, LABELS), AllTokens() if rank is None else Slice(rank))


def test_layout_counts_tokens_and_finds_labels() -> None:
    layout = TextLayout.of(MASK, LABELS)
    assert layout.lengths == (6, 4, 5)
    assert layout.labelled == (0, 4, 6, 7)  # the tokens before those that have a label
    assert TextLayout.of(MASK).labelled == ()


def test_run_holds_the_real_tokens_in_order() -> None:
    text = packed()
    assert text.take(torch.arange(18).view(3, 6)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17]
    assert text.column.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 1, 2, 3, 4, 5]
    assert text.real.all()
    assert text.sequences.starts.tolist() == [0, 6, 10, 15] and text.sequences.starts.dtype == torch.int32
    assert (text.sequences.total, text.sequences.max_length) == (15, 6)
    assert text.place[MASK.bool()].tolist() == list(range(15))


def test_slices_make_up_the_run_with_filling_at_its_end() -> None:
    whole, parts = packed(), [packed(rank) for rank in range(4)]
    assert torch.equal(torch.cat([part.column for part in parts])[:15], whole.column)
    assert torch.cat([part.real for part in parts]).tolist() == [True] * 15 + [False]
    assert [part.sequences.total for part in parts] == [15] * 4
    layout = TextLayout.of(MASK, LABELS)
    assert [part.labelled_here(layout) for part in parts] == [1, 3, 0, 0]
    assert whole.labelled_here(layout) == 4


def test_fill_and_read_slots_are_inverse_and_leave_the_rest() -> None:
    text = packed()
    embeds, values = torch.randn(15, 5), torch.randn(3, T, 5)
    start = torch.tensor([-1, 0, 3])
    filled = fill_slots(embeds, values, start, text)
    assert torch.equal(filled[:6], embeds[:6])
    assert torch.equal(filled[6:9], values[1])
    assert torch.equal(filled[9:12], embeds[9:12])
    assert torch.equal(filled[12:], values[2])
    read = read_slots(filled, T, start, text)
    assert torch.equal(read, values * torch.tensor([0.0, 1.0, 1.0])[:, None, None])
    # In slices of the run: each fills and reads its own, and the sum is the whole.
    slices = [packed(rank) for rank in range(4)]
    padded = torch.cat([embeds, torch.zeros(1, 5)]).split(4)
    parts = [fill_slots(part, values, start, text) for part, text in zip(padded, slices, strict=True)]
    assert torch.equal(torch.cat(parts)[:15], filled)
    assert torch.equal(sum(read_slots(part, T, start, text) for part, text in zip(parts, slices, strict=True)), read)


def test_filling_takes_no_slot() -> None:
    """It stands for no position, though it reads some: a slot there must not put a second copy of a query in."""
    last = packed(3)
    filled = fill_slots(torch.zeros(4, 5), torch.ones(3, T, 5), torch.tensor([0, -1, -1]), last)
    assert not filled.any()


def test_slots_that_no_sample_has_may_be_more_than_the_text() -> None:
    short = torch.ones(2, 2)
    text = pack(short, TextLayout.of(short), AllTokens())
    assert torch.equal(read_slots(torch.randn(4, 5), T, torch.tensor([-1, -1]), text), torch.zeros(2, T, 5))


def test_query_block_mask_is_causal_and_slots_see_each_other() -> None:
    start = torch.tensor([1, -1, 2])
    mask = query_block_mask(start, T, packed())
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = causal.repeat(3, 1, 1)
    expected[0, 1:4, 1:4] = True
    expected[2, 1:4, 1:4] = True  # the token before position 2 is the first of its sample: one is hidden
    assert torch.equal(mask, expected)


def test_next_tokens() -> None:
    assert next_tokens(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, IGNORE_LABEL]]
