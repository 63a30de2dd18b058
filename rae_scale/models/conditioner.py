"""The conditioner: a Qwen2 language model whose states at learned queries condition the DiT (paper section 3.1).

The queries stand in the assistant's answer, after the text. (The paper says they are prepended to the prompt; its
figure 3 and the official release put them after it, and behind a causal mask only that order lets them see the text.)
The image of an understanding sample stands in the user's turn, as encoder tokens mapped to the model's width.

Shape letters: B batch, L sequence, T image tokens, H the language model's hidden size, C latent channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

IGNORE_LABEL = -100


class ConditionerOutput(NamedTuple):
    query_states: Tensor
    """[B, T, H], zero in samples without an answer image."""
    text_loss_sum: Tensor
    """float32 scalar: cross-entropy summed over the labelled positions."""


class Conditioner(nn.Module):
    """Language model, learned queries, and the projector of user images (Linear, GELU, Linear).

    Every call runs every part, whatever the samples hold, and what is absent is discarded by value: a branch that one
    process takes and another does not would leave sharded engines waiting for each other.
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
        embeds = self.llm.model.embed_tokens(input_ids)
        queries = self.latent_queries.expand(len(input_ids), -1, -1)
        embeds = fill_slots(embeds, self.mm_projector(user_features), user_start)
        embeds = fill_slots(embeds, queries, answer_start)
        visible = visible_positions(attention_mask)
        if self.mask == "query-block":
            visible = visible | within_slots(answer_start, queries.shape[1], input_ids.shape[1])
        hidden = self.llm.model(
            inputs_embeds=embeds, attention_mask=visible[:, None], use_cache=False
        ).last_hidden_state
        states = read_slots(hidden, queries.shape[1], answer_start)
        if labels is None:
            return ConditionerOutput(states, hidden.new_zeros(()))
        return ConditionerOutput(states, text_loss_sum(self.llm.lm_head, hidden, labels))


def visible_positions(attention_mask: Tensor) -> Tensor:
    """bool [B, L, L]: whether query position i sees key position j. Causal, and without the padding [B, L]."""
    length = attention_mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return causal & attention_mask.bool()[:, None, :]


def within_slots(start: Tensor, num_slots: int, length: int) -> Tensor:
    """bool [B, L, L]: pairs of positions that both are slots. What `query-block` adds to the causal mask."""
    in_slot, _ = slot_of_position(start, num_slots, length)
    return in_slot[:, :, None] & in_slot[:, None, :]


def slot_of_position(start: Tensor, num_slots: int, length: int) -> tuple[Tensor, Tensor]:
    """For slots that begin at `start` [B] (-1: none), whether each position is one (bool [B, L]) and which.

    The second result, int64 [B, L], is a valid slot number everywhere and means nothing outside the slots.
    """
    offset = torch.arange(length, device=start.device) - start[:, None]
    in_slot = (start[:, None] >= 0) & (offset >= 0) & (offset < num_slots)
    return in_slot, offset.clamp(0, num_slots - 1)


def fill_slots(embeds: Tensor, values: Tensor, start: Tensor) -> Tensor:
    """Put `values` [B, T, H] into the T positions of `embeds` [B, L, H] from `start` [B] on; -1 leaves a row as it is.

    Gather and where, no assignment and no loop: the gradient reaches both inputs and the host never waits for a value.
    """
    in_slot, slot = slot_of_position(start, values.shape[1], embeds.shape[1])
    spread = values.gather(1, slot[:, :, None].expand(-1, -1, values.shape[2]))
    return torch.where(in_slot[:, :, None], spread.to(embeds.dtype), embeds)


def read_slots(hidden: Tensor, num_slots: int, start: Tensor) -> Tensor:
    """The `num_slots` rows of `hidden` [B, L, H] from `start` [B] on, as [B, num_slots, H]; zeros where it is -1."""
    position = start[:, None] + torch.arange(num_slots, device=start.device)
    position = position.clamp(0, hidden.shape[1] - 1)  # a batch of text only may be shorter than the slots
    states = hidden.gather(1, position[:, :, None].expand(-1, -1, hidden.shape[2]))
    return torch.where((start >= 0)[:, None, None], states, 0.0)


def text_loss_sum(lm_head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross-entropy summed over labelled positions, float32 scalar.

    hidden: [B, L, H]; labels: int64 [B, L], -100 where ignored. Logits exist only at labelled positions: a row of
    151,667 of them for each image slot would outweigh everything else in memory.
    """
    targets = labels[:, 1:].flatten()
    rows = (targets != IGNORE_LABEL).nonzero().squeeze(1)
    if len(rows) == 0:
        # The head runs on one row even so, as on every other process; its label is ignored, so loss and gradient are 0.
        rows = rows.new_zeros(1)
    logits = lm_head(hidden[:, :-1].flatten(0, 1)[rows])
    return F.cross_entropy(logits.float(), targets[rows], ignore_index=IGNORE_LABEL, reduction="sum")
