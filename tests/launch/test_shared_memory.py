"""What is removed from /dev/shm: files of dead processes of this launch, and nothing else."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from rae_scale.launch.processes import Process, read_process
from rae_scale.launch.shared_memory import SHM, SharedMemory, mapped

PORT = 31999
HOLD = """
import mmap, sys
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def name() -> Iterator[str]:
    """Of a file in /dev/shm, which the test makes and does not leave."""
    name = f"rae-test-{uuid.uuid4().hex}"
    yield name
    for path in SHM.glob(f"*{name}*"):
        path.unlink()


def make(name: str) -> Path:
    path = SHM / name
    path.write_bytes(bytes(4096))
    return path


def own_process() -> Process:
    process = read_process(os.getpid())
    assert process is not None
    return process


def test_what_a_dead_process_had_mapped_is_removed(name: str) -> None:
    path = make(name)
    memory = SharedMemory(PORT)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "mapped\n"
        process = read_process(holder.pid)
        assert process is not None
        memory.observe([process])
        assert memory.remove_left() == [], "a living process has it"
        holder.kill()
    assert memory.remove_left() == [name]
    assert not path.exists()


def test_what_nobody_of_ours_had_stays(name: str) -> None:
    make(name)
    memory = SharedMemory(PORT)
    memory.observe([own_process()])
    assert name not in memory.remove_left()


def test_another_file_of_the_same_name_stays(name: str) -> None:
    path = make(name)
    memory = SharedMemory(PORT)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        memory.observe([own_process()])
        assert (name, path.stat().st_ino) in mapped(os.getpid())
        path.unlink()
        make(name)
    assert name not in memory.remove_left()


def test_deepspeeds_buffers_are_known_by_the_port(name: str) -> None:
    ours = make(f"deepspeed_allreduce_buffer_{os.getuid()}_{name}_{PORT}_0")
    another_run = make(f"deepspeed_allreduce_buffer_{os.getuid()}_{name}_{PORT + 1}_0")
    another_user = make(f"deepspeed_allreduce_buffer_{os.getuid() + 1}_{name}_{PORT}_0")
    assert SharedMemory(PORT).remove_left() == [ours.name]
    assert another_run.exists() and another_user.exists()


def test_torchs_tensors_are_known_by_the_process(name: str) -> None:
    memory = SharedMemory(PORT)
    memory.observe([Process(4_194_305, 1, 0)])
    ours, other = make(f"torch_4194305_{name}"), make(f"torch_4194306_{name}")
    assert memory.remove_left() == [ours.name]
    assert other.exists()
