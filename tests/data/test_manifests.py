from __future__ import annotations

import json
from pathlib import Path

import pytest

from rae_scale.data import manifests
from rae_scale.data.manifests import expand_inputs


def test_a_manifest_stands_for_its_tars(tmp_path: Path) -> None:
    manifest = tmp_path / "wds_flux.json"
    manifest.write_text(json.dumps({"dataset_name": "flux", "tars": ["b.tar", "sub/a.tar", "/data/c.tar"]}))
    assert expand_inputs(["x.tar", manifest, "y.jsonl"]) == [
        Path("x.tar"),
        tmp_path / "b.tar",
        tmp_path / "sub/a.tar",
        Path("/data/c.tar"),
        Path("y.jsonl"),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "a manifest is"),
        ("[]", "a manifest is"),
        ("{}", "no list of file names"),
        ('{"tars": []}', "no list of file names"),
        ('{"tars": "a.tar"}', "no list of file names"),
        ('{"tars": ["a.tar", 3]}', "no list of file names"),
        ('{"tars": ["s3://bucket/a.tar"]}', "is a URL"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "wds.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        expand_inputs([tmp_path / "wds.json"])


def test_a_missing_or_huge_manifest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.json: no such file"):
        expand_inputs([tmp_path / "gone.json"])
    monkeypatch.setattr(manifests, "MAX_MANIFEST_BYTES", 3)
    (tmp_path / "wds.json").write_text('{"tars": ["a.tar"]}')
    with pytest.raises(ValueError, match="no list of tars"):
        expand_inputs([tmp_path / "wds.json"])
