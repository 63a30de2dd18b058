"""Folders of the run, as this machine sees them: can they be written, read, and where do they lie?"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rae_scale.config import Config
from rae_scale.config.paths import resolve_path
from rae_scale.config.schema import DataConfig
from rae_scale.data.cache.folder import CacheFolder
from rae_scale.data.mds_reader import MDSReader
from rae_scale.data.read_options import ReadOptions
from rae_scale.data.remote import is_remote
from rae_scale.state import latest_checkpoint
from rae_scale.state.format import CHECKPOINTS, step_folders
from rae_scale.state.space import existing_folder

MOUNTS = Path("/proc/self/mounts")
NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs\d?|lustre|gpfs|beegfs\w*|ceph|cifs|smb\d?|glusterfs|9p|wekafs|pvfs2|panfs|fuse\.(?!overlayfs|fuse-overlayfs).*"
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PROBE_BYTES = 1 << 20
PROBE_FETCH_S = 10.0
MARK = ".preflight-"


@dataclass(frozen=True)
class RunDir:
    """problem: why it cannot be used, empty if it can. free, total: bytes. checkpoints: how many it holds. newest: of
    them, the one that training goes on from; empty if there is none."""

    path: str
    file_system: str = ""
    problem: str = ""
    free: int = 0
    total: int = 0
    checkpoints: int = 0
    newest: str = ""


@dataclass(frozen=True)
class Input:
    """What a setting names to be read. content: what is there, in words. problem: why it cannot be read."""

    setting: str
    path: str
    content: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Cache:
    """A folder for what is compiled or kept on this machine. without, over_network: what it means if the folder cannot
    be used, or is not on a disk of this machine."""

    what: str
    path: str
    file_system: str
    problem: str = ""
    without: str = "kernels cannot be compiled"
    over_network: str = "every rank compiles its kernels there, and loads them over the network"
    fix: str = "set TRITON_CACHE_DIR (or TMPDIR) to a local folder"


OF_SHARDS = {
    "without": "shards cannot be kept, so the run ends at the first one or when the disk is full",
    "over_network": "shards are sent over the network twice, and written to storage that others use",
    "fix": "set data.cache_dir to a folder on a disk of this machine, and data.cache_gb to what it has room for",
}


def probe_run_dir(path: Path) -> RunDir:
    """Do with `path` what saving a checkpoint does: write, synchronise, rename, read. Makes the folder."""
    problem = ""
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_and_rename(path)
    except OSError as error:
        problem = f"{error.strerror or error} ({error.filename or path})"
    existing = existing_folder(path)
    usage = shutil.disk_usage(existing)
    newest = latest_checkpoint(path) if not problem else None
    return RunDir(
        str(path),
        file_system(existing),
        problem,
        usage.free,
        usage.total,
        len(step_folders(path / CHECKPOINTS)),
        "" if newest is None else newest.name,
    )


def write_and_rename(folder: Path) -> None:
    """
    Raises:
        OSError: the file system does not do it.
    """
    written = folder / f"{MARK}{socket.gethostname()}-{os.getpid()}"
    renamed = written.with_name(f"{written.name}-renamed")
    content = os.urandom(PROBE_BYTES)
    try:
        with written.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        written.replace(renamed)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if renamed.read_bytes() != content:
            raise OSError(0, "what was written is read back otherwise", str(renamed))
    finally:
        written.unlink(missing_ok=True)
        renamed.unlink(missing_ok=True)


def probe_inputs(config: Config) -> Iterator[Input]:
    for number, source in enumerate(config.data.sources):
        yield probe_source(f"data.sources[{number}].path", source.path, ReadOptions.of(config.data))
    model = config.model
    settings = {
        "model.llm.path": model.llm.path,
        "model.llm.tokenizer": model.llm.tokenizer,
        "model.encoder.path": model.encoder.path,
        "model.decoder.path": model.decoder.path,
        "run.init_from": config.run.init_from,
    }
    for setting, path in settings.items():
        if path is not None:
            yield probe_weights(setting, path)


def probe_source(setting: str, path: str, options: ReadOptions) -> Input:
    """The index says what there should be; a shard says that it can be read. Of a remote one only the beginning is."""
    try:
        # To hash it would be to read it all, and a probe has less time than a run.
        seconds = min(options.fetch_timeout_s, PROBE_FETCH_S)
        probing = replace(options, check_hashes=False, fetch_timeout_s=seconds, fetch_attempts=2)
        reader = MDSReader(resolve_path(path), probing)
        if len(reader) and reader.fetches:
            reader.probe(len(reader.sizes) - 1)
        elif len(reader):
            reader[len(reader) - 1]
        reader.close()
    except (OSError, ValueError) as error:
        return Input(setting, path, problem=str(error))
    return Input(setting, path, f"{len(reader):,} samples", "" if len(reader) else "it holds no samples")


def probe_weights(setting: str, path: str) -> Input:
    """A folder or file of which every file can be read, or a hub id that is in this machine's cache."""
    try:
        root = Path(resolve_path(path))
        if not root.exists():
            return probe_hub(setting, path)
        files = [root] if root.is_file() else [file for file in root.rglob("*") if file.is_file()]
        for file in files:
            with file.open("rb") as opened:
                opened.read(1)
    except (OSError, ValueError) as error:
        return Input(setting, path, problem=str(error))
    size = sum(file.stat().st_size for file in files)
    return Input(setting, path, f"{len(files)} files, {size / 1e9:.2f} GB", "" if files else "the folder is empty")


