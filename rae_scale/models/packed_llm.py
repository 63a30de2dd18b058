"""What a Qwen2 model of whatever origin needs to run on packed sequences: all tokens of a batch in one run without
padding, and attention within each sequence. `models/qwen2.py` makes transformers' model such a one.

Letters: P tokens of the run at hand, H heads of queries, Hk of keys and values, D channels of a head, B sequences of L
tokens at most.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from rae_scale import ops

LogitsLoss = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""(layer that makes logits of hidden states, hidden states) -> loss."""

PackedAttention = Callable[[Tensor, Tensor, Tensor, ops.Sequences, Tensor | None, float], Tensor]
"""q [1, P, H, D], k and v [1, P, Hk, D], sequences of N tokens, mask bool [B, L, L] or None for causal, scale ->
[1, P, H, D]."""


class OutputLayer(nn.Linear):
    """The linear layer from hidden states to logits, which can also be asked for what is made of them."""

    def forward(self, hidden: Tensor, loss: LogitsLoss | None = None) -> Tensor:
        """Logits [..., V] of `hidden` [..., C]; with `loss`, what that gives for the layer's product and `hidden`.

        Inside of the call, however often it asks for the product: engines gather a layer's weight once for each call.
        """
        return super().forward(hidden) if loss is None else loss(super().forward, hidden)


def run_packed(
    model: nn.Module, embeds: Tensor, positions: Tensor, sequences: ops.Sequences, mask: Tensor | None = None
) -> Tensor:
    """The last hidden states [P, hidden] of a Qwen2Model for the tokens `embeds` [P, hidden] of packed `sequences`.

    positions: int64 [P], each token's place in its sequence, for the rotary embedding.
    mask: bool [B, L, L], which place of a sequence sees which; None is causal.
    """
    output = model(
        inputs_embeds=embeds[None],
        # As a mapping it is used as it is; otherwise transformers would make a mask of [N, N].
        attention_mask={"full_attention": mask},
        position_ids=positions[None],
        use_cache=False,
        sequences=sequences,
    )
    return output.last_hidden_state[0]


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, sequences: ops.Sequences, mask: Tensor | None, scale: float
) -> Tensor:
    """`PackedAttention` where all tokens and heads are at hand."""
    out = ops.varlen_attention(q[0], k[0], v[0], sequences, is_causal=mask is None, attn_mask=mask, scale=scale)
    return out[None]
