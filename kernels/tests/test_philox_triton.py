"""The same integers as Triton's Philox, and the same normal numbers up to the rounding of log, sin and cos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rae_kernels import philox_normal, philox_uniform
from rae_kernels.philox import MASK32, philox_words

CASES = [
    {"builtin": True, "groups": 16, "seed": 0, "sample_index": 0, "step": 0, "stream": 0},
    {"builtin": True, "groups": 16, "seed": 123456789, "sample_index": 2**31 - 1, "step": 0, "stream": 0},
    {"builtin": False, "groups": 16, "seed": 7, "sample_index": 5, "step": 30_000, "stream": 3},
    {"builtin": False, "groups": 32, "seed": 2**64 - 1, "sample_index": 2**40 + 3, "step": 2**32 - 1, "stream": 2**15},
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("triton")
    cases, out = folder / "cases.json", folder / "out.pt"
    cases.write_text(json.dumps(CASES))
    program = Path(__file__).with_name("triton_draw.py")
    subprocess.run(
        [sys.executable, program, cases, out], check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=300
    )
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_numbers_equal_triton(drawn, number):
    case = CASES[number]
    words, uniforms, normals = drawn[number]
    where = (case["seed"], case["step"], torch.tensor([case["sample_index"]]))
    ours = philox_words(*where, case["groups"], case["stream"]).flatten()
    assert torch.equal(ours, words & MASK32)
    shape = (case["groups"] * 4,)
    assert torch.equal(philox_uniform(*where, shape, case["stream"])[0], uniforms)
    assert (philox_normal(*where, shape, case["stream"])[0] - normals).abs().max() < 1e-5