def probe_hub(setting: str, path: str) -> Input:
    if not HUB_ID.fullmatch(path):
        return Input(setting, path, problem="there is no such file or folder on this machine")
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(path, "config.json"), str):
        return Input(setting, path, "a hub id, in this machine's cache")
    problem = "neither a folder on this machine nor a hub id in its cache, so each rank would download it"
    return Input(setting, path, problem=problem)


def probe_caches(config: Config) -> Iterator[Cache]:
    triton = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    for what, path in (("Triton's cache", triton), ("temporary files", tempfile.gettempdir())):
        existing = existing_folder(Path(path))
        problem = "" if os.access(existing, os.W_OK | os.X_OK) else "it cannot be written"
        yield Cache(what, path, file_system(existing), problem)
    with suppress(ValueError):  # by a scheme that is not read: the check `data` says so
        if any(is_remote(source.path) for source in config.data.sources):
            yield probe_shard_cache(config.data)


def probe_shard_cache(data: DataConfig) -> Cache:
    """For remote sources: can it be written, and is there room for what it may grow to?"""
    options = ReadOptions.of(data)
    try:
        cache = CacheFolder(options.cache_dir, options.cache_gb)
    except ValueError as error:
        return Cache("shards of remote sources", tempfile.gettempdir(), "", str(error), **OF_SHARDS)
    existing = existing_folder(cache.root)
    room = shutil.disk_usage(existing).free + cache.used()
    problem = "" if os.access(existing, os.W_OK | os.X_OK) else "it cannot be written"
    if not problem and room < cache.limit:
        problem = f"data.cache_gb={data.cache_gb:g}, but its disk has room for {room / 1e9:.0f} GB"
    return Cache(
        "shards of remote sources",
        str(cache.root),
        file_system(existing),
        problem,
        **OF_SHARDS,
    )


def file_system(path: Path) -> str:
    """The kind that `path` lies on, such as ext4; empty where the kernel does not tell."""
    try:
        mounts = [line.split()[1:3] for line in MOUNTS.read_text().splitlines()]
    except OSError:
        return ""
    real = path.resolve()
    holding = [(point, kind) for point, kind in mounts if real.is_relative_to(point.replace("\\040", " "))]
    # Of equal points the later one covers the earlier.
    return max(enumerate(holding), key=lambda entry: (len(entry[1][0]), entry[0]))[1][1] if holding else ""


def is_on_network(kind: str) -> bool:
    return NETWORK_FILE_SYSTEMS.fullmatch(kind) is not None
