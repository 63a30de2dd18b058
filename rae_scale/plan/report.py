"""A plan, and a search, in lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rae_scale.config import Config
from rae_scale.parallel.ledger import sizes_of
from rae_scale.plan.plan import Plan, interval_steps, spare_bytes, transfers_of
from rae_scale.plan.search import Found, Search, overrides
from rae_scale.plan.traffic import local_batch, micro_batch_of

GIB, GB, TFLOP, MILLION = 1 << 30, 1e9, 1e12, 1_000_000
MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0


def report(plan: Plan) -> str:
    sections = [
        setting_lines(plan),
        memory_lines(plan),
        work_lines(plan),
        traffic_lines(plan),
        step_lines(plan),
        duration_lines(plan),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def setting_lines(plan: Plan) -> Iterator[str]:
    config, cluster = plan.config, plan.cluster
    model, data, samples = config.model, config.data, plan.samples
    local = local_batch(config)
    ranks = config.parallel.dp_replicate * config.parallel.dp_shard
    trains = f" and {model.llm.name}" if config.stage in ("pretrain", "finetune") else ""
    yield f"{config.stage} of {model.name}{trains} on {cluster.gpus} x {cluster.gpu.device}" + (
        f", {cluster.nodes} nodes joined by {cluster.network.name}" if cluster.nodes > 1 else ", one node"
    )
    yield f"{layout_words(config)}; {memory_words(config)}"
    yield (
        f"global batch {data.global_batch_size:,} = {ranks} ranks x {local // plan.micro_batch} micro-steps x "
        f"{plan.micro_batch} samples of {samples.tokens:g} tokens"
    )
    if data.latent_cache is not None and plan.latent_bytes is not None:
        yield (
            f"latent cache in {data.latent_cache.dtype}: {plan.latent_bytes:,} bytes of disk per image of the sources, "
            f"{plan.latent_bytes * MILLION / GB:,.1f} GB per million; no step runs the encoder"
        )
    yield f"rates: {plan.rates.source}" + (", not measured on this machine" if plan.rates.source == "defaults" else "")


def layout_words(config: Config) -> str:
    sizes = " x ".join(f"{axis} {size}" for axis, size in sizes_of(config.parallel).items())
    return f"{engine_words(config)}, {sizes}"


def engine_words(config: Config) -> str:
    engine = config.engine
    return f"zero{engine.zero_stage}" if engine.name == "zero" else engine.name


def memory_words(config: Config) -> str:
    """Everything else that decides about memory."""
    engine = config.engine
    words = [engine.precision, f"activation checkpointing {engine.activation_checkpointing}"]
    words += ["optimizer in host memory"] if engine.offload_optimizer else []
    return ", ".join(words)


def memory_lines(plan: Plan) -> Iterator[str]:
    memory, gpu = plan.memory, plan.cluster.gpu
    phases = list(memory.phases)
    rows = [["GiB on the fullest rank", *phases]]
    for name in components(plan):
        rows.append([f"  {name}", *(gibibytes(memory.phases[phase].get(name, 0)) for phase in phases)])
    rows.append(["  together", *(gibibytes(sum(memory.phases[phase].values())) for phase in phases)])
    yield from grid(rows)
    needed = memory.peak + memory.margin
    yield (
        f"  highest in {memory.peak_phase}: {gibibytes(memory.peak)} + {gibibytes(memory.margin)} margin = "
        f"{gibibytes(needed)} of {gibibytes(gpu.memory_bytes)} GiB"
    )
    yield verdict(plan.spare)
    if memory.host:
        held = ", ".join(f"{name} {gibibytes(size)}" for name, size in memory.host.items())
        yield f"  host memory per rank: {held} GiB"


def verdict(spare: int) -> str:
    if spare >= 0:
        return f"  fits: {gibibytes(spare)} GiB to spare"
    return f"  DOES NOT FIT: {gibibytes(-spare)} GiB too much; look for layouts that do with --search"


def components(plan: Plan) -> list[str]:
    """Of all phases, in the order in which they are first met."""
    return list(dict.fromkeys(name for parts in plan.memory.phases.values() for name, size in parts.items() if size))


def work_lines(plan: Plan) -> Iterator[str]:
    rows = [["TFLOP per image", "model", "computed"]]
    for name, part in plan.work.parts.items():
        rows.append([f"  {name}", f"{part.model / TFLOP:.4g}", f"{part.hardware / TFLOP:.4g}"])
    rows.append(["  together", f"{plan.work.model / TFLOP:.4g}", f"{plan.work.hardware / TFLOP:.4g}"])
    yield from grid(rows)


def traffic_lines(plan: Plan) -> Iterator[str]:
    transfers = transfers_of(plan.traffic, plan.cluster)
    if not transfers:
        yield "communication: none, there is one rank"
        return
    rows = [["GB per rank and step", "payload", "sent", "over network", "calls", "link"]]
    for found in transfers:
        rows.append(
            [
                f"  {found['phase']}: {found['kind']} over {found['group']} ({found['ranks']} ranks)",
                *(f"{found[name] / GB:,.3f}" for name in ("payload", "sent", "over_network")),
                f"{found['calls']:,}",
                found["link"],
            ]
        )
    yield from grid(rows)
    yield from (f"  {note}" for note in plan.traffic.notes)


def step_lines(plan: Plan) -> Iterator[str]:
    step = plan.step
    rows = [["seconds per step", "", "share"]]
    rows += [
        [f"  {name}", f"{seconds:.3f}", f"{seconds / step.seconds:.1%}"]
        for name, seconds in step.parts.items()
        if seconds
    ]
    rows.append(["  together", f"{step.seconds:.3f}", ""])
    yield from grid(rows)
    yield f"  communication hidden behind computation: {step.hidden:.3f}, not hidden: {step.exposed:.3f}"
    yield (
        f"  {step.images_per_s:,.1f} images/s, {step.images_per_s_per_gpu:,.2f} per GPU, MFU {step.mfu:.1%}, "
        f"HFU {step.hfu:.1%}"
    )


def duration_lines(plan: Plan) -> Iterator[str]:
    found, save_every = plan.duration, plan.config.run.save_every
    yield f"run of {found.steps:,} steps"
    yield f"  {time_words(found.training)} of training, {found.gpu_hours:,.0f} GPU-hours"
    yield (
        f"  checkpoint: {found.checkpoint.total / GB:,.1f} GB, {found.per_rank / GB:,.2f} per writing rank; training "
        f"waits {time_words(found.stall)}, on disk after {time_words(found.write)}"
    )
    yield (
        f"  best interval between checkpoints: {interval_steps(found, plan.step):,} steps ({time_words(found.daly)}), "
        f"with a failure every {time_words(found.mtbf)}; run.save_every={save_every} is {time_words(found.interval)}"
    )
    yield (
        f"  with saving and {found.failures:,.1f} expected failures: {time_words(found.expected)}, "
        f"{found.lost:.1%} of it lost, {found.lost_best:.1%} at the best interval"
    )


def search_report(search: Search) -> str:
    return "\n\n".join("\n".join(lines) for lines in (ranking_lines(search), refusal_lines(search)))


def ranking_lines(search: Search) -> Iterator[str]:
    base, cluster = search.base, search.cluster
    yield (
        f"{search.layouts:,} layouts for {base.stage} of {base.model.name} on {cluster.gpus} x {cluster.gpu.device}, "
        f"global batch {base.data.global_batch_size:,}; those that fit, the fastest first"
    )
    if not search.fits:
        yield "  none fits"
        return
    rows = [["images/s", "MFU", "step s", "GiB", "engine", "replicate x shard x sp x tp", "micro-batch", "settings"]]
    for found in search.fits:
        rows.append(
            [
                f"{found.step.images_per_s:,.1f}",
                f"{found.step.mfu:.1%}",
                f"{found.step.seconds:.3f}",
                gibibytes(cluster.gpu.memory_bytes - spare_bytes(found.memory, cluster)),
                engine_words(found.config),
                " x ".join(str(size) for size in sizes_of(found.config.parallel).values()),
                f"{micro_batch_of(found.config)} of {local_batch(found.config)}",
                memory_words(found.config),
            ]
        )
    yield from (f"  {line}" for line in grid(rows))
    if search.slower:
        yield f"  {search.slower:,} more are valid, but slower if they fit; more are shown with --top"
    yield f"the first of them: {' '.join(overrides(base, search.fits[0].config)) or 'is the configuration itself'}"


def refusal_lines(search: Search) -> Iterator[str]:
    yield "refused"
    for refusal in search.refused:
        yield f"  {refusal.layouts:,} layouts, such as {layout_words(refusal.example)}: {refusal.reason}"
    if not search.refused:
        yield "  nothing"


def search_json(search: Search) -> dict[str, Any]:
    """The same, without rounding."""

    def entry(found: Found) -> dict[str, Any]:
        return {
            "overrides": overrides(search.base, found.config),
            "engine": engine_words(found.config),
            "parallel": found.config.parallel.model_dump(),
            "micro_batch": micro_batch_of(found.config),
            "images_per_s": found.step.images_per_s,
            "step_s": found.step.seconds,
            "mfu": found.step.mfu,
            "memory_bytes": found.memory.peak + found.memory.margin,
            "spare_bytes": spare_bytes(found.memory, search.cluster),
        }

    return {
        "cluster": asdict(search.cluster),
        "layouts": search.layouts,
        "fits": [entry(found) for found in search.fits],
        "slower": search.slower,
        "refused": [
            {
                "layouts": refusal.layouts,
                "reason": refusal.reason,
                "example": overrides(search.base, refusal.example),
            }
            for refusal in search.refused
        ],
    }


def time_words(seconds: float) -> str:
    for unit, name in ((DAY, "days"), (HOUR, "h"), (MINUTE, "min")):
        if seconds >= unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s"


def gibibytes(size: float) -> str:
    return f"{size / GIB:,.1f}"


def grid(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as they need to be, words to the left and numbers to the right. The first row is the heading."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numbers = [all(cell[:1].isdigit() or cell[:1] in ("-", "") for cell in column[1:]) for column in columns]
    for row in rows:
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ]
        yield "  ".join(cells).rstrip()
