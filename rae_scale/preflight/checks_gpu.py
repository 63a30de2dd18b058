"""Judgement on GPUs, one rank at a time and side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rae_scale.preflight.facts import Facts
from rae_scale.preflight.finding import Finding, size
from rae_scale.preflight.gpu import GPUFacts
from rae_scale.preflight.needs import Needs

GB = 1e9
MOST_USED = 2 * GB
"""Bytes in use before the run: CUDA's context takes about half of one."""
OWN_CONTEXT = 0.5 * GB
"""CUDA's, of the process that looks: the plan counts it as well."""
LEAST_POWER, HOT = 0.95, 88.0
"""Of the GPU's own power limit; degrees Celsius."""


def check_gpus(every: Sequence[Facts], needs: Needs | None, device: str) -> Iterator[Finding]:
    """device: `run.device`."""
    for facts in every:
        yield judge_presence(facts, device)
        if facts.gpu is not None:
            yield judge_memory(facts.place.rank, facts.gpu, needs)
            yield from judge_health(facts.place.rank, facts.gpu)
    yield from judge_models(every)


def judge_presence(facts: Facts, device: str) -> Finding:
    ranks = (facts.place.rank,)
    if facts.gpu is not None:
        return Finding("gpu", "ok", f"{facts.gpus} on the machine", ranks=ranks)
    if facts.gpu_problem:
        return Finding(
            "gpu",
            "fail",
            facts.gpu_problem,
            "this rank cannot train on a GPU",
            "install a driver that is as new as PyTorch's CUDA, start one process per GPU, or set run.device=cpu",
            ranks,
        )
    if device == "cuda":
        why, fix = "run.device=cuda needs one", "give the job or container GPUs (docker run --gpus all)"
        return Finding("gpu", "fail", "no GPU", why, fix, ranks)
    return Finding("gpu", "ok", f"not used: run.device={device}, and trains on the CPU", ranks=ranks)


def judge_memory(rank: int, gpu: GPUFacts, needs: Needs | None) -> Finding:
    value = f"{size(gpu.allocatable)} of {size(gpu.memory_total)} can be allocated"
    used = gpu.memory_total - gpu.memory_free
    holders = f" by {', '.join(gpu.others)}" if gpu.others else ""
    fix = "end the processes that hold it (nvidia-smi)"
    if needs is not None and gpu.allocatable + OWN_CONTEXT < needs.gpu:
        value += f"; the plan needs {size(needs.gpu)}"
        why = "the run ends out of memory"
        if used > MOST_USED:
            why += f"; {size(used)} are in use{holders}"
        else:
            fix = "see what takes it with `rae-scale plan`, and choose a smaller data.micro_batch_size or more shards"
        return Finding("gpu-memory", "fail", value, why, fix, (rank,))
    if used > MOST_USED:
        return Finding("gpu-memory", "warn", f"{size(used)} are in use{holders}", "less is left", fix, (rank,))
    return Finding("gpu-memory", "ok", value, ranks=(rank,))


def judge_health(rank: int, gpu: GPUFacts) -> Iterator[Finding]:
    """What the driver complains of, or one finding that it does not."""
    problems = list(health_problems(rank, gpu))
    yield from problems or [Finding("gpu-health", "ok", "no errors, no slowdown", ranks=(rank,))]


def health_problems(rank: int, gpu: GPUFacts) -> Iterator[Finding]:
    ranks = (rank,)
    if gpu.ecc_errors:
        yield Finding(
            "gpu-health",
            "fail",
            f"{gpu.ecc_errors:.0f} uncorrected ECC errors since the driver was loaded",
            "results may be wrong, and the next error ends the run",
            "reset the GPU or restart the machine; if they come back, replace it",
            ranks,
        )
    if gpu.rows_failed:
        why, fix = "its memory has used up its spare rows", "replace the GPU"
        yield Finding("gpu-health", "fail", "a failed row remapping", why, fix, ranks)
    if gpu.rows_pending:
        why, fix = "a bad row of its memory stays in use until then", "reset the GPU or restart the machine"
        yield Finding("gpu-health", "warn", "a row remapping waits for a reset", why, fix, ranks)
    if gpu.slowdowns:
        yield Finding(
            "gpu-health",
            "fail",
            f"its clock is held down: {', '.join(gpu.slowdowns)}",
            "every step waits for the slowest GPU",
            "see to its cooling and power supply, and to `nvidia-smi -q -d PERFORMANCE`",
            ranks,
        )
    if gpu.temperature is not None and gpu.temperature >= HOT:
        why, fix = "it will slow down under load", "see to its cooling"
        yield Finding("gpu-health", "warn", f"{gpu.temperature:.0f} degrees Celsius", why, fix, ranks)
    if gpu.power_limit and gpu.power_default and gpu.power_limit < LEAST_POWER * gpu.power_default:
        yield Finding(
            "gpu-health",
            "warn",
            f"power is capped at {gpu.power_limit:.0f} of {gpu.power_default:.0f} W",
            "it computes more slowly than the plan takes for granted",
            f"nvidia-smi -pl {gpu.power_default:.0f}, unless it is meant so",
            ranks,
        )
    if gpu.pcie_width and gpu.pcie_width_max and gpu.pcie_width < gpu.pcie_width_max:
        yield Finding(
            "gpu-health",
            "warn",
            f"PCIe has {gpu.pcie_width:.0f} of {gpu.pcie_width_max:.0f} lanes",
            "copies to the host and to network adapters are slow",
            "seat the card or its riser anew",
            ranks,
        )


def judge_models(every: Sequence[Facts]) -> Iterator[Finding]:
    """Ranks of one run wait for the slowest, and need one backend."""
    names = {facts.place.rank: facts.gpu.name if facts.gpu else "no GPU" for facts in every}
    common, _ = Counter(names.values()).most_common(1)[0]
    odd = {rank: name for rank, name in names.items() if name != common}
    if not odd and common != "no GPU":
        yield Finding("gpu-model", "ok", common, ranks=tuple(names))
    for rank, name in odd.items():
        mixed = "no GPU" in (name, common)
        yield Finding(
            "gpu-model",
            "fail" if mixed else "warn",
            f"{name}, most ranks: {common}",
            "ranks with and without a GPU have no common backend" if mixed else "every step waits for the slower kind",
            "leave those machines out, or run.device=cpu" if mixed else "leave those machines out",
            (rank,),
        )
