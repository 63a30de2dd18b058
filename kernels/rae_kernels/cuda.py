"""CUDA C++ that ships as text (csrc/*.cu) and is compiled where it runs, at its first use.

NVRTC, which every CUDA build of PyTorch brings along, compiles it; the driver loads and launches it. That takes neither
a compiler nor CUDA's headers, and no interface of PyTorch that may change.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

OPTIONS = ("--std=c++17", "--fmad=false")
"""No fused multiply-adds: the sources state their arithmetic, and results are compared bit by bit."""


class Program(NamedTuple):
    """A file of csrc, and values of the macros that it leaves open."""

    file: str
    macros: tuple[tuple[str, int], ...] = ()

    @property
    def source(self) -> str:
        return resources.files("rae_kernels").joinpath("csrc", self.file).read_text(encoding="utf-8")

    @property
    def definitions(self) -> list[str]:
        """Compiler options that set the macros."""
        return [f"-D{name}={value}" for name, value in self.macros]


@functools.cache
def nvrtc() -> ctypes.CDLL:
    """NVIDIA's run-time compiler.

    Raises:
        OSError: there is none in the process, on the loader's path, in an NVIDIA wheel or in CUDA_HOME.
    """
    major = (torch.version.cuda or "").partition(".")[0]
    wheels = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in wheels.submodule_search_locations or ()] if wheels else []
    found = [str(path) for root in roots for path in sorted(root.glob("*/lib/libnvrtc.so.*"), reverse=True)]
    found.sort(key=lambda path: not path.endswith(f".so.{major}"))  # of PyTorch's own CUDA first
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    places = [f"libnvrtc.so.{major}", *found, f"{toolkit}/lib64/libnvrtc.so"]
    for place in places:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise OSError(f"libnvrtc is not among {', '.join(places)}; install nvidia-cuda-nvrtc for PyTorch's CUDA version")


def compile_cubin(program: Program, architecture: str) -> bytes:
    """Machine code of `program` for a GPU such as "sm_90".

    Raises:
        OSError: there is no NVRTC.
        RuntimeError: NVRTC does not know the architecture, or does not accept the source; its log is in the message.
    """
    library, handle = nvrtc(), ctypes.c_void_p()
    source, file = program.source.encode(), program.file.encode()
    created = library.nvrtcCreateProgram(ctypes.byref(handle), source, file, 0, None, None)
    check_nvrtc(library, created, f"{program.file} for {architecture}")
    try:
        options = [f"--gpu-architecture={architecture}", *OPTIONS, *program.definitions]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(handle, len(options), array)
        if status:
            log = fetch(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, handle)
            text = log.rstrip(b"\0\n").decode(errors="replace")
            check_nvrtc(library, status, f"{program.file} for {architecture}: {text}")
        return fetch(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, handle)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(handle))


def fetch(size_of: Any, copy: Any, handle: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    if size_of(handle, ctypes.byref(size)):
        return b""
    buffer = ctypes.create_string_buffer(size.value)
    return buffer.raw if copy(handle, buffer) == 0 else b""


def check_nvrtc(library: ctypes.CDLL, status: int, doing: str) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC did not compile {doing} ({library.nvrtcGetErrorString(status).decode()})")


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check_driver(status: int, doing: str) -> None:
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"CUDA could not {doing}: {(text.value or b'unknown error').decode()}")


class Kernel:
    """A function of a loaded program, on one GPU."""

    def __init__(self, module: ctypes.c_void_p, name: str) -> None:
        self.name = name
        self._function = ctypes.c_void_p()
        found = driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode())
        check_driver(found, f"find {name}")

    def launch(self, blocks: int, threads: int, *arguments: Any) -> None:
        """On PyTorch's current stream of the current device. arguments: ctypes values, in the order of the kernel's."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        status = driver().cuLaunchKernel(self._function, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, None)
        check_driver(status, f"launch {self.name}")


@functools.cache
def cubin(program: Program, architecture: str) -> bytes:
    """`compile_cubin`, once in a process."""
    return compile_cubin(program, architecture)


@functools.cache
def load(program: Program, device: int) -> ctypes.c_void_p:
    """`program` in the context of GPU number `device`, which has to be the current one."""
    torch.cuda.synchronize(device)  # makes PyTorch's context the thread's
    major, minor = torch.cuda.get_device_capability(device)
    code, module = cubin(program, f"sm_{major}{minor}"), ctypes.c_void_p()
    check_driver(driver().cuModuleLoadData(ctypes.byref(module), code), f"load {program.file}")
    return module


@functools.cache
def find_kernel(program: Program, name: str, device: int) -> tuple[Kernel | None, str]:
    """The kernel on that GPU; where there cannot be one, None and why not. Both are found out once."""
    try:
        with torch.cuda.device(device):
            return Kernel(load(program, device), name), ""
    except (OSError, RuntimeError) as error:
        return None, str(error)
