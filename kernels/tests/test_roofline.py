"""The roofline's arithmetic, and its count of eager passes against what PyTorch's dispatcher sees."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rae_kernels

PATH = Path(__file__).resolve().parents[1] / "bench/roofline.py"
SPEC = importlib.util.spec_from_file_location("roofline", PATH)
roofline = sys.modules["roofline"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(roofline)

ROWS, CHANNELS, HEAD_DIM = 512, 768, 64


class Passes(TorchDispatchMode):
    """Adds up the bytes that every operator below autograd reads and writes; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not aliases and not func.__name__.startswith(("empty", "_unsafe_view")):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(map(size, tensors))
        return out


def size(tensor: Tensor) -> int:
    """Bytes of the elements that exist: an expanded dimension has one."""
    lengths = [length for length, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(lengths) * tensor.element_size()


def per_channel(function, channels: int, *inputs: Tensor) -> tuple[float, float]:
    """Bytes of forward and backward, per row and channel, under autocast and with what autocast casts afterwards."""
    with rae_kernels.use("reference"):
        with torch.autocast("cpu", torch.bfloat16), Passes() as forward:
            outputs = function(*inputs)
        gradients = [torch.randn_like(out) for out in outputs]
        with Passes() as backward:
            torch.autograd.grad(outputs, [i for i in inputs if i.requires_grad], gradients)
    return forward.bytes / ROWS / channels, backward.bytes / ROWS / channels


def rows(dtype: torch.dtype = torch.bfloat16, channels: int = CHANNELS) -> Tensor:
    return torch.randn(1, ROWS, channels, dtype=dtype).requires_grad_()


def eager_cases():
    weight = torch.randn(CHANNELS).requires_grad_()
    table = torch.randn(ROWS, HEAD_DIM)

    def norm_modulate(*inputs):
        return (rae_kernels.norm_modulate(*inputs, 1e-6).bfloat16(),)

    def between(*inputs):
        out, h = rae_kernels.gated_residual_norm_modulate(*inputs, 1e-6)
        return out, h.bfloat16()

    def positions(qkv):
        return rae_kernels.qk_norm_rope(qkv, table, table, head_dim=HEAD_DIM, eps=1e-6)

    stream = rows(torch.float32)
    return {
        "norm_modulate": (norm_modulate, CHANNELS, (stream, weight, rows(), rows())),
        "gated_residual_norm_modulate": (between, CHANNELS, (stream, rows(), rows(), weight, rows(), rows())),
        "gated_residual": (lambda *i: (rae_kernels.gated_residual(*i),), CHANNELS, (stream, rows(), rows())),
        "qk_norm_rope": (positions, CHANNELS, (rows(channels=3 * CHANNELS),)),
        "swiglu": (lambda x: (rae_kernels.swiglu(x),), CHANNELS, (rows(channels=2 * CHANNELS),)),
    }


@pytest.mark.parametrize(
    "name", ["norm_modulate", "gated_residual_norm_modulate", "gated_residual", "qk_norm_rope", "swiglu"]
)
def test_eager_passes_are_those_that_the_reference_makes(name):
    forward, backward = per_channel(*eager_cases()[name][:2], *eager_cases()[name][2])
    counted = roofline.eager_traffic()[name]
    assert forward == pytest.approx(counted.forward, rel=0.05)
    assert backward == pytest.approx(counted.backward, rel=0.05)


def test_fused_traffic_is_one_pass_over_what_goes_in_and_out():
    traffic = roofline.fused_traffic(4)
    assert traffic["norm_modulate"] == (4 + 2 + 2 + 2, (2 + 4 + 2) + (4 + 2 + 2))
    assert traffic["gated_residual_norm_modulate"] == (4 + 2 + 2 + 2 + 2 + 4 + 2, (4 + 2 + 4 + 2 + 2 + 2) + (4 + 4 * 2))
    assert traffic["gated_residual"] == (4 + 2 + 2 + 4, (4 + 2 + 2) + (2 + 2))
    assert traffic["qk_norm_rope"] == (12, 12)
    assert traffic["swiglu"] == (4 + 2, (2 + 4 + 4) + (4 + 2))
    assert roofline.fused_traffic(4, recompute_swiglu=False)["swiglu"].backward == 10
    narrow = roofline.fused_traffic(2)
    assert narrow["gated_residual_norm_modulate"].forward == traffic["gated_residual_norm_modulate"].forward - 4


def test_one_block_by_hand():
    shape = roofline.Shape(hidden=256, depth=1, z=128, channels=16, tokens=64, batch=2)
    n, h, z, inner = 128, 256, 128, 768
    found = {row.name: row for row in roofline.step_rows(shape, "fused")}
    products = 3 * h * h + h * h + 2 * h * inner + inner * h + 6 * h * z + 16 * h + 2 * h * z + h * 16
    assert found["matrix products"].flops == 6 * n * products
    assert found["attention"].flops == 3.5 * 4 * n * 64 * h
    assert found["swiglu"].bytes == n * inner * (6 + 16)
    assert found["norm_modulate"].bytes == n * h * (10 + 16) * 2  # the block's first and the final layer's
    assert found["bias gradients"].bytes == 2 * n * (3 * h + h + 2 * inner + h + 6 * h + h + 2 * h + 16)


def test_block_ends_cost_what_is_read_twice():
    shape = roofline.Shape(hidden=256, depth=3, z=256, tokens=64, batch=1)
    read_again, sum_of_gradients = 4, 12
    assert roofline.block_end_saving(shape) == 3 * 64 * 256 * (read_again + sum_of_gradients)


def test_time_is_the_larger_of_the_two_floors():
    gpu = roofline.GPU(flops=100.0, bandwidth=10.0)
    assert roofline.seconds(roofline.Row("", "", 200.0, 10.0), gpu) == 2.0
    assert roofline.seconds(roofline.Row("", "", 100.0, 30.0), gpu) == 3.0


def test_parameters_and_flops_of_the_published_models():
    """The sizes of the paper's Table 10, which our padded models exceed by less than 1 %."""
    for billions, (hidden, depth) in {0.5: (1280, 16), 2.4: (2048, 32), 3.1: (2304, 32), 9.8: (4096, 32)}.items():
        count = roofline.parameters(roofline.Shape(hidden=hidden, depth=depth, z=hidden))
        assert count / 1e9 == pytest.approx(billions, rel=0.06)


def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    roofline.main(["--hidden", "1280", "--depth", "2", "--copy-tbs", "4.3", "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert "gated_residual_norm_modulate" in printed and "block ends" in printed
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["rates"] == {"flops": 989.4e12, "bandwidth": 4.3e12}
    assert result["shape"]["z"] == 1280
    for way in result["ways"].values():
        assert sum(row["share"] for row in way["rows"]) == pytest.approx(1)


def test_eager_passes_of_another_residual_are_refused():
    with pytest.raises(ValueError, match="residual=2: the eager passes were counted for a float32 residual"):
        roofline.eager_traffic(2)
