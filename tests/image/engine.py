"""Images without Docker: buildah runs every step in a chroot, on a Debian that debootstrap has made."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlparse

# The stand-in for python:3.12-slim: Debian's Python, with pip and headers as that image has them.
PACKAGES = "python3,python3-pip,python3-dev,ca-certificates"
RELEASE = "bookworm"
MIRROR = "http://deb.debian.org/debian"


def why_not() -> str | None:
    """What this machine lacks, None if nothing."""
    if os.geteuid() != 0:
        return "a chroot needs root"
    missing = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
    return f"no {' and '.join(missing)}: apt-get install {' '.join(missing)}" if missing else None


class Engine:
    """buildah with a store of its own in `folder`, which holds all that it leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = ["--root", str(folder / "store"), "--runroot", str(folder / "run")]
        self.volumes = pip_volumes(folder)
        # buildah keeps the cache mounts of RUN below TMPDIR.
        self.environment = os.environ | {"TMPDIR": str(folder)}

    def call(self, *arguments: str) -> str:
        """Run a buildah command; its output, which also goes to the terminal as it comes."""
        return stream(["buildah", *self.store, *arguments], self.environment)

    def make_debian(self, name: str) -> None:
        """An image that holds Debian with Python and nothing of ours."""
        root = self.folder / "debian"
        stream(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, str(root), MIRROR])
        container = self.call("from", "scratch").split()[-1]
        self.call("add", "--quiet", container, str(root), "/")
        self.call("commit", "--quiet", "--rm", container, name)
        shutil.rmtree(root)

    def extend(self, base: str, name: str, *commands: str) -> None:
        """An image `name`: `base` after these shell commands."""
        container = self.start(base)
        for command in commands:
            self.run(container, "sh", "-euc", command)
        self.call("commit", "--quiet", "--rm", container, name)

    def build(self, name: str, context: Path, arguments: Mapping[str, str]) -> str:
        """Build the Dockerfile in `context`; what the build has printed."""
        given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        # The docker format keeps SHELL and HEALTHCHECK, and layers keep the steps that two builds share.
        how = ["--isolation=chroot", "--network=host", "--format=docker", "--layers", "--pull-never"]
        return self.call("build", *how, *self.volumes, *given, f"--tag={name}", str(context))

    def start(self, image: str) -> str:
        return self.call("from", "--pull-never", image).split()[-1]

    def run(self, container: str, *command: str) -> str:
        """Run a command as the image's user, in its folder and with its environment."""
        return self.call("run", "--isolation=chroot", "--network=host", *self.volumes, container, "--", *command)

    def remove(self, container: str, image: str) -> None:
        """And all layers that no other image has."""
        self.call("rm", container)
        self.call("rmi", "--force", image)
        self.call("rmi", "--prune")

    def close(self) -> None:
        """Remove everything, also after a step that was interrupted."""
        for place in reversed(mounted_below(self.folder)):
            subprocess.run(["umount", "--lazy", place], check=False)
        shutil.rmtree(self.folder)


def mounted_below(folder: Path) -> list[str]:
    """Where something is mounted in `folder`, in the order in which it was."""
    places = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [place for place in places if place.startswith(f"{folder}/")]


def stream(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run it, let its output through, return it; an AssertionError with its end if it fails."""
    print(f"\n$ {shlex.join(command)}", flush=True)
    started, lines = time.monotonic(), []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)
    assert process.returncode == 0, f"{shlex.join(command)} failed:\n{''.join(lines[-30:])}"
    return "".join(lines)


def pip_volumes(folder: Path) -> list[str]:
    """Mounts that give pip in the image this machine's settings: its indexes, local ones included, and certificates."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    wanted = ("index-url", "extra-index-url", "find-links", "cert", "trusted-host", "proxy")
    settings = {}
    for line in listed.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if name in wanted and section in ("global", ":env:"):
            settings[name] = value.strip("'")
    path = folder / "pip.conf"
    path.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    mounts = {str(path): "/etc/pip.conf"}
    for place in " ".join(settings.values()).split():
        # The pages of a local index point to files beside it.
        local = os.path.dirname(urlparse(place).path.rstrip("/")) if place.startswith("file:") else place
        if local.startswith("/") and os.path.exists(local):
            mounts[local] = local
    return [f"--volume={source}:{target}:ro" for source, target in mounts.items()]
