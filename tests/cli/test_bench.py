"""`rae-scale bench` on a CPU at tiny sizes: it runs, prints a table, and writes what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path


def test_kernels(rae: Callable[..., str], tmp_path: Path) -> None:
    sizes = ("--tokens", 64, "--hidden", 64, "--head-dim", 32, "--repeats", 2, "--small", "--device", "cpu")
    printed = rae("bench", "kernels", *sizes, "--against", "eager", "--only", "swiglu", "--out", tmp_path)
    assert "| swiglu | eager | backward |" in printed
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert {"torch", "commit", "triton", "device"} <= set(found["environment"])
    assert len(found["timings"]) == 4 and all(row["within_twice"] for row in found["checks"])
    assert (tmp_path / "kernels.md").read_text().startswith("## Operations")


def test_attention(rae: Callable[..., str], tmp_path: Path) -> None:
    sizes = ("--shape", "2x32", "--tokens", 64, "--total-tokens", 128, "--repeats", 2, "--device", "cpu")
    assert "| 64 | 2 x 32 | 2 | ours |" in rae("bench", "attention", *sizes, "--out", tmp_path)
    rows = json.loads((tmp_path / "attention.json").read_text())["timings"]
    refused = {row["backend"] for row in rows if "refused" in row}
    assert "cudnn" in refused and "ours" not in refused


STEP = ("bench", "step", "--model", "dit-tiny", "--batch", 2, "--repeats", 2, "--small", "--device", "cpu")


def test_step(rae: Callable[..., str], tmp_path: Path) -> None:
    printed = rae(*STEP, "engine.precision=fp32", "--sweep", "data.micro_batch_size=1,2", "--out", tmp_path)
    assert "## Training step" in printed and "no peak is stated for this device" in printed
    assert "| micro_batch_size 1 |" in printed and "| micro_batch_size 2 |" in printed
    record = json.loads((tmp_path / "step.json").read_text())
    assert [row["settings"]["config"]["engine"]["precision"] for row in record["rows"]] == ["fp32", "fp32"]
    assert "bench step --model dit-tiny" in record["command"]
    assert "![Training step](step.png)" in (tmp_path / "step.md").read_text() and (tmp_path / "step.png").is_file()


def test_baseline_and_exit_status(rae: Callable[..., str], tmp_path: Path) -> None:
    rae(*STEP, "--out", tmp_path)
    path = tmp_path / "step.json"
    record = json.loads(path.read_text())

    def earlier(factor: float) -> Path:
        """The same run, were it `factor` times as slow, without noise."""
        copy = json.loads(json.dumps(record))
        measure = copy["rows"][0]["measures"]["step"]
        measure.update(dict.fromkeys(("median", "low", "high"), factor * measure["median"]))
        path.write_text(json.dumps(copy))
        return path

    compared = (*STEP, "--baseline", path)
    earlier(1e-3)
    assert "| slower |" in rae(*compared)
    rae(*compared, "--fail-on-regression", status=1)
    earlier(1e3)
    assert "| faster |" in rae(*compared, "--fail-on-regression")
    record["environment"]["device"] = "NVIDIA H100 80GB HBM3"
    earlier(1.0)
    assert "measured with device 'NVIDIA H100 80GB HBM3'" in rae(*compared, status=2)
    assert "say which with --baseline" in rae(*STEP, "--fail-on-regression", status=2)


def test_what_surrounds_a_step(rae: Callable[..., str], tmp_path: Path) -> None:
    made = ("--images", 8, "--made-size", 48, "--image-size", 32, "--batch", 4, "--starts", 1, "--repeats", 1)
    made = (*made, "--reader", "bare loop", "--sweep", "data.num_workers=0")  # the others are processes of their own
    assert "| num_workers 0, reader bare loop |" in rae("bench", "data", *made, "--out", tmp_path)
    saved = ("--model", "dit-tiny", "--folder", tmp_path, "--repeats", 1, "--device", "cpu")
    assert "| as configured | 0.00" in rae("bench", "checkpoint", *saved, "--out", tmp_path)
    drawn = ("--model", "dit-tiny", "--llm", "qwen2-tiny", "--decoder", "vit-test", "--batch", 1, "--repeats", 1)
    drawn = (*drawn, "engine.precision=fp32", "--device", "cpu")
    assert "| steps 2 |" in rae("bench", "sample", *drawn, "--sweep", "sampler.steps=1,2", "--out", tmp_path)
    written = {f"{name}.{kind}" for name in ("data", "checkpoint", "sample") for kind in ("json", "md", "png")}
    assert {path.name for path in tmp_path.iterdir()} == written


def test_mistakes_are_one_line(rae: Callable[..., str]) -> None:
    assert "--profile writes a trace" in rae("bench", "step", "--profile", status=2)
    assert "bench comm needs several processes" in rae("bench", "comm", "--model", "dit-tiny", status=2)
    assert "--collective='gather': choose from all_gather" in rae("bench", "comm", "--collective", "gather", status=2)
    assert "--ranks='1,x': write numbers of ranks as 1,2,4" in rae("bench", "scaling", "--ranks", "1,x", status=2)
    assert "--shape='32': write heads and head dimension as 32x64" in rae(
        "bench", "attention", "--shape", "32", status=2
    )
    assert "--head-dim=48 does not divide --hidden=64" in rae(
        "bench", "kernels", "--hidden", 64, "--head-dim", 48, "--small", "--device", "cpu", status=2
    )
