"""Python packages of an image: what its base brings stays as it is, the rest is installed beside it.

The Dockerfile copies this file beside requirements.txt and runs its commands in this order, with pip between them:

    pins NAME ...          print the pinned requirements of these packages
    keep                   write constraints.txt, wanted.txt and bare.txt, and modules.json for the check
    check                  stop the build where something of the base has been replaced
    extra NAME             print the requirements of an extra of pyproject.toml
    build NAME VERSION     a GPU kernel package: kept from the base, compiled, or left out

A vendor's torch was built for its image's CUDA, cuDNN and NCCL; another one from an index runs, but slower, or stops on
the first collective. pip replaces it without a word when any package asks for another version.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

# Modules that a GPU image may bring in builds of its own. The names of their distributions differ (triton is also
# pytorch-triton), so they are found by the module.
KEPT_MODULES = ("torch", "torchvision", "triton", "flash_attn", "apex", "megatron", "transformer_engine")

# Packages of ours that ask for `triton` by this name. Where a vendor's has another one, pip would install a second
# triton into the same folder; they are installed without what they ask for, all of which is there.
ASK_FOR_TRITON = ("liger-kernel",)


class Kernel(NamedTuple):
    """A package that is compiled against the image's torch."""

    module: str
    requirement: str  # with {} for the version
    needs_nvcc: bool
    environment: dict[str, str]  # of its build, beside MAX_JOBS and TORCH_CUDA_ARCH_LIST
    before: tuple[str, ...] = ()  # what it needs at run time: its own list would bring a torch


KERNELS = {
    # Prebuilt wheels of another torch or C++ ABI load and then crash: always compiled.
    "flash-attn": Kernel("flash_attn", "flash-attn=={}", True, {"FLASH_ATTENTION_FORCE_BUILD": "TRUE"}, ("einops",)),
    "megatron-core": Kernel("megatron.core", "megatron-core=={}", False, {}),
    # Not on PyPI: the apex there is an unrelated project. The version is a commit, which lets pip keep its wheel.
    "apex": Kernel(
        "apex",
        "apex @ git+https://github.com/NVIDIA/apex@{}",
        True,
        {"APEX_CPP_EXT": "1", "APEX_CUDA_EXT": "1"},
    ),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("pins").add_argument("names", nargs="+")
    commands.add_parser("keep")
    build = commands.add_parser("build")
    build.add_argument("name", choices=KERNELS)
    build.add_argument("version")
    commands.add_parser("extra").add_argument("name")
    check = commands.add_parser("check")
    check.add_argument("--version", default="", help="the version that the image's label will name")
    given = parser.parse_args(arguments)

    folder = Path(__file__).resolve().parent
    if given.command == "pins":
        pins = {name_of(pin): pin for pin in read_pins(folder)}
        print("\n".join(pins[name] for name in given.names))
    elif given.command == "keep":
        keep(folder)
    elif given.command == "build":
        build_kernel(given.name, given.version, folder)
    elif given.command == "extra":
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        print("\n".join(project["optional-dependencies"][given.name]))
    else:
        check_image(folder, given.version)


def read_pins(folder: Path) -> list[str]:
    lines = (folder / "requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def name_of(requirement: str) -> str:
    return re.split(r"[=<>\[ @!~;]", requirement)[0].lower()


def brought_modules() -> dict[str, dict[str, str]]:
    """Of each module of KEPT_MODULES that is installed: its distribution and version."""
    providers = metadata.packages_distributions()
    found = {}
    for module in KEPT_MODULES:
        if module in providers:
            name = providers[module][0]
            found[module] = {"distribution": name.lower(), "version": metadata.version(name)}
        elif is_importable(module):
            sys.exit(f"the base has {module} without package metadata, so that pip would install over it")
    return found


def keep(folder: Path) -> None:
    """Divide the pins: constraints.txt holds what stays, wanted.txt what pip installs with its needs, bare.txt without.

    Kept packages lose our pin of them: the code runs on any version in pyproject.toml's ranges.
    """
    brought = brought_modules()
    kept = {entry["distribution"]: entry["version"] for entry in brought.values()}
    pins = {name_of(pin): pin for pin in read_pins(folder) if name_of(pin) not in {*kept, *brought}}
    bare = []
    if "torch" in brought and "triton" not in kept and not is_pinned_torch(kept["torch"], folder):
        # Our triton belongs to our torch. This base has its own under another name, or does without.
        pins.pop("triton", None)
        bare = [pins.pop(name) for name in ASK_FOR_TRITON if name in pins]
    write_lines(folder / "constraints.txt", [f"{name}=={version}" for name, version in kept.items()])
    write_lines(folder / "wanted.txt", list(pins.values()))
    write_lines(folder / "bare.txt", bare)
    (folder / "modules.json").write_text(json.dumps(brought, indent=2) + "\n")
    print("kept from the base:", ", ".join(f"{name} {version}" for name, version in kept.items()) or "nothing")


def is_pinned_torch(version: str, folder: Path) -> bool:
    """Whether it is the release that our pins were tested with, be it built for a CPU (2.15.0+cpu)."""
    return f"torch=={version.partition('+')[0]}" in read_pins(folder)


def write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines))


