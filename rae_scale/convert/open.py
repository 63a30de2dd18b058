"""`open_source`: a folder or file of any known format, recognised by what is in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from rae_scale.convert.source import Source
from rae_scale.state import latest_checkpoint
from rae_scale.state.format import CHECKPOINTS, INDEX, CheckpointError

Opener = Callable[[Path], Source]


@dataclass(frozen=True)
class Format:
    """looks_like: whether a path is worth opening as this format; reads names, never contents of tensors.
    opener: "module:function", imported when needed; the function takes the path and returns a `Source`."""

    what: str
    marks: str
    looks_like: Callable[[Path], bool]
    opener: str

    def open(self, path: Path) -> Source:
        module, _, name = self.opener.partition(":")
        opener: Opener = getattr(import_module(f"rae_scale.convert.{module}"), name)
        return opener(path)


def has(*names: str) -> Callable[[Path], bool]:
    """Whether a folder has a file of every one of these patterns."""
    return lambda path: path.is_dir() and all(next(path.glob(name), None) is not None for name in names)


def has_any(*names: str) -> Callable[[Path], bool]:
    return lambda path: path.is_dir() and any(next(path.glob(name), None) is not None for name in names)


def ends_with(*suffixes: str) -> Callable[[Path], bool]:
    return lambda path: path.is_file() and path.name.endswith(suffixes)


TORCH_SUFFIXES = (".pt", ".pth", ".bin")
ZSTD_SUFFIXES = (".zst", ".zstd")

# The first that fits counts.
FORMATS = (
    Format("native checkpoint", INDEX, has(INDEX), "native:open_checkpoint"),
    Format(
        "native export",
        "model.safetensors and config.yaml",
        has("model.safetensors", "config.yaml"),
        "native:open_export",
    ),
    Format(
        "DeepSpeed ZeRO checkpoint",
        "*_optim_states.pt, or latest and a folder that has them",
        has_any("*_optim_states.pt", "*/*_optim_states.pt"),
        "deepspeed:open_deepspeed",
    ),
    Format("DCP checkpoint", ".metadata and *.distcp", has(".metadata"), "dcp:open_dcp"),
    Format(
        "safetensors folder",
        "model.safetensors or its index, or diffusion_pytorch_model.safetensors or its index",
        has_any("*.safetensors", "*.safetensors.index.json"),
        "hf_source:open_folder",
    ),
    Format(
        "torch file and config.json",
        "config.json and model.pt or model.pth",
        has_any(*(f"*{suffix}" for suffix in (*TORCH_SUFFIXES, *ZSTD_SUFFIXES))),
        "torch_source:open_folder",
    ),
    Format("safetensors file", "*.safetensors", ends_with(".safetensors"), "hf_source:open_file"),
    Format(
        "torch file",
        ", ".join(f"*{suffix}" for suffix in (*TORCH_SUFFIXES, *ZSTD_SUFFIXES)),
        ends_with(*TORCH_SUFFIXES, *ZSTD_SUFFIXES),
        "torch_source:open_file",
    ),
)


def locate(path: str | Path) -> Path:
    """`path`, or if that is a run folder, its newest checkpoint."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not (path / CHECKPOINTS).is_dir():
        return path
    newest = latest_checkpoint(path)
    if newest is None:
        raise CheckpointError(f"{path} has no complete checkpoint yet; give a run folder that has saved one")
    return newest


def open_source(path: str | Path) -> Source:
    """The source at `path`, which may also be a run folder: its newest checkpoint is taken. Use it as a context.

    Raises:
        CheckpointError: nothing is there, it is of no known format, or what can be checked without reading tensors is
            wrong.
    """
    path = locate(path)
    for known in FORMATS:
        if known.looks_like(path):
            return known.open(path)
    listed = "".join(f"\n  {known.what}: {known.marks}" for known in FORMATS)
    raise CheckpointError(f"{path} is of no format that is known here. Looked for:{listed}")
