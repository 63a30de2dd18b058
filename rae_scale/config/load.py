"""Read a run file: its includes, then its own keys, then dotted overrides; then validate the result.

`include: [model/dit-2.4b, engine/zero3]` names files under the `configs/` folder that holds the run file's folder.
An included file may not include others: composition stays one level deep.
"""

from __future__ import annotations

import copy
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rae_scale.config.rules import check
from rae_scale.config.schema import Config


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the key, the value, the reason and the fix."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration of `path` with `key=value` overrides applied."""
    return parse_config(read_tree(Path(path)), overrides, origin=str(path))


def parse_config(tree: dict[str, Any], overrides: Sequence[str] = (), origin: str = "config") -> Config:
    """Validate a nested dict of settings, which stays as it is. `origin` names it in errors."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        key, value = split_override(override)
        set_dotted(tree, key, value)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, origin)) from None
    problems = check(config)
    if problems:
        raise ConfigError("\n".join(f"{origin}: {problem}" for problem in problems))
    return config


def read_tree(path: Path) -> dict[str, Any]:
    """Return the merged dict of a run file and the files that it includes."""
    tree = read_yaml(path)
    includes = tree.pop("include", [])
    if not isinstance(includes, list):
        raise ConfigError(f"{path}: include={includes!r} must be a list, for example [model/dit-2.4b, engine/zero3]")
    merged: dict[str, Any] = {}
    for name in includes:
        included_path = path.resolve().parent.parent / f"{name}.yaml"
        if not included_path.is_file():
            raise ConfigError(f"{path}: include {name!r} names {included_path}, which does not exist")
        included = read_yaml(included_path)
        if "include" in included:
            raise ConfigError(f"{included_path}: an included file cannot include others; list them in {path}")
        merge(merged, included)
    merge(merged, tree)
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config file is a mapping of sections, this is {type(tree).__name__}")
    return tree


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys and says nothing; here the second `run:` section of a file is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"found the key {key.value!r} twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def merge(base: dict[str, Any], other: dict[str, Any]) -> None:
    """Merge `other` into `base` in place: mappings merge key by key, anything else replaces."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def split_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r}: write it as key=value, for example run.max_steps=100")
    try:
        return key, parse_scalar(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from None


def parse_scalar(text: str) -> Any:
    """YAML, except that `1e-4` is a number (YAML 1.1 wants `1.0e-4`)."""
    try:
        return float(text) if "e" in text.lower() else yaml.safe_load(text)
    except ValueError:
        return yaml.safe_load(text)


def set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            what = "a list; give it whole, as in key=[...]" if isinstance(child, list) else "a value, not a section"
            raise ConfigError(f"override {key}: {'.'.join(parents[: depth + 1])} is {what}")
        tree = child
    tree[leaf] = value


def explain(error: ValidationError, origin: str) -> str:
    """One line per problem: file, key, value, reason, and for a mistyped key the nearest valid one."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{origin}: unknown key {key!r}{nearest_key(item['loc'])}")
        elif item["type"] == "missing":
            lines.append(f"{origin}: {key} is missing and has no default; set it")
        else:
            lines.append(f"{origin}: {key}={item['input']!r}: {item['msg']}")
    return "\n".join(lines)


def nearest_key(location: tuple[int | str, ...]) -> str:
    known = known_keys(location[:-1])
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    if close:
        return f": did you mean {close[0]!r}?"
    return f": known keys here are {', '.join(known)}" if known else ""


def known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at `location`; an index or a name steps into the section that a list or dict holds."""
    annotation: Any = Config
    for part in location:
        if is_section(annotation):
            annotation = annotation.model_fields[str(part)].annotation
        else:
            annotation = next(arg for arg in typing.get_args(annotation) if is_section(arg))
    return list(annotation.model_fields)


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
