"""`rae-scale data inspect | verify | stats | preview`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from rae_scale.config.paths import ASSET_ROOT
from rae_scale.data.build import build

Rae = Callable[..., str]
CONFIG = ASSET_ROOT.parent.parent / "configs/run/demo.yaml"


@pytest.fixture
def tar(rae: Rae, tmp_path: Path) -> Path:
    rae("data", "shapes", "--out", tmp_path / "tars", "--count", 12, "--seed", 3)
    return tmp_path / "tars/shapes-00000.tar"


@pytest.fixture
def built(tar: Path, tmp_path: Path) -> Path:
    build([tar], tmp_path / "built")
    return tmp_path / "built"


def test_inspect_shows_tars_and_shards(rae: Rae, tar: Path, built: Path) -> None:
    for path, kind in ((tar, "tar"), (built, "mds")):
        said = rae("data", "inspect", path)
        assert said.startswith(f"{path}: {kind}, 12 samples")
        assert "12  JPEG images" in said
        assert "image width, pixels: 64 to 64, median 64" in said
        assert "[JPEG 64 x 64]  a photo of" in said
    assert "12 read = 12 kept + 0 rejected + 0 duplicates" in said


def test_inspect_says_that_a_build_is_not_done(rae: Rae, built: Path) -> None:
    (built / "index.json").unlink()
    said = rae("data", "inspect", built)
    assert "partial build, 12 samples" in said
    assert "1 of 1 inputs are built; run the same build again" in said


def test_verify_has_a_status_and_a_report(rae: Rae, built: Path, tmp_path: Path) -> None:
    said = rae("data", "verify", built, "--decode")
    assert "12 samples read in 1 shards" in said
    assert "12 images decoded" in said
    assert said.endswith("intact\n")
    shard = next(built.glob("*/*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    rae("data", "verify", built, "--out", tmp_path / "new/report.json", status=1)
    report = json.loads((tmp_path / "new/report.json").read_text())
    (problem,) = report["problems"]
    assert problem["where"] == shard.relative_to(built).as_posix()
    assert "remove 00000-shapes-00000/" in problem["fix"]


def test_verify_shares_the_work_of_an_array(rae: Rae, built: Path) -> None:
    assert "part 1 of 2: 0 samples read in 0 shards" in rae("data", "verify", built, "--shards", "1/2")
    assert "--shards '1of2'" in rae("data", "verify", built, "--shards", "1of2", status=2)


def test_stats_as_table_and_json(rae: Rae, built: Path, tmp_path: Path) -> None:
    said = rae("data", "stats", built, "--count", 5, "--out", tmp_path / "new")
    assert f"{built}: 12 samples, 5 examined" in said
    assert "caption, characters" in said
    assert "12  samples of shapes" in said
    assert json.loads((tmp_path / "new/stats.json").read_text())["examined"] == 5
    with Image.open(tmp_path / "new/stats.png") as plots:
        assert plots.width > 1000
    assert "12 examined" in rae("data", "stats", built, "--all")
    assert "give one of the two" in rae("data", "stats", built, "--all", "--count", 5, status=2)


def test_a_sheet_of_a_data_set(rae: Rae, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    assert rae("data", "preview", built, "--out", out, "--count", 3, "--side", 32, "--columns", 2) == f"{out}\n"
    with Image.open(out) as sheet:
        assert sheet.width == 2 * 32 + 3 * 6


@pytest.mark.long
def test_a_sheet_of_a_step(rae: Rae, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    settings = ["--set", f"data.sources=[{{path: {built}}}]", "--set", f"run.dir={tmp_path / 'run'}"]
    said = rae("data", "preview", "--config", CONFIG, "--step", 2, *settings, "--count", 4, "--out", out)
    assert said == f"{out}\n"
    assert not (tmp_path / "run").exists()


def test_either_a_path_or_a_step_of_a_run(rae: Rae, built: Path) -> None:
    assert "give either PATH, or --config" in rae("data", "preview", status=2)
    assert "give either PATH, or --config" in rae("data", "preview", built, "--config", CONFIG, status=2)
    assert "belong together" in rae("data", "preview", built, "--step", 3, status=2)
    assert "belong together" in rae("data", "preview", "--config", CONFIG, status=2)
