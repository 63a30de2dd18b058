"""Activation checkpointing: keep only each block's input, compute the rest again in backward."""

from __future__ import annotations

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

BLOCK_LISTS = ("blocks", "layers")
"""Attribute names of the lists of transformer blocks: DiT, its wide head, decoder; Qwen2 in transformers."""


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Every transformer block in `module`: the unit of activation checkpointing and of FSDP2's communication.

    Raises:
        ValueError: there is none, so nothing would be checkpointed or sharded block by block.
    """
    blocks = [
        block
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and name.rpartition(".")[2] in BLOCK_LISTS
        for block in child
    ]
    if not blocks:
        raise ValueError(
            f"{type(module).__name__} has no list of blocks; name its nn.ModuleList one of {', '.join(BLOCK_LISTS)}"
        )
    return blocks


def apply_activation_checkpointing(module: nn.Module) -> None:
    """Checkpoint every block of `module`, in place. Gradients are bitwise what they were without."""
    for block in blocks_of(module):
        # On `forward` and not in a wrapper module: parameter names, and so checkpoints, stay what they are. No model
        # here draws random numbers (noise and dropout are functions of the sample index), so there is no generator
        # state to restore for the second forward.
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
