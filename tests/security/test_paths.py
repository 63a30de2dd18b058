"""What a file names stays within the file's own folder: members of tars, files of checkpoints.

Single names are in tests/data/test_tars.py, shards of an MDS index in tests/data/test_mds.py, weights of an index in
tests/convert/test_hostile.py.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rae_scale.convert.open import open_source
from rae_scale.data.build import build
from rae_scale.data.mds_reader import MDSReader
from rae_scale.state import CheckpointError
from rae_scale.state.format import FORMAT, INDEX, VERSION
from rae_scale.state.index import read_index


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", link: bytes | None = None, target: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = link or tarfile.REGTYPE, target, len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("link", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
def test_a_tar_reaches_no_file_outside_and_writes_none(link: bytes, tmp_path: Path) -> None:
    """Its members would be written to, and read from, a folder beside the shards."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("canary-in-a-caption")
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        add(archive, "good.png", picture.getvalue())
        add(archive, "good.txt", b"a picture")
        for place in ("../outside/written", f"{outside}/written", "deep/../../outside/written", "linked/written"):
            add(archive, "linked", link=tarfile.SYMTYPE, target=str(outside))
            add(archive, f"{place}.png", picture.getvalue())
            add(archive, f"{place}.txt", b"a caption")
        for number, target in enumerate((str(outside / "secret.txt"), "../outside/secret.txt")):
            add(archive, f"{number}.png", picture.getvalue())
            add(archive, f"{number}.txt", link=link, target=target)
    report = build([tmp_path / "evil.tar"], tmp_path / "shards")
    assert {path.name for path in outside.iterdir()} == {"secret.txt"}
    assert (outside / "secret.txt").read_text() == "canary-in-a-caption"
    # "linked/written" is a plain name within the archive: a sample, not a file.
    assert [sample.captions for sample in MDSReader(tmp_path / "shards")] == [("a picture",), ("a caption",)]
    assert report.counts.kept == 2
    for path in (tmp_path / "shards").rglob("*.*"):
        assert b"canary-in-a-caption" not in path.read_bytes()


@pytest.mark.parametrize("place", ["../outside.safetensors", "deep/../../outside.safetensors", "absolute"])
def test_a_checkpoint_reads_no_tensor_from_outside(place: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"model.a": torch.ones(2)}, outside)
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    named = str(outside) if place == "absolute" else place
    tensors = {"a": {"shape": [2], "pieces": {"model": [[[0], [2], named]]}}}
    (folder / INDEX).write_text(json.dumps({"format": FORMAT, "version": VERSION, "tensors": tensors}))
    with pytest.raises(CheckpointError, match=r"names '.*', outside the folder"):
        read_index(folder)
    for name in ("manifest.json", "state.json"):
        (folder / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"names '.*', outside the folder"):
        open_source(folder)
