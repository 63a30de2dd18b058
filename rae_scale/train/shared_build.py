"""One whole model per machine while a run starts, however many of its processes are there.

Before it is sharded, a 9.8B DiT beside a 7B language model is 70 GB of float32 weights: eight processes that each build
it would need half a terabyte of host memory. So one process of a machine builds it and writes its weights to a file;
the others build the same modules around nothing and map that file, copying only what their shards take from it.

The file has no name, so that nothing of it stays when processes are killed: the others find it by the writer's open
file in /proc.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

import torch
from torch import nn

from rae_scale.parallel import Mesh
from rae_scale.state.agreement import agree

T = TypeVar("T")

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PID_NAMESPACE = Path("/proc/self/ns/pid")


def build_once_per_machine(
    build: Callable[[], T], build_empty: Callable[[], T], module_of: Callable[[T], nn.Module], mesh: Mesh
) -> T:
    """What `build` returns, on every process, though it runs on one process of each machine only. Collective.

    build_empty: the same under `parameters_on_meta`, whose parameters then get the weights of the other's.
    module_of:   the module in what they return; its parameters are float32 on the CPU.

    Raises:
        CheckpointError, ValueError: on every process, what one of them could not build or write.
    """
    machines = mesh.gather_objects(machine())
    writer, count = machines.index(machines[mesh.rank]), machines.count(machines[mesh.rank])
    built: list[T] = []
    with contextlib.ExitStack() as open_files:

        def build_and_write() -> Path | None:
            if writer != mesh.rank:
                return None
            built.append(build())
            if count == 1:
                return None
            file = open_files.enter_context(written(module_of(built[0])))
            return Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")

        path = agree(mesh, build_and_write)[writer]
        if path is not None and writer != mesh.rank:
            built.append(build_empty())
            fill(module_of(built[0]), path)
        mesh.barrier()
    return built[0]


def machine() -> tuple[str, ...]:
    """Equal for processes that see each other's open files and share their memory: host name, the id of the kernel's
    start, and the namespace of process numbers. Containers have their own."""
    boot = BOOT_ID.read_text() if BOOT_ID.is_file() else ""
    return socket.gethostname(), boot, os.readlink(PID_NAMESPACE) if PID_NAMESPACE.is_symlink() else ""


@contextlib.contextmanager
def written(module: nn.Module) -> Iterator[IO[bytes]]:
    """The parameters of `module`, one after the other, in a file without a name, as much as possible in memory.

    Raises:
        OSError: no folder has room for it.
    """
    size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    # Without a name from the beginning, where the file system can do that; else unlinked at once.
    with tempfile.TemporaryFile(dir=folder_with_room(size)) as file:
        for parameter in module.parameters():
            file.write(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        yield file


def folder_with_room(size: int) -> str:
    folders = [folder for folder in ("/dev/shm", tempfile.gettempdir()) if os.path.isdir(folder)]
    for folder in folders:
        if shutil.disk_usage(folder).free > 1.05 * size:
            return folder
    raise OSError(
        f"the weights ({size / 1e9:.1f} GB) are handed from process to process in a file, and none of "
        f"{', '.join(folders)} has room for it; give the container more shared memory (docker run --ipc host), or set "
        "TMPDIR to a folder with room"
    )


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that are built inside have parameters without memory, while their constants are real."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is tied to another is on meta already
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def fill(module: nn.Module, path: Path) -> None:
    """Give the parameters of `module`, which have no memory, the contents of a file of `written`.

    The file is mapped: what is never written to exists once for all processes, whether or not it is still open.
    """
    parameters = list(module.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.float32)
    filled = {}
    for parameter, flat in zip(parameters, mapped.split([p.numel() for p in parameters]), strict=True):
        filled[parameter] = nn.Parameter(flat.view(parameter.shape), requires_grad=parameter.requires_grad)
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            setattr(part, name, filled[parameter])
