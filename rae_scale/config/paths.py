"""`asset:demo/encoder` in a config names a file or folder that ships inside the package."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from rae_scale.config.schema import Config, Section

ASSET_PREFIX = "asset:"
ASSET_ROOT = Path(__file__).resolve().parent.parent / "assets"

SectionT = TypeVar("SectionT", bound=Section)


def resolve_path(path: str) -> str:
    """Return `path` with an `asset:` prefix replaced by the package's asset folder; other paths come back unchanged.

    Raises:
        ValueError: the asset does not exist, or its name leaves the asset folder.
    """
    if not path.startswith(ASSET_PREFIX):
        return path
    name = path.removeprefix(ASSET_PREFIX)
    target = (ASSET_ROOT / name).resolve()
    if not name or not target.is_relative_to(ASSET_ROOT):
        raise ValueError(f"{path!r}: an asset is a path inside the package's asset folder, such as asset:demo/encoder")
    if not target.exists():
        raise ValueError(f"{path!r}: this installation ships no such asset; {shipped_assets()}")
    return str(target)


def shipped_assets() -> str:
    names = sorted(str(folder.relative_to(ASSET_ROOT)) for folder in ASSET_ROOT.glob("*/*") if folder.is_dir())
    return f"it ships {', '.join(names)}" if names else "it ships none (give a folder instead)"


def resolve_paths(config: Config) -> Config:
    """Return `config` with every path that it opens resolved. Save the original: it stays true on other machines."""
    model = config.model
    llm = resolved(model.llm, "path", "tokenizer")
    encoder, decoder = resolved(model.encoder, "path"), resolved(model.decoder, "path")
    sources = tuple(resolved(source, "path") for source in config.data.sources)
    return config.model_copy(
        update={
            "run": resolved(config.run, "init_from"),
            "model": model.model_copy(update={"llm": llm, "encoder": encoder, "decoder": decoder}),
            "data": config.data.model_copy(update={"sources": sources}),
        }
    )


def resolved(section: SectionT, *keys: str) -> SectionT:
    given = {key: getattr(section, key) for key in keys}
    return section.model_copy(update={key: resolve_path(path) for key, path in given.items() if path is not None})
