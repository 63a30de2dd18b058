"""`rae-scale data adapters`: the corpora that a build can read."""

from __future__ import annotations

from inspect import cleandoc
from typing import Annotated

import typer


def adapters(
    name: Annotated[str | None, typer.Argument(help="One adapter; without it all are listed.")] = None,
) -> None:
    """What `build --adapter` can read: the layout of each corpus, where it comes from, and the options."""
    from rae_scale.data.adapters import ADAPTERS, adapter_options, find_adapter

    if name is None:
        width = max(map(len, ADAPTERS))
        for known, kind in sorted(ADAPTERS.items()):
            print(f"{known:{width}}  {cleandoc(kind.__doc__ or '').splitlines()[0]}")
        return
    print(cleandoc(find_adapter(name).__doc__ or ""))
    for option, default in adapter_options(name).items():
        print(f"--adapter-option {option}={default}")
