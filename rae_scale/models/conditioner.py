"""The conditioner: a Qwen2 language model whose states at learned queries condition the DiT (paper section 3.1).

The queries stand in the assistant's answer, after the text. (The paper says they are prepended to the prompt; its
figure 3 and the official release put them after it, and behind a causal mask only that order lets them see the text.)
The image of an understanding sample stands in the user's turn, as encoder tokens mapped to the model's width.

The language model runs on the real tokens of a batch, packed into one run without padding (`models/packing.py`).

Shape letters: B batch, L sequence, P packed tokens, T image tokens, H the language model's hidden size, C latent
channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from rae_scale import ops
from rae_scale.models.packed_llm import OutputLayer, run_packed
from rae_scale.models.packing import (
    IGNORE_LABEL,
    TextLayout,
    fill_slots,
    next_tokens,
    pack,
    query_block_mask,
    read_slots,
)
from rae_scale.models.tokens import AllTokens, Tokens

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM

CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""As `ops.cross_entropy_sum`: logits [N, V], targets int64 [N] -> float32 scalar, summed over N."""


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
        if not isinstance(llm.lm_head, OutputLayer):
            # Importing transformers takes seconds, and who gives a model of its has paid for it.
            from rae_scale.models.qwen2 import use_our_operations

            use_our_operations(llm)
        self.llm = llm
        self.mask = mask
        self.tokens: Tokens = AllTokens()
        self.cross_entropy: CrossEntropy = ops.cross_entropy_sum
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
        layout: TextLayout | None = None,
    ) -> ConditionerOutput:
        """Run the language model over a batch of conversations.

        input_ids:      int64 [B, L], any valid id in the image slots; attention_mask: [B, L], 0 on padding.
        answer_start:   int64 [B], first of the T consecutive slots of the queries, -1 for none.
        user_start:     int64 [B], first of the T slots of `user_features`, -1 for none.
        user_features:  [B, T, C] encoder tokens, anything finite in samples that have none.
        labels:         int64 [B, L] aligned with `input_ids`, -100 where nothing is to be learned; None: no text loss.
        layout:         `TextLayout.of(attention_mask, labels)`; None asks the device, which makes the host wait for it.
        """
        layout = layout or TextLayout.of(attention_mask, labels)
        text = pack(attention_mask, layout, self.tokens)
        embeds = self.llm.model.embed_tokens(text.take(input_ids))
        queries = self.latent_queries.expand(len(input_ids), -1, -1)
        embeds = fill_slots(embeds, self.mm_projector(user_features), user_start, text)
        embeds = fill_slots(embeds, queries, answer_start, text)
        mask = None
        if self.mask == "query-block":
            mask = query_block_mask(answer_start, queries.shape[1], text)
        hidden = run_packed(self.llm.model, embeds, text.column, text.sequences, mask)
        states = self.tokens.share(read_slots(hidden, queries.shape[1], answer_start, text))
        if labels is None:
            return ConditionerOutput(states, hidden.new_zeros(()))
        targets = text.take(next_tokens(labels)).where(text.real, IGNORE_LABEL)
        return ConditionerOutput(states, self.text_loss_sum(hidden, targets, text.labelled_here(layout)))

    def text_loss_sum(self, hidden: Tensor, targets: Tensor, labelled: int) -> Tensor:
        """Cross-entropy summed over labelled positions, float32 scalar.

        hidden: [P, H]; targets: int64 [P], the token that each position shall predict, -100 where ignored.
        labelled: how many are not ignored. Of none, the head runs on one ignored row, as on every other process: loss
            and gradient 0.
        Logits exist only at labelled positions, and of these in chunks: a row of 151,667 of them for each image slot
        would outweigh everything else in memory. However many chunks there are, the output layer is called once: as
        often as on every other process.
        """
        rows = torch.nonzero_static(targets != IGNORE_LABEL, size=max(1, labelled), fill_value=0)[:, 0]

        def loss(layer: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
            vocab_size = self.llm.config.vocab_size
            return ops.linear_cross_entropy(layer, hidden, targets[rows], vocab_size, self.cross_entropy)

        return self.llm.lm_head(hidden[rows], loss=loss)
