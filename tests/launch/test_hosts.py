"""Host files and the GPUs of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from rae_scale.launch.hosts import Host, count_gpus, read_hostfile, threads_per_process
from rae_scale.launch.place import wait_for_name


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text)
    return path


def test_hostfile(tmp_path: Path) -> None:
    path = write(tmp_path, "# the rack\ngpu-1 slots=8\n\n10.0.0.2 slots = 4  # half\ngpu-3\n")
    assert read_hostfile(path) == [Host("gpu-1", 8), Host("10.0.0.2", 4), Host("gpu-3", None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu-1 gpus=8\n", "line 1.*not of the form"),
        ("gpu-1 slots=0\n", "no slots"),
        ("gpu-1 slots=8\ngpu-1 slots=8\n", "line 2: gpu-1 is there twice"),
        ("-oProxyCommand=x slots=1\n", "not of the form"),
        ("# nothing\n", "no machine"),
    ],
)
def test_wrong_hostfiles(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_hostfile(write(tmp_path, text))


def test_no_hostfile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize(("visible", "count"), [("0,1,2", 3), ("", 0), ("-1", 0), ("GPU-4f,GPU-5a", 2)])
def test_visible_gpus(visible: str, count: int) -> None:
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible}) == count


def test_threads_are_the_users_or_a_share() -> None:
    assert threads_per_process(4, {"OMP_NUM_THREADS": "3"}) == "3"
    assert threads_per_process(10_000, {}) == "1"


def test_a_name_that_never_appears() -> None:
    wait_for_name("127.0.0.1", 0)
    with pytest.raises(ValueError, match=r"--master-addr node-0\.invalid: no address"):
        wait_for_name("node-0.invalid", 0)
