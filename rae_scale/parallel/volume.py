"""What tensor and sequence parallel layers send in one micro-step: exact payloads in closed form.

The other half of a step's communication, beside that of the engines (`rae_scale/engines/communication.py`); `Ledger`
measures both. Plain arithmetic on dimensions. Letters: M tokens of one rank's slice, h hidden size.

Per DiT block and direction of the pass, tensor parallelism gathers two inputs and scatters two outputs of [M, h] and
sums two numbers per token; backward gathers the two inputs once more, which forward did not keep.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rae_scale import ops
from rae_scale.config.schema import ParallelConfig
from rae_scale.models.dit import DiTConfig
from rae_scale.parallel.ledger import Kind, Volume, group_name, sizes_of

if TYPE_CHECKING:
    from transformers import Qwen2Config

    from rae_scale.models.llm_zoo import LLMSpec

FLOAT32 = 4


@dataclass(frozen=True)
class MicroStep:
    """What the layers of one rank are given in a forward pass and its backward pass.

    batch:        samples of the micro-batch.
    text_tokens:  of all its samples, image slots included.
    labelled:     tokens of this rank's slice that have a label.
    product_bytes: of an element of what matrix products take and give: 4, or 2 under bfloat16 autocast.
    weight_bytes:  of an element of the weights that layers are handed, and so of the language model's residual stream:
                   2 where an engine gathers them in bfloat16.
    recomputed:   blocks compute forward once more in backward (`engine.activation_checkpointing=full`).
    encodes:      the encoder runs, shared over sp x tp; with `data.latent_cache` it does not.
    """

    batch: int
    text_tokens: int
    labelled: int
    product_bytes: int = FLOAT32
    weight_bytes: int = FLOAT32
    recomputed: bool = False
    encodes: bool = True


def layers_volume(
    dit: DiTConfig, llm: LLMSpec | Qwen2Config, micro_step: MicroStep, parallel: ParallelConfig
) -> Volume:
    """Payload bytes by (kind, group) of the whole model and of sharing the encoder's work, in one micro-step."""
    return +_layers(dit, llm, micro_step, parallel).volume


def layers_calls(
    dit: DiTConfig, llm: LLMSpec | Qwen2Config, micro_step: MicroStep, parallel: ParallelConfig
) -> Counter[tuple[Kind, str]]:
    """The number of collectives that `layers_volume` is the payload of, by (kind, group)."""
    return +_layers(dit, llm, micro_step, parallel).calls


def _layers(dit: DiTConfig, llm: LLMSpec | Qwen2Config, micro_step: MicroStep, parallel: ParallelConfig) -> _Volume:
    ledger = _Volume(parallel)
    _dit(ledger, dit, micro_step, parallel)
    _qwen2(ledger, dit, llm, micro_step, parallel)
    if micro_step.encodes:
        ranks = parallel.sp * parallel.tp
        encoded = -(-micro_step.batch // ranks) * ranks
        ledger.add("all_gather", "sample", encoded * dit.num_tokens * dit.in_channels * FLOAT32)
    return ledger


class _Volume:
    def __init__(self, parallel: ParallelConfig) -> None:
        self.volume = Volume()
        self.calls: Counter[tuple[Kind, str]] = Counter()
        self.sizes = sizes_of(parallel)

    def add(self, kind: Kind, group: str, payload: int, calls: int = 1) -> None:
        """payload: of all `calls` together."""
        name = group_name(group, self.sizes)
        if name is not None:
            self.volume[kind, name] += payload
            self.calls[kind, name] += calls


def _dit(ledger: _Volume, dit: DiTConfig, step: MicroStep, parallel: ParallelConfig) -> None:
    tokens = step.batch * dit.num_tokens // parallel.sp
    widths = [(dit.hidden_size, dit.depth, dit.num_heads)]
    ledger.add("all_reduce", "tp", tokens * dit.z_channels * FLOAT32)  # gradient of the condition: once for all blocks
    if dit.ddt is not None:
        widths.append((dit.ddt.hidden_size, dit.ddt.depth, dit.ddt.num_heads))
        # The head's condition, forward and backward.
        ledger.add("all_reduce", "tp", 2 * tokens * dit.ddt.hidden_size * step.product_bytes, 2)
    for width, depth, heads in widths:
        head_dim = width // heads
        passes = 1 + step.recomputed
        hidden = depth * tokens * width * step.product_bytes
        ledger.add("all_gather", "tp", hidden * (2 * passes + 4), depth * (2 * passes + 4))
        ledger.add("reduce_scatter", "tp", hidden * (2 * passes + 2), depth * (2 * passes + 2))
        sums = depth * 2 * (passes + 1)
        ledger.add("all_reduce", "tp", tokens * sums * FLOAT32, sums)  # norms
        if dit.qk_norm:
            # Gradients of the two shared weights.
            ledger.add("all_reduce", "tp", depth * 2 * head_dim * step.weight_bytes, depth * 2)
        # Queries, keys and values before attention and its output after it, forward and backward.
        ledger.add("all_to_all", "sp", hidden // parallel.tp * 4 * (passes + 1), depth * 2 * (passes + 1))
    ledger.add("all_reduce", "tp", 2 * tokens * FLOAT32, 2)  # the last norm
    ledger.add("all_reduce", "tp", tokens * dit.in_channels * step.product_bytes)


def _qwen2(
    ledger: _Volume, dit: DiTConfig, llm: LLMSpec | Qwen2Config, step: MicroStep, parallel: ParallelConfig
) -> None:
    positions = -(-step.text_tokens // parallel.sp)
    hidden, layers, passes = llm.hidden_size, llm.num_hidden_layers, 1 + step.recomputed
    head_dim = hidden // llm.num_attention_heads
    rows = max(1, step.labelled)
    ledger.add("all_reduce", "tp", positions * hidden * step.weight_bytes)  # embedding
    # Outputs of attention and feed-forward; in backward the gradients of their inputs. Computing a block again stops
    # before the output of its feed-forward, which nothing in the block's backward needs.
    sums = layers * (passes + 1)
    ledger.add("all_reduce", "tp", sums * positions * hidden * step.product_bytes, sums)
    ledger.add("all_reduce", "tp", layers * 2 * positions * hidden * step.weight_bytes, layers * 2)
    ledger.add("all_reduce", "tp", rows * hidden * step.product_bytes)  # gradient of what the output layer reads
    # Cross-entropy: largest logit, sum, logit of the target. Once more where backward computes the logits again.
    chunks = -(-rows // ops.rows_per_chunk(llm.vocab_size))
    times = 1 + (chunks > 1)
    ledger.add("all_reduce", "tp", times * rows * 3 * FLOAT32, times * chunks * 2)
    heads, key_heads = llm.num_attention_heads // parallel.tp, llm.num_key_value_heads // parallel.tp
    exchanged = 2 * heads + 2 * math.lcm(key_heads, parallel.sp)  # keys and values: at least one head for each rank
    exchanges = layers * (passes + 1)
    ledger.add("all_to_all", "sp", exchanges * positions * exchanged * head_dim * step.product_bytes, exchanges * 2)
    states = step.batch * dit.num_tokens * hidden * step.weight_bytes
    ledger.add("reduce_scatter", "sp", states)  # query states to the ranks of their image tokens
    ledger.add("all_gather", "sp", states)
