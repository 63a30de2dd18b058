"""`rae_scale.ops` hands on the whole of `rae_kernels`, unchanged."""

from __future__ import annotations

import rae_kernels
from rae_scale import ops


def test_every_operation_is_the_one_of_rae_kernels():
    assert ops.__all__ == rae_kernels.__all__
    for name in ops.__all__:
        assert getattr(ops, name) is getattr(rae_kernels, name)
