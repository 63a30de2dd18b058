"""Tensors without values that pass for tensors of the CPU.

The meta device has no values either, but autocast, attention and a few other operators ask what device they run on, and
know no meta device. torch's own answer is FakeTensorMode. A plan does without its symbolic sizes, constants and caches,
which take longer than the operators: a first plan imports no sympy and traces in a third of the time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

CPU, META = torch.device("cpu"), torch.device("meta")


class Hollow(Tensor):
    """Says that it is on the CPU, and is `meta` inside, a tensor of the meta device: operators run on that.

    Operators that change sizes or strides in place are not for it, nor those whose results' sizes depend on values.
    """

    meta: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, meta: Tensor) -> Hollow:
        made = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype, device=CPU
        )
        made.meta = meta
        return made

    @staticmethod
    def like(tensor: Tensor) -> Tensor:
        """A hollow parameter for a parameter, of any device; a tensor for a tensor."""
        hollow = Hollow(tensor.detach().to(META))
        if not isinstance(tensor, nn.Parameter):
            return hollow
        with NoValues():  # by a mode, since the first dispatch by a class makes torch import DTensor, and that sympy
            return nn.Parameter(hollow, tensor.requires_grad)

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of all views of a tensor the same one."""
        return self.meta.untyped_storage()

    def __repr__(self) -> str:
        return f"Hollow({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_inside(func, args, kwargs or {})


class NoValues(TorchDispatchMode):
    """Inside, all new tensors are hollow, and so is what operators make of others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_inside(func, args, kwargs or {})


def run_inside(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` on the meta device. A result that is one of the arguments is the same object outside, too."""
    given: dict[int, Hollow] = {}
    inner, named = inside(args, given), inside(kwargs, given)
    if takes_device(func) and (named.get("device") is not None or not given):
        named["device"] = META
    return outside(func(*inner, **named), given)


# None of these is a function inside a function: one that calls itself would be garbage for the collector, and until it
# came, its tensors would count as alive.
def inside(value: Any, given: dict[int, Hollow]) -> Any:
    """`value` with tensors of the meta device in it. given: gets the hollow ones, by what is inside them."""
    if isinstance(value, Hollow):
        given[id(value.meta)] = value
        return value.meta
    if isinstance(value, Tensor):
        return value.to(META)
    if isinstance(value, (list, tuple)):
        return type(value)([inside(item, given) for item in value])
    if isinstance(value, dict):
        return {name: inside(item, given) for name, item in value.items()}
    return value


def outside(value: Any, given: dict[int, Hollow]) -> Any:
    if isinstance(value, Tensor):
        return given[id(value)] if id(value) in given else Hollow(value)
    if isinstance(value, (list, tuple)):
        return type(value)([outside(item, given) for item in value])
    return value


@cache
def takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)
