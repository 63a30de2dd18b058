"""Every shipped kernel compiles for sm_80, sm_90 and sm_100 without spilling, with vector loads and stores."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter cannot compile", allow_module_level=True)

import importlib.util
import json
import sys
from importlib import import_module
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("aot", Path(__file__).with_name("aot.py"))
aot = sys.modules["aot"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(aot)

SHIPPED = aot.shipped()
CASES = aot.every_case(SHIPPED)


def allowed_stack(name: str) -> int:
    """Triton 3.6's sine and cosine keep a table on the stack, and its compiler is one register short for wide rows."""
    if tuple(map(int, aot.version().split("."))) >= (3, 7):
        return 0
    return {"flow": 32, "norm": 16}.get(name.partition("_")[0], 0)


def check(name: str, found) -> None:
    spilled = found.stack > allowed_stack(name) or (found.stack == 0 and found.local_accesses > 0)
    assert not spilled, (
        f"{name} spills: {found.stack} bytes of stack, {found.local_accesses} accesses; give it more warps"
    )
    assert found.shared <= aot.SHARED_LIMIT, f"{name} wants {found.shared} bytes of shared memory"


def check_instructions(name: str, variant, found) -> None:
    missing = [wanted for wanted in variant.instructions if not any(wanted in seen for seen in found.instructions)]
    assert not missing, f"{name} has no {', '.join(missing)}, but {dict(found.instructions)}"


@pytest.mark.parametrize("name", CASES)
def test_compiles_as_expected(name: str):
    variant, arch = CASES[name]
    found = aot.compile_variant(variant, arch)
    check(name, found)
    check_instructions(name, variant, found)
    baseline = aot.read_baseline()
    if baseline:  # there is one for this version of Triton
        assert name in baseline, f"{name} is not in {aot.BASELINE.name}; run `python kernels/tests/aot.py --refresh`"
        assert abs(found.registers - baseline[name]) <= aot.REGISTERS_MAY_MOVE, (
            f"{name} takes {found.registers} registers and took {baseline[name]}: fewer programs run at once. If that "
            "is meant, run `python kernels/tests/aot.py --refresh`"
        )


def test_every_kernel_is_compiled():
    """Names of jit functions that are launched, from the modules that define them."""
    for family in aot.FAMILIES:
        module = import_module(f"rae_kernels.triton_impl.{family}")
        module = getattr(module, "kernels", module)
        launched = {name for name in vars(module) if name.endswith("_kernel")}
        assert launched and launched <= {variant.kernel.__name__ for variant in SHIPPED}


def test_baseline_lists_what_is_compiled_and_nothing_else():
    for version, registers in json.loads(aot.BASELINE.read_text()).items():
        assert set(registers) == set(CASES), f"refresh {aot.BASELINE.name} for Triton {version}"


def test_a_spill_is_seen():
    """A block that is far too wide for one warp's registers."""
    wide = next(v for v in SHIPPED if v.kernel.__name__ == "gated_residual_norm_backward_kernel" and "2048" in v.name)
    found = aot.compile_variant(wide._replace(num_warps=1), aot.MAIN_ARCH)
    assert found.stack > 0 or found.local_accesses > 0
    with pytest.raises(AssertionError, match="spills"):
        check(wide.name, found)


def test_scalar_loads_are_seen():
    """Without knowing that strides divide by 16, Triton cannot load 16 bytes at once."""
    variant = next(v for v in SHIPPED if v.kernel.__name__ == "gated_residual_kernel" and "2048" in v.name)
    found = aot.compile_variant(variant._replace(divisible=()), aot.MAIN_ARCH)
    with pytest.raises(AssertionError, match=r"has no .*LDG\.E\.128"):
        check_instructions(variant.name, variant, found)
