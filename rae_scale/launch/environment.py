"""Which variables of this shell go to the machines of a run, and which stay.

Commands that start here inherit everything. Elsewhere a process has what that machine's login gives it, and what is
named here: settings of the libraries, paths, and our own. Secrets stay unless they are asked for by name, since what
is passed stands in command lines, batch scripts and manifests that others can read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PREFIXES = (
    "CUBLAS_",
    "CUDA_",
    "DS_",
    "FI_",  # libfabric: EFA and Slingshot
    "GLOO_",
    "HF_",
    "KMP_",
    "LC_",
    "MKL_",
    "NCCL_",
    "NVSHMEM_",
    "OMP_",
    "PYTHON",
    "PYTORCH_",
    "RAE_",
    "RDMAV_",
    "TOKENIZERS_",
    "TORCH",
    "TRANSFORMERS_",
    "TRITON_",
    "UCX_",
)
NAMES = frozenset({"LANG", "LD_LIBRARY_PATH", "LD_PRELOAD", "PATH", "TZ", "VIRTUAL_ENV", "XDG_CACHE_HOME"})
# What is true of this machine or of this process only.
OWN = frozenset(
    {
        "CUDA_VISIBLE_DEVICES",
        "DS_ENV_FILE",
        "LOCAL_RANK",
        "NCCL_SOCKET_FD",
        "RAE_LAUNCH",
        "RAE_PYTHON",
        "TORCHELASTIC_RUN_ID",
    }
)
SECRET_WORDS = frozenset(
    {"AUTH", "COOKIE", "CREDENTIAL", "CREDENTIALS", "KEY", "PASS", "PASSWD", "PASSWORD", "PAT", "SECRET", "TOKEN"}
)
USER_AND_PASSWORD = re.compile(r"://[^/\s:@]+:[^/\s@]+@")
VALID_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Passed:
    """variables: name and value of what other machines are given. held_back: what looks like a secret and is not."""

    variables: dict[str, str]
    held_back: tuple[str, ...]


def explicit(settings: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """What `--env` says: NAME=VALUE, or NAME for this shell's value.

    Raises:
        ValueError: no such form, or NAME alone is not set here.
    """
    variables = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not VALID_NAME.fullmatch(name):
            raise ValueError(f"--env {setting!r}: write NAME=VALUE, or NAME to pass this shell's value")
        if not equals:
            if name not in environ:
                raise ValueError(f"--env {name}: it is not set in this shell; write --env {name}=VALUE")
            value = environ[name]
        if "\n" in value or "\0" in value:
            raise ValueError(f"--env {name}: a value of several lines cannot be passed; put it into a file")
        variables[name] = value
    return variables


def to_other_machines(environ: Mapping[str, str], asked: Mapping[str, str], containers: bool = False) -> Passed:
    """What of `environ` processes on other machines get besides `asked`, which wins.

    containers: they run in an image with a file system of its own, where this machine's paths mean nothing.
    """
    variables, held_back = {}, []
    for name, value in sorted(environ.items()):
        if name in asked:
            continue
        if is_secret(name, value):
            held_back.append(name)
        elif name not in OWN and is_wanted(name, value, containers) and "\n" not in value:
            variables[name] = value
    return Passed(dict(sorted((variables | dict(asked)).items())), tuple(held_back))


def is_wanted(name: str, value: str, containers: bool) -> bool:
    if containers and (name in NAMES - {"LANG", "TZ"} or name.startswith("PYTHON") or value.startswith(("/", "~"))):
        return False
    return name in NAMES or name.startswith(PREFIXES)


def is_secret(name: str, value: str) -> bool:
    """By the words of its name, or because it is an address with a password in it."""
    words = set(re.split(r"[_\d]+", name.upper()))
    joined = any(name.upper().endswith(word) for word in ("APIKEY", "ACCESSKEY", "SECRETKEY", "PASSWORD", "TOKEN"))
    return bool(words & SECRET_WORDS) or joined or USER_AND_PASSWORD.search(value) is not None
