"""The adapters by name: how each corpus keeps its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

from rae_scale.data.adapters.auto import Auto
from rae_scale.data.adapters.base import Adapter, Damage, Item
from rae_scale.data.adapters.blip3o import Blip3o
from rae_scale.data.adapters.blip3o_60k import Blip3o60k
from rae_scale.data.adapters.cambrian import Cambrian
from rae_scale.data.adapters.cc12m_llavanext import CC12MLlavaNext
from rae_scale.data.adapters.fusedit import FuseDiT
from rae_scale.data.adapters.rendered_text import RenderedText
from rae_scale.data.adapters.scale_rae import ScaleRAE

ADAPTERS: dict[str, type[Adapter]] = {
    adapter.name: adapter
    for adapter in (Auto, Blip3o, Blip3o60k, Cambrian, CC12MLlavaNext, FuseDiT, RenderedText, ScaleRAE)
}

__all__ = ["ADAPTERS", "Adapter", "Damage", "Item", "adapter_options", "find_adapter", "make_adapter"]


def make_adapter(name: str, options: Mapping[str, str] | None = None) -> Adapter:
    """The adapter called `name` with `options` as the command line gives them.

    Raises ValueError, listing the names there are, for an unknown adapter or option, a value of the wrong kind, and an
    option that is missing.
    """
    kind = find_adapter(name)
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    values = {}
    for option, text in (options or {}).items():
        if option not in known:
            choices = f"its options are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"adapter {name!r} has no option {option!r}; {choices}")
        values[option] = parse_value(hints[option], text, f"adapter {name!r}: {option}={text}")
    missing = [option for option, field in known.items() if field.default is MISSING and option not in values]
    if missing:
        raise ValueError(f"adapter {name!r} needs the option {missing[0]}; give --adapter-option {missing[0]}=...")
    return kind(**values)


def find_adapter(name: str) -> type[Adapter]:
    if name not in ADAPTERS:
        raise ValueError(f"adapter {name!r} is not known; choose one of {', '.join(sorted(ADAPTERS))}")
    return ADAPTERS[name]


def adapter_options(name: str) -> dict[str, str]:
    """The options of an adapter, with their defaults as text (`required` where there is none)."""
    return {
        field.name: "required" if field.default is MISSING else str(field.default) for field in fields(ADAPTERS[name])
    }


def parse_value(kind: object, text: str, where: str) -> object:
    """Option text as the type of its field: a number, a switch, a path or text."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where}: give true or false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)  # type: ignore[operator]
        except ValueError:
            raise ValueError(f"{where}: a number is expected") from None
    if kind in (Path, Path | None):
        return Path(text)
    return text
