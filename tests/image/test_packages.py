"""What the base image brings stays as it is, and nothing of it is left out or built without a word."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

PINS = "# comment\ntorch==2.15.0\ntorchvision==0.29.2\ntriton==3.9.0\nliger-kernel==0.8.5\nnumpy==2.1.3\n"
Bring = Callable[..., None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "requirements.txt").write_text(PINS)
    return tmp_path


@pytest.fixture
def bring(monkeypatch: pytest.MonkeyPatch, packages: ModuleType) -> Bring:
    """Make the base bring modules: module="distribution==version"."""

    def set_modules(**modules: str) -> None:
        versions = dict(entry.split("==") for entry in modules.values())
        providers = {module: [entry.split("==")[0]] for module, entry in modules.items()}
        monkeypatch.setattr(metadata, "packages_distributions", lambda: providers)
        monkeypatch.setattr(metadata, "version", versions.__getitem__)
        monkeypatch.setattr(packages, "is_importable", modules.__contains__)

    return set_modules


def lists(folder: Path) -> dict[str, list[str]]:
    return {name: (folder / f"{name}.txt").read_text().split() for name in ("constraints", "wanted", "bare")}


def test_a_bare_base_gets_every_pin(folder: Path, bring: Bring, packages: ModuleType) -> None:
    bring()
    packages.keep(folder)
    assert lists(folder) == {"constraints": [], "wanted": PINS.split("\n", 1)[1].split(), "bare": []}


def test_a_vendors_torch_and_all_that_was_built_with_it_stay(
    folder: Path, bring: Bring, packages: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    vendors = {"torch": "torch==2.11.0a0+nv1", "torchvision": "torchvision==0.26.0a0", "triton": "triton==3.6.0+nv"}
    bring(**vendors, apex="apex==0.1", flash_attn="flash_attn==2.7.4")
    packages.keep(folder)
    assert lists(folder) == {
        "constraints": [*vendors.values(), "flash_attn==2.7.4", "apex==0.1"],
        "wanted": ["liger-kernel==0.8.5", "numpy==2.1.3"],
        "bare": [],
    }
    assert "torch 2.11.0a0+nv1" in capsys.readouterr().out


def test_no_second_triton_is_installed_over_one_of_another_name(
    folder: Path, bring: Bring, packages: ModuleType
) -> None:
    bring(torch="torch==2.11.0a0+nv1", torchvision="torchvision==0.26.0", triton="pytorch-triton==3.6.0")
    packages.keep(folder)
    assert lists(folder)["wanted"] == ["numpy==2.1.3"]
    assert lists(folder)["bare"] == ["liger-kernel==0.8.5"]


def test_our_triton_goes_with_our_torch_alone(folder: Path, bring: Bring, packages: ModuleType) -> None:
    """Of the CPU image: torch was just installed at the pinned release, from an index whose torch needs no triton."""
    bring(torch="torch==2.15.0+cpu", torchvision="torchvision==0.29.2+cpu")
    packages.keep(folder)
    assert lists(folder)["wanted"] == ["triton==3.9.0", "liger-kernel==0.8.5", "numpy==2.1.3"]
    bring(torch="torch==2.13.0+cpu", torchvision="torchvision==0.28.0+cpu")
    packages.keep(folder)
    assert lists(folder)["wanted"] == ["numpy==2.1.3"]


def test_a_torch_that_pip_cannot_see_is_refused(
    folder: Path, bring: Bring, packages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring()
    monkeypatch.setattr(packages, "is_importable", lambda module: module == "torch")
    with pytest.raises(SystemExit, match="has torch without package metadata"):
        packages.keep(folder)


@pytest.mark.parametrize(
    ("then", "message"),
    [
        ({"torch": "torch==2.15.0"}, r"torch of the base image, .*2\.11.*replaced by .*2\.15"),
        ({}, r"torch of the base image, .*replaced by None"),
    ],
)
def test_a_replaced_torch_stops_the_build(
    then: dict[str, str], message: str, folder: Path, bring: Bring, packages: ModuleType
) -> None:
    bring(torch="torch==2.11.0a0+nv1")
    packages.keep(folder)
    bring(**then)
    with pytest.raises(SystemExit, match=message):
        packages.check_image(folder, "")


def test_a_label_that_lies_stops_the_build(
    folder: Path, bring: Bring, packages: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring()
    packages.keep(folder)
    monkeypatch.setattr(packages, "own_version", lambda: "0.1.0")
    monkeypatch.setattr(packages, "stock", dict)
    monkeypatch.setattr(packages, "python_header", lambda: Path(__file__))
    packages.check_image(folder, "0.1.0")
    with pytest.raises(SystemExit, match=r"VERSION=0\.2\.0 .* label, and the code is version 0\.1\.0"):
        packages.check_image(folder, "0.2.0")
    monkeypatch.setattr(packages, "python_header", lambda: Path("/nowhere/Python.h"))
    with pytest.raises(SystemExit, match=r"/nowhere/Python\.h is missing"):
        packages.check_image(folder, "")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The commands that were started, none of which runs."""
    started: list[Any] = []

    def run(command: list[str], env: dict[str, str] | None = None, **_: Any) -> None:
        started.append(SimpleNamespace(command=command, env=env or {}))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("CUDA_ARCHS", "8.0;9.0")
    monkeypatch.setenv("MAX_JOBS", "3")
    return started


