from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from rae_scale.data.shapes import tars
from rae_scale.data.shapes.render import render
from rae_scale.data.shapes.tars import write_tars
from rae_scale.data.shapes.world import WorldConfig, evaluation_seed, sample_scene


def read(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def test_tars_hold_the_stream_in_order(tmp_path: Path) -> None:
    paths = write_tars(tmp_path / "new" / "folder", 25, seed=4, samples_per_tar=10)
    assert [path.name for path in paths] == ["shapes-00000.tar", "shapes-00001.tar", "shapes-00002.tar"]
    members = [read(path) for path in paths]
    assert [len(part) for part in members] == [30, 30, 15]
    assert list(members[2])[:3] == ["00000020.jpg", "00000020.txt", "00000020.json"]
    for index in range(25):
        part, scene = members[index // 10], sample_scene(4, index)
        assert part[f"{index:08d}.txt"].decode() == scene.caption
        assert json.loads(part[f"{index:08d}.json"]) == scene.metadata
        picture = simplejpeg.decode_jpeg(part[f"{index:08d}.jpg"]).astype(int)
        assert np.abs(picture - render(scene)).mean() < 2


def test_the_same_call_writes_the_same_bytes(tmp_path: Path) -> None:
    config = WorldConfig(size=48)
    first, second, other = (
        write_tars(tmp_path / name, 6, seed, config) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first[0].read_bytes() == second[0].read_bytes() != other[0].read_bytes()


def test_chroma_is_not_subsampled(tmp_path: Path) -> None:
    (path,) = write_tars(tmp_path, 1)
    assert simplejpeg.decode_jpeg_header(read(path)["00000000.jpg"])[3] == "444"


def test_an_interrupted_tar_never_shows_up_and_is_written_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seed: int, index: int, config: WorldConfig) -> None:
        if index == 7:
            raise KeyboardInterrupt
        return sample_scene(seed, index, config)

    with monkeypatch.context() as patch:
        patch.setattr(tars, "sample_scene", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_tars(tmp_path, 10, samples_per_tar=5)
    assert [path.name for path in tmp_path.glob("*.tar")] == ["shapes-00000.tar"]
    paths = write_tars(tmp_path, 10, samples_per_tar=5)
    assert sorted(tmp_path.iterdir()) == paths


def test_tars_of_another_set_are_refused(tmp_path: Path) -> None:
    write_tars(tmp_path, 4, samples_per_tar=2)
    with pytest.raises(ValueError, match=r"shapes-00001\.tar.*empty folder"):
        write_tars(tmp_path, 4, samples_per_tar=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"count": 1, "samples_per_tar": 0}, "samples_per_tar=0"),
        ({"count": 1, "seed": evaluation_seed(0)}, "seed="),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_tars(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())
