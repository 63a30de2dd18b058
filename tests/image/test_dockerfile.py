"""The Dockerfile as text: a linter, what may enter the image, and how its parts are called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.image.conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
# Of the tracked files, what no image needs.
OUTSIDE = {".ci", ".gitignore", ".pre-commit-config.yaml", ".github"}


def tool(name: str) -> str:
    """A program of the dev extra, beside this Python or on the PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: pip install {name}-bin")
    return found


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    command = [tool("hadolint"), "--no-color", "--config", str(ROOT / ".hadolint.yaml"), str(path)]
    # It stops at the first letter beyond ASCII where the locale is C, as in a bare container.
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_linter_has_nothing_to_say() -> None:
    done = lint(ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_would_say_it(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(DOCKERFILE.replace("USER $USER_ID", "USER root").replace("--no-install-recommends ", ""))
    done = lint(path)
    assert done.returncode == 1, done.stderr
    assert "DL3002" in done.stdout and "DL3015" in done.stdout


def test_every_part_of_the_project_enters_the_image_and_nothing_else() -> None:
    """The ignore file names what enters, so that a new folder has to be decided on here."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git tree to compare with: an image or an archive")
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*", "all is outside but what is named"
    inside = {line[1:] for line in lines if line.startswith("!")}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {path.split("/")[0] for path in listed.splitlines()}
    assert tracked - inside - OUTSIDE == set(), "neither in the image nor decided to be outside of it"
    assert all((ROOT / name).exists() for name in inside), "named, and not there"


def test_every_argument_is_described() -> None:
    text = (ROOT / "docs/images.md").read_text()
    for name in set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)):
        assert f"`{name}`" in text, f"docs/images.md does not say what {name} is"


def test_the_image_is_labelled_and_runs_as_no_root() -> None:
    final = DOCKERFILE[DOCKERFILE.index(" AS final") :]
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in final
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE) == ["$USER_ID"]
    assert "\nHEALTHCHECK " in final


def test_scripts_of_the_image_are_valid_shell() -> None:
    for path in (ROOT / "docker/sshd.sh", ROOT / "launchers/docker-entry.sh"):
        subprocess.run(["bash", "-n", path], check=True)
        assert path.stat().st_mode & 0o111, f"{path} is not executable"


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        (["train", "x.yaml"], "rae-scale: train x.yaml"),
        ([], "rae-scale: "),
        (["eval", "shapes"], "rae-scale: eval shapes"),  # a word of the shell too
        (["echo", "a b"], "a b"),
    ],
)
def test_the_entry_point_runs_programs_and_hands_the_rest_to_rae_scale(
    arguments: list[str], ran: str, tmp_path: Path
) -> None:
    fake = tmp_path / "rae-scale"
    fake.write_text('#!/bin/sh\necho "rae-scale: $*"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = [str(ROOT / "launchers/docker-entry.sh"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ran.strip()
