"""Compile the shipped kernels for GPUs that are not there, and read what the compiler made of them.

    python kernels/tests/aot.py --refresh          write aot_baseline.json anew for this version of Triton
    python kernels/tests/aot.py NAME [--arch 90]   the report of the variants whose name contains NAME

Triton brings the compiler and the disassembler along; it must not run under its interpreter here.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rae_kernels.triton_impl.variants import Variant

FAMILIES = ("norm", "qk_rope", "swiglu", "flow")
ARCHS = (80, 90, 100)
MAIN_ARCH = 90
BASELINE = Path(__file__).with_name("aot_baseline.json")
REGISTERS_MAY_MOVE = 8
SHARED_LIMIT = 227 * 1024
"""Of one program on sm_90 and sm_100."""

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Compiled(NamedTuple):
    """registers per thread; stack (where spills go) and shared memory in bytes; SASS instructions by name."""

    registers: int
    stack: int
    shared: int
    instructions: Counter[str]

    @property
    def local_accesses(self) -> int:
        """Loads and stores of spilled registers."""
        return sum(count for name, count in self.instructions.items() if name.split(".")[0] in ("LDL", "STL"))


def compile_variant(variant: Variant, arch: int) -> Compiled:
    """As at the first launch on such a GPU."""
    kernel = variant.kernel
    signature = {name: "constexpr" if name in variant.constants else variant.types[name] for name in kernel.arg_names}
    aligned = [
        place
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in variant.divisible
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(variant.constants),
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return inspect(compiled.asm["cubin"], compiled.metadata.shared)


def inspect(cubin: bytes, shared: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("--dump-resource-usage", file.name)
        listing = run_tool("-sass", file.name)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)", listing, flags=re.MULTILINE)
    return Compiled(int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), shared, Counter(names))


def run_tool(option: str, path: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


def shipped() -> list[Variant]:
    """Every variant of every family."""
    return [v for family in FAMILIES for v in import_module(f"rae_kernels.triton_impl.{family}").variants()]


def every_case(variants: Iterable[Variant]) -> dict[str, tuple[Variant, int]]:
    """Every variant on every architecture, by name."""
    return {key(variant, arch): (variant, arch) for variant in variants for arch in ARCHS}


def key(variant: Variant, arch: int) -> str:
    return f"{variant.name} sm_{arch}"


def read_baseline() -> dict[str, int]:
    """Registers of every case with this version of Triton; none where it was never measured."""
    everything = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    return everything.get(version(), {})


def version() -> str:
    """Triton's minor version: another one brings another compiler."""
    return ".".join(triton.__version__.split(".")[:2])


def refresh() -> None:
    everything = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    everything[version()] = {name: compile_variant(*case).registers for name, case in every_case(shipped()).items()}
    BASELINE.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
    print(f"{BASELINE}: {len(everything[version()])} kernels with Triton {version()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="?", default="", help="only variants whose name contains it")
    parser.add_argument("--arch", type=int, choices=ARCHS, default=MAIN_ARCH)
    parser.add_argument("--refresh", action="store_true", help="write the baseline of registers")
    given = parser.parse_args()
    if given.refresh:
        refresh()
        return
    print(f"{'variant':72s} {'REG':>4s} {'STACK':>6s} {'SHARED':>7s}  vector accesses")
    for variant in shipped():
        if given.name in variant.name:
            found = compile_variant(variant, given.arch)
            vectors = {name: count for name, count in found.instructions.items() if name.endswith(".128")}
            print(f"{variant.name:72s} {found.registers:4d} {found.stack:6d} {found.shared:7d}  {vectors}")


if __name__ == "__main__":
    main()
