"""What a run was made from: its resolved settings and the code that ran, saved beside its results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from rae_scale import __version__
from rae_scale.config import Config, dump_config

PACKAGES = ("torch", "transformers", "deepspeed", "triton", "numpy", "safetensors")


def save_provenance(folder: Path, config: Config) -> None:
    """Write `config.yaml` (which `rae-scale train` reads back) and `version.json` to the run's folder."""
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "version.json").write_text(json.dumps(code_version(), indent=2) + "\n", encoding="utf-8")


def code_version() -> dict[str, str | bool | None]:
    """Versions of this package, of what it computes with, and of the git tree that it runs or was built from."""
    versions: dict[str, str | bool | None] = {"rae_scale": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    # An image has no git tree; the Dockerfile leaves the commit that it was built from in the environment.
    commit = git("rev-parse", "HEAD") or os.environ.get("RAE_COMMIT") or None
    versions["git_commit"] = commit
    changed = git("status", "--porcelain", "--untracked-files=no")
    versions["git_modified"] = None if changed is None else bool(changed)
    return versions


def git(*arguments: str) -> str | None:
    """Output of git in the source tree; None for an installed package or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
