"""The gated activation silu(gate) * value in plain PyTorch.

First the function as one would write it, which autograd differentiates; then the operators' specifications, whose
arithmetic is float32 (float64 for float64 tensors) and which round once, to the type of each result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rae_kernels.dispatch import wide


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    return F.silu(gate) * value


def swiglu_forward(gate: Tensor, value: Tensor) -> Tensor:
    return (F.silu(wide(gate)) * wide(value)).to(gate.dtype).contiguous()


def swiglu_backward(gradient: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and value: silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))."""
    gradient, g = wide(gradient), wide(gate)
    sigmoid = torch.sigmoid(g)
    for_gate = gradient * wide(value) * sigmoid * (1 + g * (1 - sigmoid))
    for_value = gradient * g * sigmoid
    return for_gate.to(gate.dtype).contiguous(), for_value.to(value.dtype).contiguous()
