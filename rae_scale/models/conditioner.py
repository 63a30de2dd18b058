"""The conditioner: a Qwen2 language model whose states at learned queries condition the DiT (paper section 3.1).

The queries stand in the assistant's answer, after the text. (The paper says they are prepended to the prompt; its
figure 3 and the official release put them after it, and behind a causal mask only that order lets them see the text.)
The image of an understanding sample stands in the user's turn, as encoder tokens mapped to the model's width.

Shape letters: B batch, L sequence, T image tokens, H the language model's hidden size, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_scale.models.tokens import AllTokens, Tokens

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

IGNORE_LABEL = -100

CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""logits [N, V], targets int64 [N] -> float32 scalar, summed over N."""


class ConditionerOutput(NamedTuple):
    query_states: Tensor
    """[B, T, H] (or the share of `tokens`, [B, P, H]), zero in samples without an answer image."""
    text_loss_sum: Tensor
    """float32 scalar: cross-entropy summed over the labelled positions at hand."""


class Conditioner(nn.Module):
    """Language model, learned queries, and the projector of user images (Linear, GELU, Linear).

    Every call runs every part, whatever the samples hold, and what is absent is discarded by value: a branch that one
    process takes and another does not would leave sharded engines waiting for each other.

    `tokens` and `cross_entropy` are there to be replaced: by a slice of the sequence, by a loss over a slice of the
    vocabulary.
    """

    def __init__(
        self,
        llm: Qwen2ForCausalLM,
        *,
        num_queries: int,
        user_channels: int,
        mask: Literal["causal", "query-block"] = "causal",
    ) -> None:
        super().__init__()
        hidden_size = llm.config.hidden_size
        self.llm = llm
        self.mask = mask
        self.tokens: Tokens = AllTokens()
        self.cross_entropy: CrossEntropy = cross_entropy_sum
        self.latent_queries = nn.Parameter(torch.randn(num_queries, hidden_size) / math.sqrt(hidden_size))
        self.mm_projector = nn.Sequential(
            nn.Linear(user_channels, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        answer_start: Tensor,
        user_start: Tensor,
        user_features: Tensor,
        labels: Tensor | None = None,
    ) -> ConditionerOutput:
        """Run the language model over a batch of conversations.

        input_ids:      int64 [B, L], any valid id in the image slots; attention_mask: [B, L], 0 on right padding.
        answer_start:   int64 [B], first of the T consecutive slots of the queries, -1 for none.
        user_start:     int64 [B], first of the T slots of `user_features`, -1 for none.
        user_features:  [B, T, C] encoder tokens, anything finite in samples that have none.
        labels:         int64 [B, L] aligned with `input_ids`, -100 where nothing is to be learned; None: no text loss.
        """
        length = self.tokens.padded(input_ids.shape[1])
        positions = self.tokens.positions(length, input_ids.device)
        attention_mask = pad_to(attention_mask, length, 0)
        embeds = self.llm.model.embed_tokens(pad_to(input_ids, length, 0)[:, positions])
        queries = self.latent_queries.expand(len(input_ids), -1, -1)
        embeds = fill_slots(embeds, self.mm_projector(user_features), user_start, positions)
        embeds = fill_slots(embeds, queries, answer_start, positions)
        visible = visible_positions(attention_mask)
        if self.mask == "query-block":
            visible = visible | within_slots(answer_start, queries.shape[1], length)
        hidden = self.llm.model(
            inputs_embeds=embeds,
            attention_mask=visible[:, None],
            position_ids=positions[None],
            use_cache=False,
        ).last_hidden_state
        states = self.tokens.share(read_slots(hidden, queries.shape[1], answer_start, positions))
        if labels is None:
            return ConditionerOutput(states, hidden.new_zeros(()))
        targets = next_tokens(pad_to(labels, length, IGNORE_LABEL))[:, positions]
        return ConditionerOutput(states, self.text_loss_sum(hidden, targets))

    def text_loss_sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy summed over labelled positions, float32 scalar.

        hidden: [B, P, H]; targets: int64 [B, P], the token that each position shall predict, -100 where ignored.
        Logits exist only at labelled positions: a row of 151,667 of them for each image slot would outweigh everything
        else in memory.
        """
        flat = targets.flatten()
        rows = (flat != IGNORE_LABEL).nonzero().squeeze(1)
        if len(rows) == 0:
            # The head runs on one row even so, as on every other process; its label is ignored: loss and gradient 0.
            rows = rows.new_zeros(1)
        return self.cross_entropy(self.llm.lm_head(hidden.flatten(0, 1)[rows]), flat[rows])


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of the cross-entropy, float32 scalar. logits: [N, V]; targets: int64 [N], -100 where ignored."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_LABEL, reduction="sum")


def next_tokens(labels: Tensor) -> Tensor:
    """What each position of `labels` [B, L] shall predict: the label after it, nothing at the end."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_LABEL)], dim=1)


def pad_to(tensor: Tensor, length: int, value: int) -> Tensor:
    """`tensor` [B, L] filled up on the right with `value` to [B, length]."""
    return F.pad(tensor, (0, length - tensor.shape[1]), value=value)


def visible_positions(attention_mask: Tensor) -> Tensor:
    """bool [B, L, L]: whether query position i sees key position j. Causal, and without the padding [B, L]."""
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return causal & attention_mask.bool()[:, None, :]


def within_slots(start: Tensor, num_slots: int, length: int) -> Tensor:
    """bool [B, L, L]: pairs of positions that both are slots. What `query-block` adds to the causal mask."""
    in_slot, _ = slot_of_position(start, num_slots, torch.arange(length, device=start.device))
    return in_slot[:, :, None] & in_slot[:, None, :]


def slot_of_position(start: Tensor, num_slots: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """For slots that begin at `start` [B] (-1: none), whether each of the `positions` [P] is one and which.

    Returns bool [B, P] and int64 [B, P], the latter a valid slot number everywhere, of no meaning outside the slots.
    """
    offset = positions - start[:, None]
    in_slot = (start[:, None] >= 0) & (offset >= 0) & (offset < num_slots)
    return in_slot, offset.clamp(0, num_slots - 1)


def fill_slots(embeds: Tensor, values: Tensor, start: Tensor, positions: Tensor) -> Tensor:
    """Put `values` [B, T, H] into the T slots that begin at `start` [B], as far as they are among `positions` [P] of
    `embeds` [B, P, H]; -1 leaves a row as it is.

    Gather and where, no assignment and no loop: the gradient reaches both inputs and the host never waits for a value.
    """
    in_slot, slot = slot_of_position(start, values.shape[1], positions)
    spread = values.gather(1, slot[:, :, None].expand(-1, -1, values.shape[2]))
    return torch.where(in_slot[:, :, None], spread.to(embeds.dtype), embeds)


def read_slots(hidden: Tensor, num_slots: int, start: Tensor, positions: Tensor) -> Tensor:
    """The slots that begin at `start` [B], [B, num_slots, H]; zeros where it is -1 or a slot is not among `positions`.

    hidden: [B, P, H], rows of the consecutive `positions` [P].
    """
    place = start[:, None] + torch.arange(num_slots, device=start.device) - positions[0]
    here = (start[:, None] >= 0) & (place >= 0) & (place < hidden.shape[1])
    place = place.clamp(0, hidden.shape[1] - 1)
    states = hidden.gather(1, place[:, :, None].expand(-1, -1, hidden.shape[2]))
    return torch.where(here[:, :, None], states, 0.0)