def build_kernel(name: str, version: str, folder: Path) -> None:
    """Keep, compile or leave out one package, and say which."""
    kernel = KERNELS[name]
    argument = name.upper().replace("-", "_")
    if is_importable(kernel.module):
        print(f"{name}: kept from the base ({version_of(name)}); {argument}={version!r} is not used")
        return
    if not version:
        print(f"{name}: not in the base and left out, since {argument} is empty")
        return
    if kernel.needs_nvcc and nvcc() is None:
        sys.exit(
            f"{name} {version} is compiled, and this base has no nvcc: choose a -devel base, or leave it out with "
            f"--build-arg {argument}="
        )
    pip = [sys.executable, "-m", "pip", "install", "--constraint", str(folder / "constraints.txt")]
    subprocess.run([*pip, "ninja", "packaging", "setuptools", "wheel", *kernel.before], check=True)
    # No isolation: an isolated build would compile against a torch of its own. No needs: they are there, or `before`.
    command = [*pip, "--no-build-isolation", "--no-deps", kernel.requirement.format(version)]
    try:
        subprocess.run(command, env=os.environ | build_environment(kernel), check=True)
    except subprocess.CalledProcessError:
        sys.exit(
            f"{name} {version} does not build against torch {version_of('torch')}, see above: choose another version, "
            f"or leave it out with --build-arg {argument}="
        )
    importlib.invalidate_caches()
    subprocess.run([sys.executable, "-c", f"import {kernel.module}"], check=True)
    print(f"{name}: {version_of(name)} was built")
    check_image(folder, "")


def build_environment(kernel: Kernel) -> dict[str, str]:
    """GPUs to compile for in torch's form "8.0;9.0" (apex) and in flash-attn's "80;90"."""
    archs, jobs = os.environ["CUDA_ARCHS"], os.environ["MAX_JOBS"]
    return {
        "TORCH_CUDA_ARCH_LIST": archs,
        "FLASH_ATTN_CUDA_ARCHS": archs.replace(".", ""),
        "MAX_JOBS": jobs,
        "APEX_PARALLEL_BUILD": jobs,
        **kernel.environment,
    }


def is_importable(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "version unknown"


def nvcc() -> str | None:
    return shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin:{os.environ['PATH']}")


def check_image(folder: Path, version: str) -> None:
    """Stop the build here, where it costs minutes, and not by a wrong result on the cluster."""
    recorded: dict[str, dict[str, str]] = json.loads((folder / "modules.json").read_text())
    present = brought_modules()
    for module, entry in recorded.items():
        if present.get(module) != entry:
            sys.exit(f"{module} of the base image, {entry}, has been replaced by {present.get(module)}")
    if not python_header().is_file():
        sys.exit(
            f"{python_header()} is missing: DeepSpeed and triton compile against it in the first step; choose a base "
            "with Python's headers"
        )
    if version and version != own_version():
        sys.exit(f"VERSION={version} would be the image's label, and the code is version {own_version()}")
    print("in the image:", ", ".join(f"{name} {value}" for name, value in stock().items()))


def python_header() -> Path:
    return Path(sysconfig.get_path("include")) / "Python.h"


def own_version() -> str:
    return metadata.version("rae-scale")


def stock() -> dict[str, Any]:
    """For whoever reads the build's log. Both are imported, since torchvision must fit torch."""
    import torch
    import torchvision

    names = ("triton", "deepspeed", "transformers", *KERNELS)
    found = {name: metadata.version(name) for name in names if version_of(name) != "version unknown"}
    missing = {name: "none" for name in names if name not in found}
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "torchvision": torchvision.__version__,
        **found,
        **missing,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
