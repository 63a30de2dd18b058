"""The report names every operation and the optional packages, and is logged once."""

from __future__ import annotations

import logging
from importlib import metadata

import rae_kernels
from rae_kernels.report import report


def test_report_names_each_operation():
    text = report()
    assert rae_kernels.attention_backend_report() in text
    for name in set(rae_kernels.__all__) - {"attention", "attention_backend_report", "report"}:
        assert name in text


def test_absent_packages_are_said_once(monkeypatch, caplog):
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    report.cache_clear()
    with caplog.at_level(logging.INFO, logger="rae_kernels.report"):
        text = report()
        assert report() == text
    report.cache_clear()
    for package in ("flash-attn", "apex", "megatron-core"):
        assert f"{package}: not installed" in text
    assert [record.getMessage() for record in caplog.records] == [text]


def test_installed_packages_show_their_version(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "9.9.9")
    report.cache_clear()
    text = report()
    report.cache_clear()
    assert "apex: 9.9.9" in text
