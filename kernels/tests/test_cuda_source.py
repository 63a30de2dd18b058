"""Every CUDA C++ source as it ships: compiled by NVRTC through the library's own code, without a GPU."""

from __future__ import annotations

import re
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from rae_kernels import cuda
from rae_kernels.adamw import GRADIENT_DTYPES, MOMENT_DTYPES, PROGRAM, kernel_name

KERNELS = {kernel_name(gradient, moment) for gradient in GRADIENT_DTYPES for moment in MOMENT_DTYPES}


@pytest.fixture
def nvrtc() -> None:
    try:
        cuda.nvrtc()
    except OSError as error:
        pytest.skip(f"needs NVRTC: {error}")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_adamw_compiles_without_spills_and_with_wide_accesses(nvrtc: None, tmp_path: Path, architecture: str):
    cubin = tmp_path / "adamw.cubin"
    cubin.write_bytes(cuda.compile_cubin(PROGRAM, architecture))
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("this triton brings no cuobjdump")

    def dump(option: str) -> str:
        return subprocess.run([cuobjdump, option, cubin], check=True, capture_output=True, text=True).stdout

    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", dump("--dump-resource-usage"))
    assert {name for name, *_ in usage} == KERNELS
    for name, registers, *spilled in usage:
        assert spilled == ["0", "0"], f"{name} spills"
        assert int(registers) <= 128, f"{name} takes {registers} registers: fewer than two blocks share a processor"
    functions = re.split(r"Function : ", dump("-sass"))[1:]
    assert {text.split()[0] for text in functions} == KERNELS
    for text in functions:
        instructions = set(re.findall(r"\b[A-Z][A-Z0-9_.]+\b", text))
        assert {"LDG.E.128", "STG.E.128"} <= instructions, text.split()[0]
        # Addresses are known to be of global memory, and nothing is in local memory.
        assert not [name for name in instructions if name.split(".")[0] in ("LD", "ST", "LDL", "STL")], text.split()[0]


def test_what_cannot_be_compiled_says_why(nvrtc: None, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(RuntimeError, match=r"adamw_ema.cu for sm_10: .*arch"):
        cuda.compile_cubin(PROGRAM, "sm_10")
    with pytest.raises(RuntimeError, match=r'identifier "THREADS" is undefined'):
        cuda.compile_cubin(PROGRAM._replace(macros=()), "sm_90")


def test_sources_are_in_the_package():
    files = [path.name for path in resources.files("rae_kernels").joinpath("csrc").iterdir()]
    assert files == [PROGRAM.file]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    def refuse(path: str) -> None:
        raise OSError(path)

    monkeypatch.setattr(cuda.ctypes, "CDLL", refuse)
    with pytest.raises(OSError, match="install nvidia-cuda-nvrtc"):
        cuda.nvrtc.__wrapped__()
