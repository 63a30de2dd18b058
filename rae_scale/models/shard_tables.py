"""How tensor parallelism splits each model: a table from the names of its layers to what becomes of them.

The residual stream of the DiT is split along hidden, and with it every weight and every activation (norms, modulation,
gates work on slices); that of Qwen2 is whole on every rank, as in Megatron-LM. `rae_scale/parallel/apply.py` swaps the
layers, slices their weights and knows from here how to put checkpoints together; the models know nothing of it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LayerKind = Literal[
    "column",
    "copy-column",
    "gather-column",
    "scatter-row",
    "sum-row",
    "norm",
    "shared-norm",
    "embedding",
    "buffer",
    "whole",
]


@dataclass(frozen=True)
class Rule:
    """What becomes of a layer.

    kind:   column        linear, output channels split, input whole
            copy-column   the same, and the gradient of its input is summed over ranks
            gather-column linear, output channels split, input a slice that is gathered
            scatter-row   linear, input channels split, output a slice
            sum-row       linear, input channels split, output whole
            norm          RMSNorm of slices
            shared-norm   RMSNorm of single heads, the same weight for those of every rank
            embedding     rows split, output whole
            buffer        a constant table, last dimension split
            whole         every rank has all of it and computes the same
    groups: how many tensors are packed along the output channels (query, key, value: 3), each of which is split.
    feeds_split: the output is whole and layers that are split read it: its gradient is summed over ranks.
    """

    kind: LayerKind
    groups: int = 1
    feeds_split: bool = False

    def split_dim(self, parameter: str) -> int | None:
        """The dimension along which the layer's "weight" or "bias" is split; None: every rank holds all of it."""
        if self.kind in ("whole", "shared-norm"):
            return None
        if self.kind in ("scatter-row", "sum-row"):
            return 1 if parameter == "weight" else 0 if self.kind == "scatter-row" else None
        return 0


Table = Mapping[str, Rule]
"""Names of layers, of constants and of parameters that belong to no layer, `*` for any number, to rules."""

_BLOCKS: Table = {
    "blocks.*.norm1": Rule("norm"),
    "blocks.*.norm2": Rule("norm"),
    "blocks.*.attn.qkv": Rule("gather-column", groups=3),
    "blocks.*.attn.q_norm": Rule("shared-norm"),
    "blocks.*.attn.k_norm": Rule("shared-norm"),
    "blocks.*.attn.proj": Rule("scatter-row"),
    "blocks.*.mlp.w12": Rule("gather-column", groups=2),
    "blocks.*.mlp.w3": Rule("scatter-row"),
    "blocks.*.adaln": Rule("column", groups=6),
}

DIT: Table = {
    "pos_embed": Rule("buffer"),
    "x_embed": Rule("copy-column"),
    "condition": Rule("whole", feeds_split=True),  # the adaLN layers of all blocks read it: one sum, not one per block
    **_BLOCKS,
    "head.x_embed": Rule("copy-column"),
    "head.condition": Rule("sum-row", feeds_split=True),
    **{f"head.{name}": rule for name, rule in _BLOCKS.items()},
    "final.norm": Rule("norm"),
    "final.adaln": Rule("column", groups=2),
    "final.linear": Rule("sum-row"),
}

QWEN2: Table = {
    "model.embed_tokens": Rule("embedding"),
    "model.layers.*.input_layernorm": Rule("whole", feeds_split=True),
    "model.layers.*.self_attn.q_proj": Rule("column"),
    "model.layers.*.self_attn.k_proj": Rule("column"),
    "model.layers.*.self_attn.v_proj": Rule("column"),
    "model.layers.*.self_attn.o_proj": Rule("sum-row"),
    "model.layers.*.post_attention_layernorm": Rule("whole", feeds_split=True),
    "model.layers.*.mlp.gate_proj": Rule("column"),
    "model.layers.*.mlp.up_proj": Rule("column"),
    "model.layers.*.mlp.down_proj": Rule("sum-row"),
    "model.norm": Rule("whole"),
    "lm_head": Rule("copy-column"),
}

SCALE_RAE: Table = {
    **{f"conditioner.llm.{name}": rule for name, rule in QWEN2.items()},
    "conditioner.latent_queries": Rule("whole"),
    "conditioner.mm_projector": Rule("whole"),
    "connector": Rule("whole"),
    **{f"dit.{name}": rule for name, rule in DIT.items()},
}

TABLES: Mapping[str, Table] = {"ScaleRAE": SCALE_RAE}
"""Of the models that can be split, by the name of their class."""


def rule_of(parameter: str, table: Table) -> Rule | None:
    """The rule of the layer that a parameter, by its full name, belongs to; None if the table says nothing of it."""
    name = parameter
    while name:
        for pattern, rule in table.items():
            if fnmatch.fnmatchcase(name, pattern):
                return rule
        name = name.rpartition(".")[0]
    return None
