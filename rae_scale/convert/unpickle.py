"""Reading pickles without running them.

A pickle is a program: it may call whatever it can name. Here its instructions are read one by one, and the only things
that it can name are those in the reader's table, each of them a function of ours that builds a plain value. Nothing is
imported, no attribute is looked up or set on anything but `Inert`, and there is no other way in: what is not in the
table is refused by its name.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rae_scale.state.format import CheckpointError


@dataclass(frozen=True)
class Global:
    """A name in a pickle, "module name", that stands where a value is wanted: a dtype, a class in a tuple."""

    name: str


@dataclass(eq=False)
class Inert:
    """An object of a class that is known to carry nothing but data: what it was built from, and its state."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


Calls = Mapping[str, Callable[..., Any] | None]
"""What a pickle may name, and what calling it builds; None: it may be named, not called."""

MARK = object()
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS = frozenset(("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"))
TEXTS = frozenset(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"))
EMPTY: Mapping[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
FRAMING = frozenset(("PROTO", "FRAME"))


def inert(*names: str) -> dict[str, Callable[..., Any]]:
    """Table entries for classes that carry only data."""

    def entry(name: str) -> Callable[..., Any]:
        return lambda *arguments: Inert(name, arguments)

    return {name: entry(name) for name in names}


def read_pickle(data: bytes, calls: Calls, what: str, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value that a pickle of protocol 2 to 5 describes.

    calls:      what it may name: "module name" -> what calling that builds.
    persistent: what an id stands for that the pickle leaves to its reader, such as a tensor's data.
    what:       for messages.

    Raises:
        CheckpointError: it names something else, has an instruction that data needs not, or is damaged.
    """
    try:
        return Machine(calls, what, persistent).run(data)
    except CheckpointError:
        raise
    except Exception as error:  # pickletools and wrong operands raise many kinds
        raise CheckpointError(f"{what} is damaged: no valid pickle ({type(error).__name__}: {error})") from None


class Machine:
    """The instructions of a pickle that data needs."""

    def __init__(self, calls: Calls, what: str, persistent: Callable[[Any], Any] | None) -> None:
        self.calls, self.what, self.persistent = calls, what, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name == "STOP":
                (value,) = self.stack
                return value
            self.step(operation.name, argument)
        raise ValueError("it has no end")

    def step(self, name: str, argument: Any) -> None:
        stack, memo = self.stack, self.memo
        if name in NUMBERS or name in TEXTS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            stack.append(MARK)
        elif name in TUPLES:
            stack.append(tuple(reversed([stack.pop() for _ in range(TUPLES[name])])))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in FRAMING:
            self.build(name, argument)

    def build(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "TUPLE":
            stack.append(tuple(self.from_mark()))
        elif name == "SETITEM":
            key, value = stack.pop(-2), stack.pop()
            plain(stack[-1], dict)[key] = value
        elif name == "SETITEMS":
            items = self.from_mark()
            plain(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "APPEND":
            value = stack.pop()
            plain(stack[-1], list).append(value)
        elif name == "APPENDS":
            values = self.from_mark()
            plain(stack[-1], list).extend(values)
        elif name == "ADDITEMS":
            values = self.from_mark()
            plain(stack[-1], set).update(values)
        elif name == "GLOBAL":
            stack.append(self.named(argument))
        elif name == "STACK_GLOBAL":
            module, attribute = stack.pop(-2), stack.pop()
            stack.append(self.named(f"{module} {attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            called, arguments = stack.pop(-2), stack.pop()
            stack.append(self.call(called, plain(arguments, tuple)))
        elif name == "BUILD":
            self.give_state(stack.pop())
        elif name == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(stack.pop()))
        else:
            raise self.refused(f"has the instruction {name}, which data needs not")

    def from_mark(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        values: list[Any] = []
        while (value := self.stack.pop()) is not MARK:
            values.append(value)
        return values[::-1]

    def named(self, name: str) -> Global:
        if name not in self.calls:
            raise self.refused(f"names {name.replace(' ', '.')}, which loading it would import and may run")
        return Global(name)

    def call(self, called: Any, arguments: tuple[Any, ...]) -> Any:
        function = self.calls[called.name] if isinstance(called, Global) else None
        if function is None:
            what = called.name.replace(" ", ".") if isinstance(called, Global) else type(called).__name__
            raise self.refused(f"calls {what}")
        return function(*arguments)

    def give_state(self, state: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict):  # an OrderedDict's attributes, such as torch's _metadata, are not kept
            raise self.refused(f"sets attributes of {type(target).__name__}")

    def refused(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.what}: its pickle {why}. It is not loaded, since a pickle can run any code; have its tensors saved "
            "alone, as a dict by name, with torch.save or as safetensors"
        )


def plain(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} in place of {kind.__name__}")
    return value
