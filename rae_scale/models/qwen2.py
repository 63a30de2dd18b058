"""transformers' Qwen2 by our operations, and on packed sequences (`models/packed_llm.py`).

Letters: P tokens of the run at hand, H heads of queries, Hk of keys and values, D channels of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, Qwen2ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from rae_scale import ops
from rae_scale.models.packed_llm import OutputLayer, packed_attention

ATTENTION = "rae_scale_packed"
"""Under this name transformers' attention interface finds ours."""


class Norm(Qwen2RMSNorm):
    """Its arithmetic is rounded once, at the end, where transformers rounds before the weight too."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.variance_epsilon)


class FeedForward(Qwen2MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu_pair(self.gate_proj(x), self.up_proj(x)))


OURS: dict[type[nn.Module], type[nn.Module]] = {Qwen2RMSNorm: Norm, Qwen2MLP: FeedForward}


def use_our_operations(llm: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """Let `llm` take packed sequences (`run_packed`) and compute by our operations, in place and once.

    A call without packed sequences keeps transformers' attention. Layers keep their place, name and parameters; what
    changes is their class, and so the function of their forward pass.

    Raises:
        ValueError: the feed-forward layers' activation is not the SiLU of Qwen2.
    """
    if llm.config.hidden_act != "silu":
        raise ValueError(f"hidden_act={llm.config.hidden_act!r} of the language model is not silu, which Qwen2 has")
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    llm.config._attn_implementation = ATTENTION
    for layer in llm.model.layers:
        # Sequence parallelism may have put its own in place.
        layer.self_attn.__dict__.setdefault("packed_attention", packed_attention)
    if type(llm.lm_head) is nn.Linear:
        llm.lm_head.__class__ = OutputLayer
    for part in llm.model.modules():
        part.__class__ = OURS.get(type(part), type(part))
    return llm


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, P, D], key and value [1, Hk, P, D]; returns [1, P, H, D]."""
    sequences = kwargs.pop("sequences", None)
    if sequences is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # Rotary embedding leaves queries and keys in the type of the residual stream; inside autocast values have its type.
    q, k, v = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
    return module.packed_attention(q, k, v, sequences, attention_mask, kwargs["scaling"]), None
