"""Draw numbers with Triton's own Philox and save them: `triton_draw.py CASES.json OUT.pt`, run by test_philox_triton.

A program of its own because TRITON_INTERPRET has to be set before Triton is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl


@triton.jit
def draw_layout(words, uniforms, normals, seed, c1, c2, c3, GROUPS: tl.constexpr):
    """Four numbers per counter, through the full counter, as a fused kernel would."""
    group = tl.arange(0, GROUPS)
    c0 = group.to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = tl.philox(seed, c0, zero + c1.to(tl.uint32), zero + c2.to(tl.uint32), zero + c3.to(tl.uint32))
    u0, u1, u2, u3 = (
        tl.uint_to_uniform_float(w0),
        tl.uint_to_uniform_float(w1),
        tl.uint_to_uniform_float(w2),
        tl.uint_to_uniform_float(w3),
    )
    n0, n1 = tl.pair_uniform_to_normal(u0, u1)
    n2, n3 = tl.pair_uniform_to_normal(u2, u3)
    store4(words, group, w0.to(tl.int64), w1.to(tl.int64), w2.to(tl.int64), w3.to(tl.int64))
    store4(uniforms, group, u0, u1, u2, u3)
    store4(normals, group, n0, n1, n2, n3)


@triton.jit
def draw_builtin(words, uniforms, normals, seed, sample_index, GROUPS: tl.constexpr):
    """The same for step 0 and stream 0, where the counter is the 64-bit offset of Triton's public functions."""
    group = tl.arange(0, GROUPS)
    offset = group.to(tl.int64) + (sample_index.to(tl.int64) << 32)
    w0, w1, w2, w3 = tl.randint4x(seed, offset)
    store4(words, group, w0.to(tl.int64), w1.to(tl.int64), w2.to(tl.int64), w3.to(tl.int64))
    u0, u1, u2, u3 = tl.rand4x(seed, offset)
    store4(uniforms, group, u0, u1, u2, u3)
    n0, n1, n2, n3 = tl.randn4x(seed, offset)
    store4(normals, group, n0, n1, n2, n3)


@triton.jit
def store4(out, group, a, b, c, d):
    tl.store(out + 4 * group, a)
    tl.store(out + 4 * group + 1, b)
    tl.store(out + 4 * group + 2, c)
    tl.store(out + 4 * group + 3, d)


def main(cases_path: str, out_path: str) -> None:
    results = []
    for case in json.loads(Path(cases_path).read_text()):
        groups, seed, sample_index = case["groups"], case["seed"], case["sample_index"]
        out = (torch.zeros(groups * 4, dtype=torch.int64), torch.zeros(groups * 4), torch.zeros(groups * 4))
        if case["builtin"]:
            draw_builtin[(1,)](*out, seed, sample_index, GROUPS=groups)
        else:
            c1, c2 = sample_index & 0xFFFFFFFF, (sample_index >> 32) | (case["stream"] << 16)
            draw_layout[(1,)](*out, seed, c1, c2, case["step"], GROUPS=groups)
        results.append(out)
    torch.save(results, out_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
