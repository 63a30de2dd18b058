"""The gated activation of the feed-forward layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) * value, for `packed` [..., 2F] that holds gate then value. Returns [..., F] in the same dtype."""
    gate, value = packed.chunk(2, dim=-1)
    return F.silu(gate) * value