@pytest.mark.parametrize(
    ("name", "version", "brought", "said"),
    [
        ("flash-attn", "2.8.3", {"flash_attn": "flash-attn==2.7.4"}, r"kept from the base \(2\.7\.4\); FLASH_ATTN='2"),
        ("apex", "", {}, "apex: not in the base and left out, since APEX is empty"),
    ],
)
def test_a_kernel_that_is_kept_or_left_out_is_said(
    name: str,
    version: str,
    brought: dict[str, str],
    said: str,
    folder: Path,
    bring: Bring,
    packages: ModuleType,
    ran: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    bring(**brought)
    packages.build_kernel(name, version, folder)
    assert not ran
    assert re.search(said, capsys.readouterr().out)


def test_a_kernel_is_never_skipped_for_want_of_a_compiler(
    folder: Path, bring: Bring, packages: ModuleType, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bring()
    monkeypatch.setattr(packages, "nvcc", lambda: None)
    with pytest.raises(SystemExit, match=r"no nvcc: .* leave it out with --build-arg FLASH_ATTN="):
        packages.build_kernel("flash-attn", "2.8.3", folder)
    assert not ran


@pytest.mark.parametrize("name", ["flash-attn", "megatron-core", "apex"])
def test_a_kernel_is_built_against_the_torch_that_is_there(
    name: str, folder: Path, bring: Bring, packages: ModuleType, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(torch="torch==2.11.0")
    packages.keep(folder)
    monkeypatch.setattr(packages, "nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    monkeypatch.setattr(packages, "version_of", lambda _: "1")
    monkeypatch.setattr(packages, "stock", dict)
    monkeypatch.setattr(packages, "python_header", lambda: Path(__file__))
    packages.build_kernel(name, "1.2.3", folder)
    install = ran[1]  # after what the build needs
    assert {"--no-build-isolation", "--no-deps", "--constraint"} <= set(install.command)
    assert "1.2.3" in install.command[-1]
    assert install.env["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0"
    assert install.env["FLASH_ATTN_CUDA_ARCHS"] == "80;90"
    assert install.env["MAX_JOBS"] == "3"
    assert ran[2].command[-1] == f"import {packages.KERNELS[name].module}"


def test_a_kernel_that_does_not_compile_stops_the_build_with_what_to_do(
    folder: Path, bring: Bring, packages: ModuleType, ran: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: Any) -> None:
        if "--no-build-isolation" in command:
            raise subprocess.CalledProcessError(1, command)

    bring()
    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(packages, "nvcc", lambda: "/usr/local/cuda/bin/nvcc")
    monkeypatch.setattr(packages, "version_of", lambda _: "2.15.0")
    with pytest.raises(SystemExit, match=r"flash-attn 2\.8\.3 does not build against torch 2\.15\.0, .*FLASH_ATTN="):
        packages.build_kernel("flash-attn", "2.8.3", folder)
