"""The benchmark of building data sets, on a few small pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rae_scale.bench import data_build
from rae_scale.bench.data_build import DATA_BUILD, Work, bench_data_build
from rae_scale.bench.record_report import to_markdown
from rae_scale.bench.session import Session
from rae_scale.data.mds_reader import MDSReader

ALONE = Session(torch.device("cpu"), 1)
SMALL = Work(images=6, size=32)


def test_a_build_beside_a_plain_copy(tmp_path: Path) -> None:
    record = bench_data_build([SMALL], ALONE, folder=tmp_path, repeats=2)
    row = record.rows[0]
    assert row.failed is None
    assert {name: measure.repeats for name, measure in row.measures.items()} == {"build": 2, "plain": 2}
    assert row.values["images_per_s"] == pytest.approx(6 / row.measures["build"].median)
    assert row.values["of_plain"] > 0
    assert list(tmp_path.iterdir()) == []
    assert "| workers 1, verify header |" in to_markdown(DATA_BUILD, record)


def test_both_write_everything(tmp_path: Path) -> None:
    tars = data_build.write_tars(tmp_path / "tars", data_build.made_samples(6, 32), 2)
    data_build.run_plain(SMALL, tars, tmp_path / "plain")
    assert [path.read_bytes() for path in sorted((tmp_path / "plain").iterdir())] == [tar.read_bytes() for tar in tars]
    data_build.run_build(SMALL, tars, tmp_path / "built")
    assert len(MDSReader(tmp_path / "built")) == 6
    with pytest.raises(ValueError, match="6 of 7 images were kept"):
        data_build.run_build(Work(images=7, size=32), tars, tmp_path / "built")


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--folder=.*nowhere is no folder"):
        bench_data_build([SMALL], ALONE, folder=tmp_path / "nowhere")
