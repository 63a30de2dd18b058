"""transformers' Qwen2 written out in PyTorch, for plans: the same parameters, calls of modules and operators, to the
last one, without the seconds that importing transformers takes. A test holds the two equal.

Only what training runs is here: packed sequences (`models/packed_llm.py`), no cache, no generation, no weights to load.

Letters: P tokens of the run at hand, H heads of queries or keys, D channels of a head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rae_scale import ops
from rae_scale.config.schema import LLMConfig
from rae_scale.models.llm_zoo import LLMSpec, named_llm
from rae_scale.models.packed_llm import OutputLayer, PackedAttention, packed_attention


class Norm(nn.Module):
    def __init__(self, spec: LLMSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(spec.hidden_size))
        self.eps = spec.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class FeedForward(nn.Module):
    def __init__(self, spec: LLMSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu_pair(self.gate_proj(x), self.up_proj(x)))


class Attention(nn.Module):
    packed_attention: PackedAttention

    def __init__(self, spec: LLMSpec) -> None:
        super().__init__()
        self.head_dim = spec.hidden_size // spec.num_attention_heads
        keys = spec.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.k_proj = nn.Linear(spec.hidden_size, keys)
        self.v_proj = nn.Linear(spec.hidden_size, keys)
        self.o_proj = nn.Linear(spec.hidden_size, spec.hidden_size, bias=False)
        self.packed_attention = packed_attention

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        sequences: ops.Sequences,
    ) -> tuple[Tensor, None]:
        """[1, P, hidden] to the same, and no scores."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = rotated(q, k, *position_embeddings)
        q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
        out = self.packed_attention(q, k, v, sequences, attention_mask, self.head_dim**-0.5)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), None


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, H, P, D], turned by the angles of their tokens [1, P, D]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (q * cos) + (turned(q) * sin), (k * cos) + (turned(k) * sin)


def turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((-second, first), dim=-1)


class Layer(nn.Module):
    def __init__(self, spec: LLMSpec) -> None:
        super().__init__()
        self.self_attn = Attention(spec)
        self.mlp = FeedForward(spec)
        self.input_layernorm = Norm(spec)
        self.post_attention_layernorm = Norm(spec)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        # By names, as transformers hands them over: what a hook of the attention layer sees of its inputs is none.
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.mlp(self.post_attention_layernorm(hidden_states))
        return residual + hidden_states


class RotaryEmbedding(nn.Module):
    inv_freq: Tensor

    def __init__(self, spec: LLMSpec) -> None:
        super().__init__()
        head_dim = spec.hidden_size // spec.num_attention_heads
        # On the CPU whatever device is the default: the meta device takes long to find out that it computes nothing.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
        self.register_buffer("inv_freq", torch.empty(head_dim // 2), persistent=False)
        self.inv_freq.copy_(1.0 / spec.rope_theta**exponents)

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, P, D] in the type of x."""
        frequencies = self.inv_freq[None, :, None].float().expand(position_ids.shape[0], -1, 1)
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # there is none on meta
            angles = (frequencies @ position_ids[:, None, :].float()).transpose(1, 2)
            both = torch.cat((angles, angles), dim=-1)
            cos, sin = both.cos() * 1.0, both.sin() * 1.0  # the scaling of other kinds of rotary embedding
        return cos.to(x.dtype), sin.to(x.dtype)


class LastHidden(NamedTuple):
    last_hidden_state: Tensor


class Decoder(nn.Module):
    """Qwen2Model."""

    def __init__(self, spec: LLMSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.num_hidden_layers))
        self.norm = Norm(spec)
        self.rotary_emb = RotaryEmbedding(spec)

    def forward(
        self,
        *,
        inputs_embeds: Tensor,
        attention_mask: dict[str, Tensor | None],
        position_ids: Tensor,
        use_cache: bool,
        sequences: ops.Sequences,
    ) -> LastHidden:
        """As `models.packed_llm.run_packed` calls it."""
        hidden_states = inputs_embeds
        angles = self.rotary_emb(hidden_states, position_ids)
        mask = attention_mask["full_attention"]
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, position_embeddings=angles, sequences=sequences)
        return LastHidden(self.norm(hidden_states))


class PlannedQwen2(nn.Module):
    """Qwen2ForCausalLM by our operations. `config` has the names of a transformers config."""

    def __init__(self, spec: LLMSpec) -> None:
        super().__init__()
        self.config = spec
        self.model = Decoder(spec)
        self.lm_head = OutputLayer(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


def build_planned_llm(cfg: LLMConfig, tokenizer_vocab: int | None) -> PlannedQwen2:
    """As `models.llm_zoo.build_llm` without `cfg.path`. ValueError: unknown `model.llm.name`."""
    spec = named_llm(cfg)
    return PlannedQwen2(replace(spec, vocab_size=tokenizer_vocab or spec.vocab_size))
