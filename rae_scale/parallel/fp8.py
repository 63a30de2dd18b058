"""8-bit matrix products in training, by torchao: the large linear layers of the DiT's blocks, forward and backward.

Recipe "rowwise": each row of an operand is scaled by its own largest magnitude before it is rounded to e4m3, so one
outlier costs its own row only. Parameters stay what they are, float32 and by the same names; their 8-bit forms live as
long as the product that reads them. Without torch.compile the casts are kernels of their own, which eats the gain.

On a CPU torchao rounds to 8 bits and multiplies in float32: the same losses to look at, no speed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging

import torch
from torch import nn

from rae_scale.models.blocks import DiTBlock

logger = logging.getLogger(__name__)

RECIPE = "rowwise"
FP8_LAYERS = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaln")
"""Of a DiTBlock. Embeddings, the final layer, the language model and the connector are small or see odd widths."""
MULTIPLE = 16
"""What the hardware wants the sizes of an 8-bit product to divide by."""
NEEDED_CAPABILITY = (9, 0)


def convert_to_fp8(module: nn.Module, device: torch.device) -> list[str]:
    """Let the linear layers `FP8_LAYERS` of every DiTBlock multiply in 8 bits, in place; their names.

    To be called with whole layers, before torch.compile and before an engine shards them. A layer whose sizes do not
    divide by 16 stays as it is.

    Raises:
        ValueError: torchao is not installed, `device` cannot do it, or `module` has no layer for it.
    """
    check_fp8_runs(device)
    layers = {
        f"{name}.{layer}": block.get_submodule(layer)
        for name, block in module.named_modules()
        if isinstance(block, DiTBlock)
        for layer in FP8_LAYERS
    }
    fitting = [name for name, layer in layers.items() if type(layer) is nn.Linear and divides(layer)]
    if not fitting:
        raise ValueError(
            f"engine.fp8=true: {type(module).__name__} has no linear layer in a DiT block whose sizes divide by "
            f"{MULTIPLE}; set engine.fp8=false"
        )
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(RECIPE)
    if device.type == "cpu":
        config = dataclasses.replace(config, emulate=True)
    chosen = frozenset(fitting)
    convert_to_float8_training(module, config=config, module_filter_fn=lambda _layer, name: name in chosen)
    logger.info("%d of the %d linear layers in DiT blocks multiply in 8 bits (%s)", len(chosen), len(layers), RECIPE)
    return fitting


def divides(layer: nn.Linear) -> bool:
    return layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def check_fp8_runs(device: torch.device) -> None:
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(
            "engine.fp8=true needs torchao, which is not installed; pip install --no-deps 'torchao>=0.18', or set "
            "engine.fp8=false"
        )
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < NEEDED_CAPABILITY:
            major, minor = capability
            raise ValueError(
                f"engine.fp8=true on sm_{major}{minor} ({torch.cuda.get_device_name(device)}): 8-bit products scaled "
                "by rows need sm_90 or newer; set engine.fp8=false"
            )
