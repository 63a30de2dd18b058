"""Whether all ranks of a run have the same settings and the same code: a forgotten machine trains something else."""

from __future__ import annotations

import importlib.util
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from rae_scale.config import Config

PACKAGES = ("rae_scale", "rae_kernels")
SOURCES = (".py", ".cu", ".cuh", ".cpp", ".h")
MOST_NAMED = 5
"""How many settings, files or ranks a message names."""


def settings_of(config: Config) -> dict[str, str]:
    """Every setting by its dotted name, as JSON: {"run.max_steps": "30000", ...}."""
    flat: dict[str, str] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, entry in value.items():
                add(f"{name}.{key}" if name else key, entry)
        else:
            flat[name] = json.dumps(value, sort_keys=True)

    add("", config.model_dump(mode="json"))
    return flat


def code_files() -> dict[str, str]:
    """The source files of our packages, as this process would import them, with a hash of each."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent
        for path in sorted(root.rglob("*")):
            if path.suffix in SOURCES and path.is_file():
                name = f"{package}/{path.relative_to(root).as_posix()}"
                found[name] = xxhash.xxh3_64_hexdigest(path.read_bytes())
    return found


def hash_of(entries: Mapping[str, str]) -> str:
    """One for all entries, whatever their order."""
    return xxhash.xxh3_64_hexdigest(json.dumps(dict(sorted(entries.items()))))


def odd_ones(values: Sequence[str]) -> dict[str, list[int]]:
    """The places of each value that is not the common one: the most frequent, of equally frequent ones the first."""
    common = Counter(values).most_common(1)[0][0]
    odd: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        if value != common:
            odd.setdefault(value, []).append(place)
    return odd


def differences(own: Mapping[str, str], common: Mapping[str, str]) -> str:
    """What `own` has otherwise, in words."""
    names = sorted(name for name in own.keys() | common.keys() if own.get(name) != common.get(name))
    return named(f"{name}={own.get(name, 'absent')} (elsewhere {common.get(name, 'absent')})" for name in names)


def changed(own: Mapping[str, str], common: Mapping[str, str]) -> str:
    """Which files differ, in words."""
    return named(sorted(name for name in own.keys() | common.keys() if own.get(name) != common.get(name)))


def named(texts: Iterable[str]) -> str:
    every = list(texts)
    more = f" and {len(every) - MOST_NAMED} more" if len(every) > MOST_NAMED else ""
    return ", ".join(every[:MOST_NAMED]) + more


def check_same(config: Config) -> None:
    """Refuse to train where a rank has other settings or other code. Collective, before groups are made of `config`.

    Raises:
        ValueError: on all ranks, with the rank that differs, its machine, and what differs.
    """
    if not dist.is_initialized():
        return
    settings, files = settings_of(config), code_files()
    hosts, configs, codes = zip(*gather((socket.gethostname(), hash_of(settings), hash_of(files))), strict=True)
    if not odd_ones(configs) and not odd_ones(codes):
        return
    # Only now: every file of a thousand ranks is a lot to send.
    all_settings, all_files = zip(*gather((settings, files)), strict=True)
    problems = [
        *describe(hosts, configs, all_settings, "settings", differences, "start all with the same file and KEY=VALUE"),
        *describe(hosts, codes, all_files, "code", changed, "install the same rae-scale on every machine"),
    ]
    raise ValueError("\n".join(problems))


def gather(value: Any) -> list[Any]:
    """Every rank's, in rank order."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def describe(
    hosts: Sequence[str],
    hashes: Sequence[str],
    details: Sequence[Mapping[str, str]],
    what: str,
    compare: Callable[[Mapping[str, str], Mapping[str, str]], str],
    fix: str,
) -> Iterator[str]:
    """A message for each odd one of `hashes`; all by rank."""
    odd = odd_ones(hashes)
    common = next(rank for rank, value in enumerate(hashes) if value not in odd)
    for ranks in odd.values():
        where = named(f"{rank} ({hosts[rank]})" for rank in ranks)
        found = compare(details[ranks[0]], details[common])
        yield f"rank {where} has other {what} than rank {common} ({hosts[common]}): {found}; {fix}"
