"""The folder that is shared: `RaeScale.from_pretrained` reads it, `rae-scale convert --to hf` writes it.

    config.json                        what it is, its settings, and the hashes of its weights
    model-00001-of-00002.safetensors   the weights, under our names
    model.safetensors.index.json       tensor -> file
    tokenizer/  decoder/  encoder/     what the model needs to draw, where it is not on the hub
    manifest.json                      file -> xxh3-128, all but README.md, which is there to be edited
    README.md                          model card

Nothing in it is a pickle, and no setting in it names a place on the machine that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from rae_scale.config import Config, ConfigError, parse_config
from rae_scale.config.paths import ASSET_PREFIX
from rae_scale.state.format import read_json

MODEL_TYPE = "rae_scale"
FORMAT_VERSION = 1
CONFIG_JSON = "config.json"
CARD = "README.md"
TOKENIZER, DECODER, ENCODER = "tokenizer", "decoder", "encoder"

# A setting with this value means the folder inside.
INSIDE = {
    ("llm", "tokenizer"): f"./{TOKENIZER}",
    ("decoder", "path"): f"./{DECODER}",
    ("encoder", "path"): f"./{ENCODER}",
}


def is_published(folder: Path) -> bool:
    """Whether `folder` is one of these, of whatever version."""
    return model_type(folder) == MODEL_TYPE


def model_type(folder: Path) -> str | None:
    """What the folder's config.json says it is, if it has one."""
    path = folder / CONFIG_JSON
    found = read_json(path).get("model_type") if path.is_file() else None
    return None if found is None else str(found)


def published_config(folder: Path) -> Config:
    """The settings of the model in `folder`, with the folders inside it in full.

    Raises:
        ConfigError: a newer release wrote it, or a setting is unknown.
    """
    origin = folder / CONFIG_JSON
    content = read_json(origin)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{origin}: format_version={version!r}, this release reads {FORMAT_VERSION}; use the release of rae-scale "
            "that wrote it"
        )
    config = parse_config(content["config"], origin=str(origin))
    for (section, key), inside in INSIDE.items():
        if getattr(getattr(config.model, section), key) == inside:
            config = with_model_path(config, section, key, str((folder / inside).resolve()))
    return config


def with_model_path(config: Config, section: str, key: str, value: str | None) -> Config:
    """`config` with `model.<section>.<key>` set to `value`."""
    part = getattr(config.model, section).model_copy(update={key: value})
    return config.model_copy(update={"model": config.model.model_copy(update={section: part})})


def shareable(config: Config, inside: Mapping[str, bool]) -> Config:
    """`config` without this machine's folders: of each, its last name is left, and `./...` where it is in the folder.

    inside: for tokenizer, decoder, encoder, whether the folder holds it. Hub ids and `asset:` names stay.
    """
    for (section, key), value in INSIDE.items():
        if inside[value.removeprefix("./")]:
            config = with_model_path(config, section, key, value)
        else:
            config = with_model_path(config, section, key, last_name(getattr(getattr(config.model, section), key)))
    config = with_model_path(config, "llm", "path", last_name(config.model.llm.path))
    sources = tuple(source.model_copy(update={"path": last_name(source.path)}) for source in config.data.sources)
    run = config.run.model_copy(update={"dir": last_name(config.run.dir), "init_from": last_name(config.run.init_from)})
    latents = config.data.latent_cache
    data = {
        "sources": sources,
        "cache_dir": last_name(config.data.cache_dir),
        "latent_cache": latents and latents.model_copy(update={"dir": last_name(latents.dir)}),
    }
    return config.model_copy(update={"run": run, "data": config.data.model_copy(update=data)})


def last_name(path: str | None) -> str | None:
    """A hub id or asset as it is; of a path, its last part."""
    if path is None or path.startswith(ASSET_PREFIX) or is_hub_id(path):
        return path
    return PurePath(path).name


def is_hub_id(name: str) -> bool:
    """Whether `name` can only mean a repository on the hub: owner/name, and no such folder here."""
    owner, slash, repository = name.partition("/")
    return bool(slash and owner.strip(".~") and repository) and "/" not in repository and not Path(name).exists()


def manifest_files(folder: Path) -> Iterator[str]:
    """The files whose hashes the manifest keeps, by their path below `folder`."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != CARD:
            yield name


def weights_facts(folder: Path) -> dict[str, Any]:
    """What config.json says of the weights: kind ("ema" or "weight"), dtype, step, and files with their hashes."""
    return dict(read_json(folder / CONFIG_JSON)["weights"])
