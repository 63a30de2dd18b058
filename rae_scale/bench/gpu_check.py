"""Everything that only a GPU can show, in one call: `python -m rae_scale.bench.gpu_check --out FOLDER`.

Sections run one after the other, each in a process of its own, and FOLDER/gpu_check.json is written after each one: a
section that fails, or breaks its process's CUDA context, is recorded, and the others run. Made for one H100 or H200 and
ten minutes; what does not fit into --limit is left out and said to be.

--dry-run runs the same at tiny sizes, on a CPU too, in this process: the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rae_scale.bench.gpu_sections import Sizes
from rae_scale.bench.results import write_json

Data = dict[str, Any]


class Section(NamedTuple):
    """name; "module:function" within this package; how many seconds it may take."""

    name: str
    function: str
    seconds: float


# The most telling first: a limit cuts off the end.
SECTIONS = (
    Section("environment", "gpu_sections:where", 60),
    Section("ceilings", "gpu_sections:ceilings", 60),
    Section("correctness", "gpu_sections:correctness", 150),
    Section("bandwidth", "gpu_sections:bandwidth", 150),
    Section("step", "gpu_steps:ways", 240),
    Section("optimizer", "gpu_sections:optimizer", 60),
    Section("profile", "gpu_steps:profiled", 90),
    Section("largest model", "gpu_steps:largest_model", 100),
    Section("attention", "gpu_sections:attention", 60),
    Section("micro-batches", "gpu_steps:micro_batches", 150),
    Section("warps", "gpu_sections:warps", 120),
)

OUTER_MARGIN = 5.0
RESULTS = "gpu_check.json"


def run_section(section: Section, sizes: Sizes) -> Data:
    """In this process: what it found, or how it failed."""
    started = time.perf_counter()
    try:
        module, _, function = section.function.partition(":")
        try:
            run = getattr(import_module(f"rae_scale.bench.{module}"), function)
        except ImportError as error:
            reason = f"{error}: this section needs the whole of rae-scale; install what is missing"
            return {"status": "skipped", "reason": reason}
        found: Data = {"status": "ok", "data": run(sizes)}
    except Exception as error:
        found = {"status": "failed", "reason": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return found | {"seconds": round(time.perf_counter() - started, 2)}


def run_apart(section: Section, folder: Path, seconds: float, *options: str) -> Data:
    """In another process, which gets `seconds`."""
    partial = folder / f"section-{section.name.replace(' ', '-')}.json"
    command = [sys.executable, "-m", "rae_scale.bench.gpu_check", "--out", str(folder), "--section", section.name]
    started = time.perf_counter()
    try:
        done = subprocess.run([*command, *options], timeout=seconds, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took longer than {seconds:.0f} s", "seconds": seconds}
    took = round(time.perf_counter() - started, 2)
    if not partial.exists():
        reason = f"its process ended with status {done.returncode}"
        return {"status": "failed", "reason": reason, "seconds": took, "output": done.stderr[-3000:]}
    found: Data = json.loads(partial.read_text())
    partial.unlink()
    return found | {"seconds": took}


def check(folder: Path, *, dry: bool, device: torch.device, limit: float) -> Data:
    """Run all sections; returns what is in the file."""
    started = time.perf_counter()
    results: Data = {"dry_run": dry, "device": str(device), "sections": {}}
    for section in SECTIONS:
        left = limit - OUTER_MARGIN - (time.perf_counter() - started)
        if dry:
            found = run_section(section, Sizes.of(device, folder, dry=True))
        elif left < min(20.0, section.seconds):
            found = {"status": "skipped", "reason": f"{left:.0f} s were left of --limit={limit:.0f}"}
        else:
            found = run_apart(section, folder, min(section.seconds, left))
        results["sections"][section.name] = found
        write_json(folder / RESULTS, results)
        note = found.get("reason", "")
        print(f"{section.name:14s} {found['status']:8s} {found.get('seconds', 0):6.1f} s  {note}", flush=True)
    return results


def verdicts(results: Data) -> list[str]:
    """The few lines that matter."""
    data = {name: section.get("data", {}) for name, section in results["sections"].items()}
    lines = []
    checks = data.get("correctness", {}).get("checks", [])
    bad = [f"{row['operation']} {row.get('tensor', '')}" for row in checks if not row.get("within_twice")]
    moving = [f"{row['operation']} {row['tensor']}" for row in checks if row.get("bit_identical") is False]
    lines.append(
        f"within twice PyTorch's error: {len(checks) - len(bad)} of {len(checks)} tensors; not: {bad or 'none'}"
    )
    lines.append(f"not the same bits every time: {moving or 'none'}")
    for row in data.get("bandwidth", {}).get("timings", []):
        if "fraction_of_copy" in row:
            name = f"{row['operation']} {row['pass']} {row['way']}"
            lines.append(f"{name:52s} {row['median_ms']:8.3f} ms {row['fraction_of_copy']:7.1%} of copy")
    for row in [*data.get("step", {}).get("ways", []), *data.get("largest model", {}).get("ways", [])]:
        known = {n: row[n] for n in row if isinstance(row[n], int | float)}
        lines.append(f"step {row['kernels']}: {row.get('failed') or {n: round(v, 4) for n, v in known.items()}}")
    lines.append(f"largest micro-batches: {data.get('micro-batches', {})}")
    lines += [
        f"{r['category']:28s} {r['ms']:8.2f} ms {r['share']:6.1%}"
        for r in data.get("profile", {}).get("categories", [])
    ]
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json and trace.json")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU if there is no GPU")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything")
    parser.add_argument("--section", choices=[section.name for section in SECTIONS], help="run this one alone")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not given.dry_run:
        parser.error("PyTorch sees no GPU; --dry-run shows on a CPU that everything runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given.out.mkdir(parents=True, exist_ok=True)
    if given.section:
        section = next(section for section in SECTIONS if section.name == given.section)
        found = run_section(section, Sizes.of(device, given.out, dry=given.dry_run))
        write_json(given.out / f"section-{section.name.replace(' ', '-')}.json", found)
        return
    results = check(given.out, dry=given.dry_run, device=device, limit=given.limit)
    print("\n".join(verdicts(results)))
    print(f"results: {given.out / RESULTS}")


if __name__ == "__main__":
    main()
