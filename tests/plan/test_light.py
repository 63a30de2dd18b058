"""Planning does not import torch's compiler, and leaves no trace of how it avoids that."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import torch
from rae_scale.plan.light import without_compiler

def normal():
    return torch.empty(3, device="meta").normal_()  # a Python function that the compiler is to leave alone

with without_compiler():
    normal()
    import torch._dynamo.config
    assert "torch._dynamo.convert_frame" not in sys.modules, "the compiler was imported"
assert not any(name.startswith("torch._dynamo") for name in sys.modules), "the stand-in is still there"
normal()
assert "torch._dynamo.convert_frame" in sys.modules, "the compiler is not told any more"
double = torch.compile(lambda x: 2 * x, backend="eager")
assert double(torch.ones(1)).item() == 2
with without_compiler():
    assert sys.modules["torch._dynamo"].disable.__module__ == "torch._dynamo.decorators", "the real one was replaced"
"""

NEEDED = """
import torch
from rae_scale.plan.light import without_compiler

with without_compiler():
    double = torch.compile(lambda x: 2 * x, backend="eager")
    assert double(torch.ones(1)).item() == 2
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_compiler_is_not_imported() -> None:
    run(SCRIPT)


def test_who_needs_it_gets_it() -> None:
    run(NEEDED)
