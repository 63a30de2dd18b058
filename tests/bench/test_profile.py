from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rae_scale.bench.profile import Interval, category_of, profile_step, summarise


def test_times_are_per_step_and_gaps_are_what_nothing_covers() -> None:
    intervals = [
        Interval("nvjet_hsh_128x256", 0, 1000),
        Interval("gated_residual_norm_kernel", 1000, 1500),
        Interval("nvjet_hsh_128x256", 1200, 1800),  # beside the one before it
        Interval("vectorized_elementwise_kernel", 2300, 2400),
    ]
    found = {row["category"]: row for row in summarise(intervals, steps=2)["categories"]}
    assert {name: row["ms"] for name, row in found.items()} == pytest.approx(
        {"matrix products": 0.8, "our kernels": 0.25, "elementwise and reductions": 0.05, "gaps": 0.25}
    )
    assert sum(row["share"] for row in found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("norm_backward_kernel", "our kernels"),
        ("adamw_float32_float32", "our kernels"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("triton_red_fused_add_mul_3", "compiled"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "elementwise and reductions"),
        ("aten::addmm", "matrix products"),
    ],
)
def test_kernels_by_name(name: str, category: str) -> None:
    assert category_of(name) == category


def test_profile_on_the_cpu_writes_a_trace(tmp_path: Path) -> None:
    a = torch.randn(64, 64)
    found = profile_step(lambda: (a @ a).exp_(), torch.device("cpu"), tmp_path / "new/trace.json")
    assert {row["category"] for row in found["categories"]} >= {"matrix products"}
    assert json.loads((tmp_path / "new/trace.json").read_text())["traceEvents"]
