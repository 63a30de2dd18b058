"""torch.compile of each transformer block: another way to fuse what lies between its matrix products.

Inside a compiled block every operation is the plain PyTorch function, whatever RAE_KERNELS says: the compiler fuses
those, and could not look into our custom operators. Outside nothing changes.

Only blocks that see one length are compiled, and only where gradients are wanted: each new shape costs a compilation.
The language model, whose texts differ in length, and the sampling of pictures stay as they are.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from rae_scale import ops

logger = logging.getLogger(__name__)

CompileMode = Literal["none", "blocks", "blocks-cudagraphs"]

BLOCK_LIST = "blocks"
"""Attribute name of the lists of blocks that see one length: of the DiT, its wide head, the decoder, our encoder."""

Forward = Callable[..., Any]


def compile_blocks(
    module: nn.Module, mode: CompileMode, device: torch.device, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile the forward and backward pass of every block of `module`, in place; names of parameters stay.

    To be called before activation checkpointing, which then runs the compiled block again, and before an engine shards
    the blocks: what gathers a block's parameters stays outside of the compiled function. Blocks of one class and one
    width share one compilation.

    device: where the module will run. mode: blocks-cudagraphs records the kernels' launches too, once, and replays
    them. backend: of torch.compile, for mode=blocks.

    Raises:
        ValueError: there is nothing to compile, or `device` has no CUDA graphs.
    """
    if mode == "none":
        return
    if mode == "blocks-cudagraphs" and device.type != "cuda":
        raise ValueError(
            f"engine.compile=blocks-cudagraphs on {device.type}: CUDA graphs need a GPU; use engine.compile=blocks"
        )
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": False}
    settings |= {"mode": "reduce-overhead"} if mode == "blocks-cudagraphs" else {"backend": backend}
    compiled: dict[Forward, Forward] = {}
    blocks = blocks_of_one_length(module)
    for block in blocks:
        forward = type(block).forward
        if forward not in compiled:
            compiled[forward] = torch.compile(forward, **settings)
        # On `forward`, as activation checkpointing does: a wrapper module would rename parameters, and the hooks by
        # which engines gather them would be compiled with it.
        block.forward = functools.partial(run_block, block, forward, compiled[forward])
        if mode == "blocks-cudagraphs":
            keep_gradients(block)
    logger.info("torch.compile of %d blocks: plain operations inside, whatever RAE_KERNELS says", len(blocks))


def blocks_of_one_length(module: nn.Module) -> list[nn.Module]:
    blocks = [
        block
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and name.rpartition(".")[2] == BLOCK_LIST
        for block in child
    ]
    if not blocks:
        raise ValueError(
            f"engine.compile: {type(module).__name__} has no nn.ModuleList named {BLOCK_LIST}, so there is nothing to "
            "compile; use engine.compile=none"
        )
    return blocks


def run_block(block: nn.Module, forward: Forward, compiled: Forward, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(block, *args, **kwargs)
    # Around the call and not inside of it: the compiled function finds the same choice in every step, so it is not
    # compiled again. Its backward pass was traced with it and asks for no choice.
    with ops.use("reference"):
        return compiled(block, *args, **kwargs)


def keep_gradients(block: nn.Module) -> None:
    """Gradients of a replayed backward pass lie in memory that the next micro-step's replay writes to: copy them."""
    for parameter in block.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.clone)
