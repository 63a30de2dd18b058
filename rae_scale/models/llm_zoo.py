"""Named language models: the published Qwen2.5 sizes, and small ones of the same kind for the demo and the tests."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from rae_scale.config.schema import LLMConfig
from rae_scale.models.pretrained import from_pretrained

if TYPE_CHECKING:
    from transformers import Qwen2Config, Qwen2ForCausalLM

NUM_ADDED_TOKENS = 2  # <im_start> and <im_end>, the last two rows of the vocabulary
ATTENTION_IMPLEMENTATION = "sdpa"


@dataclass(frozen=True)
class LLMSpec:
    """Dimensions of a Qwen2 model, named as in its Hugging Face config. `vocab_size` is the published one."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6

    def to_qwen2(self, vocab_size: int | None = None) -> Qwen2Config:
        """The same model as a transformers config, with `vocab_size` rows where given."""
        from transformers import Qwen2Config

        return Qwen2Config(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            vocab_size=vocab_size or self.vocab_size,
            tie_word_embeddings=self.tie_word_embeddings,
            rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps,
            attn_implementation=ATTENTION_IMPLEMENTATION,
        )


LLM_ZOO = {
    "qwen2.5-1.5b": LLMSpec(1536, 28, 12, 2, 8960, 151_936, tie_word_embeddings=True),
    "qwen2.5-7b": LLMSpec(3584, 28, 28, 4, 18_944, 152_064, tie_word_embeddings=False),
    "qwen2-demo": LLMSpec(128, 2, 4, 2, 256, 512, tie_word_embeddings=True),
    "qwen2-tiny": LLMSpec(48, 2, 4, 2, 96, 320, tie_word_embeddings=False),
}


def build_llm(cfg: LLMConfig, tokenizer_vocab: int | None) -> Qwen2ForCausalLM:
    """Build the language model `cfg.name` with `tokenizer_vocab` embedding rows (None keeps the rows it has).

    Weights come from `cfg.path`, as float32; without a path, and on the meta device, which holds none, they are
    whatever the random initialisation gives.

    Raises:
        ValueError: unknown `model.llm.name`, or `model.llm.path` cannot be read or holds another size.
    """
    from transformers import Qwen2ForCausalLM

    spec = named_llm(cfg)
    if cfg.path is None or torch.get_default_device().type == "meta":
        return Qwen2ForCausalLM(spec.to_qwen2(tokenizer_vocab))
    llm = from_pretrained(
        Qwen2ForCausalLM,
        cfg.path,
        "model.llm.path",
        dtype=torch.float32,
        attn_implementation=ATTENTION_IMPLEMENTATION,
    )
    check_size(llm, spec, cfg)
    if tokenizer_vocab is not None:
        resize_vocabulary(llm, tokenizer_vocab)
    return llm


def named_llm(cfg: LLMConfig) -> LLMSpec:
    """The dimensions of `cfg.name`; ValueError if there is no such name."""
    if cfg.name not in LLM_ZOO:
        raise ValueError(f"model.llm.name={cfg.name!r} is not a named language model; choose {', '.join(LLM_ZOO)}")
    return LLM_ZOO[cfg.name]


def check_size(llm: Qwen2ForCausalLM, spec: LLMSpec, cfg: LLMConfig) -> None:
    """Raise ValueError unless the loaded weights are those of the named size."""
    dimensions = attrgetter("hidden_size", "num_hidden_layers", "num_attention_heads")
    found, named = dimensions(llm.config), dimensions(spec)
    if found != named:
        raise ValueError(
            f"model.llm.path={cfg.path!r} holds hidden_size, layers, heads = {found}, but model.llm.name={cfg.name!r} "
            f"is {named}; set the name that belongs to these weights"
        )


@torch.no_grad()
def resize_vocabulary(llm: Qwen2ForCausalLM, vocab_size: int) -> None:
    """Give the embedding and the output layer `vocab_size` rows, the last two being those of our added tokens.

    The added tokens start at the mean of the others, as in the official release: a random row's logit would stand out
    among those of a trained vocabulary. Weights that already have `vocab_size` rows are left alone: they were trained
    with these tokens.
    """
    if llm.get_input_embeddings().num_embeddings == vocab_size:
        return
    llm.resize_token_embeddings(vocab_size, mean_resizing=False)
    for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        old_rows = layer.weight[:-NUM_ADDED_TOKENS]
        layer.weight[-NUM_ADDED_TOKENS:] = old_rows.mean(dim=0)
