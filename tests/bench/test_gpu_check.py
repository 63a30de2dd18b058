"""The GPU check runs from end to end at tiny sizes, and one section's end is not the others'."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rae_scale.bench import gpu_check, gpu_sections
from rae_scale.bench.gpu_check import SECTIONS, Section, check, run_apart, run_section, verdicts
from rae_scale.bench.gpu_sections import Sizes

CPU = torch.device("cpu")


def test_dry_run_goes_through_every_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_check.main(["--dry-run", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {name: found["status"] for name, found in results["sections"].items()} == dict.fromkeys(
        (section.name for section in SECTIONS), "ok"
    ), results
    checks = results["sections"]["correctness"]["data"]["checks"]
    assert checks and all(row["within_twice"] and row["bit_identical"] for row in checks)
    step = results["sections"]["step"]["data"]
    assert [row["kernels"] for row in step["ways"]] == ["ours", "eager"] and not any(
        "failed" in r for r in step["ways"]
    )
    largest = results["sections"]["largest model"]["data"]["settings"]["config"]
    assert (largest["optim"]["moments"], largest["engine"]["activation_checkpointing"]) == ("bf16", "full")
    assert "not the same bits every time: none" in capsys.readouterr().out


def test_a_section_that_fails_is_recorded_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sizes: Sizes) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_sections, "ceilings", fail)
    monkeypatch.setattr(gpu_check, "SECTIONS", (*SECTIONS[:2], SECTIONS[5]))
    results = check(tmp_path, dry=True, device=CPU, limit=100)
    found = results["sections"]
    assert [section["status"] for section in found.values()] == ["ok", "failed", "ok"]
    assert "illegal memory access" in found["ceilings"]["reason"] and "in fail" in found["ceilings"]["traceback"]
    assert json.loads((tmp_path / "gpu_check.json").read_text()) == json.loads(json.dumps(results))
    assert verdicts(results)


def test_a_section_in_its_own_process_and_one_that_takes_too_long(tmp_path: Path) -> None:
    found = run_apart(SECTIONS[0], tmp_path, 120, "--dry-run")
    assert found["status"] == "ok" and found["data"]["environment"]["torch"] == torch.__version__
    found = run_apart(SECTIONS[0], tmp_path, 0.01, "--dry-run")
    assert found["status"] == "failed" and "took longer than" in found["reason"]
    assert not list(tmp_path.glob("section-*"))


def test_sections_that_do_not_fit_into_the_limit_are_left_out(tmp_path: Path) -> None:
    results = check(tmp_path, dry=False, device=CPU, limit=1)
    assert {section["status"] for section in results["sections"].values()} == {"skipped"}
    assert "of --limit=1" in results["sections"]["step"]["reason"]


def test_without_the_rest_of_the_package_a_section_says_what_is_missing(tmp_path: Path) -> None:
    section = Section("step", "no_such_module:ways", 1)
    found = run_section(section, Sizes.of(CPU, tmp_path, dry=True))
    assert found["status"] == "skipped" and "needs the whole of rae-scale" in found["reason"]


def test_operations_are_checked_where_only_torch_and_the_kernels_are_installed(tmp_path: Path) -> None:
    """As in images that bring PyTorch and Triton and nothing of ours."""
    missing = ("deepspeed", "pydantic", "typer", "simplejpeg", "liger_kernel", "yaml", "tensorboard")
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({missing}))\n"
        "from rae_scale.bench import gpu_check\n"
        f"gpu_check.main(['--dry-run', '--section', 'correctness', '--out', {str(tmp_path)!r}])\n"
        f"gpu_check.main(['--dry-run', '--section', 'step', '--out', {str(tmp_path)!r}])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    assert json.loads((tmp_path / "section-correctness.json").read_text())["status"] == "ok"
    step = json.loads((tmp_path / "section-step.json").read_text())
    assert step["status"] == "skipped" and "needs the whole of rae-scale" in step["reason"]


def test_without_a_gpu_only_a_dry_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main(["--out", str(tmp_path)])


def test_warps_are_forced_inside_only() -> None:
    pytest.importorskip("triton")
    from rae_kernels.triton_impl import norm

    shipped = norm.shape_of
    with gpu_sections.forced_warps(2):
        assert norm.shape_of(2048)["num_warps"] == 2
        assert norm.shape_of(2048) | shipped(2048) == shipped(2048)
    assert norm.shape_of is shipped
