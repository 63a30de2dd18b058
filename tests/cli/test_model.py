from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rae_scale.cli.main import main

TINY = "model: {name: dit-tiny, llm: {name: qwen2-tiny}}\nengine: {name: fsdp2}\ndata: {global_batch_size: 64}\n"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["rae-scale", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_layout_says_what_a_rank_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(TINY)
    assert run(monkeypatch, "model", "layout", path, "parallel.dp_shard=4", "parallel.tp=2") == 0
    printed = capsys.readouterr().out
    assert "8 ranks = dp_replicate 1 x dp_shard 4 x sp 1 x tp 2" in printed
    assert "held by all ranks together" in printed


def test_a_layout_that_cannot_be_is_one_clean_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(TINY)
    assert run(monkeypatch, "model", "layout", path, "parallel.sp=8") == 2
    assert capsys.readouterr().err.startswith("rae-scale: error: parallel.tp x sp = 1 x 8 = 8 does not divide the 4")
