"""`rae-scale convert` and `rae-scale checkpoint diff`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rae_scale.convert.sinks import SINKS
from tests.infer.trained import Trained

Rae = Callable[..., str]


def test_convert_says_what_it_did(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = rae("convert", trained.run, out, "--to", "native", "--dtype", "bfloat16", "--weights", "raw", "--verify")
    first, *rest = printed.splitlines()
    assert f"step-00000001, raw weights -> {out}: " in first
    assert "largest error of the cast: " in rest[0]
    assert "elements read back and equal, bit for bit" in rest[1]
    assert (out / "model.safetensors").is_file()
    assert "exists" in rae("convert", trained.run, out, "--to", "native", status=2)


def test_only_a_part(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    rae("convert", trained.run, tmp_path / "out", "--to", "native", "--only", "dit.", "--only", "connector.")
    assert {name.split(".")[0] for name in load_file(tmp_path / "out" / "model.safetensors")} == {"dit", "connector"}


def test_settings_from_a_file(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    import yaml

    rae("convert", trained.run, tmp_path / "out", "--to", "native")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "out" / "model.safetensors").read_bytes())
    message = rae("convert", alone, tmp_path / "checkpoint", "--to", "checkpoint", status=2)
    assert "does not say which model it is of" in message
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(trained.world.tree(tmp_path / "run")))
    printed = rae("convert", alone, tmp_path / "checkpoint", "--to", "checkpoint", "--config", config)
    assert "note: there is no optimizer state" in printed


def test_a_folder_of_no_format(rae: Rae, tmp_path: Path) -> None:
    assert "Looked for" in rae("convert", tmp_path, tmp_path / "out", "--to", "native", status=2)


def test_every_destination_is_offered() -> None:
    import typing

    from rae_scale.cli.convert import To

    assert set(typing.get_args(To)) == set(SINKS)


def test_diff(rae: Rae, trained: Trained, tmp_path: Path) -> None:
    rae("convert", trained.run, tmp_path / "copy", "--to", "checkpoint")
    printed = rae("checkpoint", "diff", trained.run, tmp_path / "copy")
    assert "(weight, ema, exp_avg, exp_avg_sq)" in printed
    assert printed.rstrip().endswith("no difference")
    assert "(ema)" in rae("checkpoint", "diff", trained.run, tmp_path / "copy", "--kind", "ema")


def test_diff_of_what_differs(rae: Rae, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rae("convert", trained.run, tmp_path / "out", "--to", "native")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["connector.bias"] = tensors["connector.bias"] + 1
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    paths[0].write_bytes((tmp_path / "out" / "model.safetensors").read_bytes())
    save_file(tensors, paths[1], {"kind": "ema", "step": "1"})
    import sys

    from rae_scale.cli.main import main

    sys.argv = ["rae-scale", "checkpoint", "diff", *map(str, paths)]
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "weight of connector.bias [48]: 48 of 48 elements differ, by at most 1 (" in printed
    assert printed.rstrip().endswith(": 1 differ")
