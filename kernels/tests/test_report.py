"""The report says what operators run on and why, names the optional packages, and is logged once."""

from __future__ import annotations

import logging
import sys
from importlib import metadata

import pytest
import torch

import rae_kernels
from rae_kernels import dispatch
from rae_kernels.report import report


def test_report_names_each_operator_and_the_attention_backends():
    text = report()
    assert rae_kernels.attention_backend_report() in text
    for name in ("norm", "gated_residual_norm", "qk_rope", "swiglu_packed", "flow_matching_loss"):
        assert name in text, name


def test_the_choice_shows():
    assert "RAE_KERNELS=auto" in report() and "cpu: the operators' formulas" in report()
    with rae_kernels.use("reference"):
        assert "RAE_KERNELS=reference" in report() and "cpu: plain PyTorch" in report()
    with rae_kernels.use("cuda"):
        assert "cpu: nothing, as RAE_KERNELS=cuda demands kernels" in report()


def test_what_fell_back_is_said_and_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_fallbacks", {})
    with caplog.at_level(logging.WARNING, logger="rae_kernels"):
        for _ in range(2):
            dispatch.fall_back("norm", "cuda", "a tensor is torch.float64")
    assert [record.getMessage() for record in caplog.records] == [
        "norm on cuda runs as plain PyTorch: a tensor is torch.float64"
    ]
    assert "norm on cuda ran as plain PyTorch: a tensor is torch.float64" in report()
    with rae_kernels.use("triton"), pytest.raises(ValueError, match="norm has no kernel for this call: why"):
        dispatch.fall_back("norm", "cuda", "why")


def test_reasons_against_a_kernel():
    assert dispatch.why_not_triton([torch.zeros(1), torch.zeros(1, dtype=torch.int64)]) is None
    assert "float64" in str(dispatch.why_not_triton([torch.zeros(1), torch.zeros(1, dtype=torch.float64)]))


def test_report_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(sys.modules["rae_kernels.report"], "_reported", [])
    with caplog.at_level(logging.INFO, logger="rae_kernels.report"):
        text = report()
        report()
    assert [record.getMessage() for record in caplog.records] == [text]


def test_absent_and_installed_packages(monkeypatch):
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    for package in ("flash-attn", "apex", "megatron-core"):
        assert f"{package}: not installed" in report()
    monkeypatch.setattr(metadata, "version", lambda name: "9.9.9")
    assert "apex: 9.9.9" in report()
