"""Running torch's Python operators without importing its compiler."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

COMPILER = "torch._dynamo"
WRAPPED = "__dynamo_disable"
"""Where `torch._compile._disable_dynamo` keeps a function that the compiler leaves alone."""


class NoCompiler(ModuleType):
    """Stands in for `torch._dynamo` in what functions need that are marked as not to be compiled: they are called as
    they are. Whoever wants more of it gets the real one."""

    def __init__(self) -> None:
        super().__init__(COMPILER)
        spec = importlib.util.find_spec(COMPILER)
        # So that its parts, such as its settings, are found without it.
        self.__path__ = list(spec.submodule_search_locations or ()) if spec else []
        self.kept: list[Callable[..., Any]] = []
        # Of the compiler's caches, which `init_process_group` clears once the module is there.
        self.trace_rules = SimpleNamespace(clear_lru_cache=lambda: None)

    def disable(self, fn: Callable[..., Any], recursive: bool = True, *, wrapping: bool = True) -> Callable[..., Any]:
        self.kept.append(fn)
        return fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks of every module
            raise AttributeError(name)
        if name == "config":  # checkpointing reads one of its settings
            return importlib.import_module(f"{COMPILER}.config")
        self.leave()
        return getattr(importlib.import_module(COMPILER), name)

    def enter(self) -> None:
        sys.modules[COMPILER] = self
        torch._dynamo = self

    def leave(self) -> None:
        """As if it had never been there: the next call of those functions imports the compiler."""
        if sys.modules.get(COMPILER) is self:
            for name in [name for name in sys.modules if name == COMPILER or name.startswith(f"{COMPILER}.")]:
                del sys.modules[name]
            del torch._dynamo
        for fn in self.kept:
            vars(fn).pop(WRAPPED, None)
        self.kept.clear()


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Do not import torch's compiler inside. Operators on tensors without values run Python functions that import it,
    only to tell it to leave them alone: more than a second, and planning compiles nothing.

    Nothing changes where it has been imported already.
    """
    if COMPILER in sys.modules:
        yield
        return
    stand_in = NoCompiler()
    stand_in.enter()
    try:
        yield
    finally:
        stand_in.leave()
