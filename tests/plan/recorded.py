"""Real runs under the ledger, of configurations that are also planned."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import parity
import torch
import torch.distributed as dist
from awkward import CHANNELS, DIT, HEAD, LLM, TOKENS
from parity import BATCH, Variant, build_run

from rae_scale.bench.results import write_json
from rae_scale.config import Config
from rae_scale.config.schema import ParallelConfig
from rae_scale.models import llm_zoo, zoo
from rae_scale.models.composite import ScaleRAE, build_scale_rae
from rae_scale.models.packing import TextLayout
from rae_scale.parallel import build_mesh, init_distributed, shutdown_distributed
from rae_scale.parallel.ledger import Ledger, Volume
from rae_scale.plan.calibrate import TINY, content, measure_machine, report
from rae_scale.plan.qwen2 import build_planned_llm
from rae_scale.plan.samples import Samples
from rae_scale.train.loop import global_counts

TENSOR_PARALLEL = {"parallel": {"tp": 2}, "precision": "bf16", "activation_checkpointing": "full"}
STEADY = 2
"""Steps before the one that is recorded: DeepSpeed's stage 3 learns the order of modules in the first two."""


class Recorded(NamedTuple):
    volume: Volume
    calls: Counter[tuple[str, str]]
    samples: Samples
    """Of the micro-batches."""


def models() -> list[tuple[dict[str, Any], str, Any]]:
    """Tables, names and dimensions of the models of `awkward`, for a configuration to name them."""
    return [
        (zoo.DIT_ZOO, "dit-awkward", DIT),
        (zoo.DIT_ZOO, "dit-awkward-ddt", replace(DIT, ddt=HEAD)),
        (llm_zoo.LLM_ZOO, "qwen2-awkward", LLM),
    ]


def config_of(
    *, ddt: bool = True, llm_trains: bool = True, micro_steps: int = 1, parallel: dict[str, int], **engine: Any
) -> Config:
    local = BATCH // parallel.get("dp_shard", 1)
    return Config.model_validate(
        {
            "model": {
                "name": "dit-awkward-ddt" if ddt else "dit-awkward",
                "qk_norm": True,
                "llm": {"name": "qwen2-awkward", "train": llm_trains},
            },
            "engine": engine,
            "parallel": parallel,
            "data": {"global_batch_size": BATCH, "micro_batch_size": local // micro_steps},
        }
    )


def record_and_calibrate(settings: dict[str, Any], path: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What every rank of `two_ranks` runs, in one process group: a second one at the same port may find what the first
    has left there."""
    init_distributed(ParallelConfig(dp_shard=2), "cpu")
    first = dist.get_rank() == 0
    (recorded,) = record_each("fsdp2", [settings], twin=True)
    calibration, fits = measure_machine(torch.device("cpu"), TINY)
    shutdown_distributed()
    if first:
        write_json(Path(path), content(calibration, fits, {}))
    return recorded, {"report": report(calibration, fits), "kinds": [(fit.kind, fit.span) for fit in fits]}


def record(engine: str, settings: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What every rank of the long tests runs."""
    init_distributed(ParallelConfig(dp_shard=2), "cpu")
    found = record_each(engine, settings)
    shutdown_distributed()
    return found


def record_each(engine: str, settings: list[dict[str, Any]], twin: bool = False) -> list[tuple[Any, ...]]:
    """A `Recorded` for each of `settings`, which `config_of` takes, as a tuple.

    twin: the language model is the planner's, so that no rank has to import transformers.
    """
    for table, name, value in models():
        table[name] = value
    configs = [config_of(name=engine, **each) for each in settings]
    found = []
    for config in configs:
        if twin:
            parity.scale_rae = partial(twin_of, config)
        found.append(tuple(record_one(config)))
    return found


def twin_of(config: Config, *, ddt: bool) -> ScaleRAE:
    torch.manual_seed(0)
    return build_scale_rae(config.model, CHANNELS, TOKENS, None, build_planned_llm)


def record_one(config: Config) -> Recorded:
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    variant = Variant(ddt=config.model.name.endswith("-ddt"), llm_trains=config.model.llm.train)
    data = config.data
    micro_steps = data.global_batch_size // config.parallel.dp_shard // data.micro_batch_size
    run = build_run(config.engine, mesh, config.parallel, variant, micro_steps, Path())
    lrs = {"llm": 1e-3, "dit": 1e-3}
    for step in range(STEADY + 1):
        batches = next(run.batches)
        totals = global_counts(run, batches)
        with Ledger(mesh) as ledger:
            for number, batch in enumerate(batches, start=1):
                with run.engine.autocast():
                    inputs = run.stage.prepare(batch, step)
                    output = run.stage.loss(run.engine.module, inputs, totals)
                run.engine.backward(output.loss, last=number == len(batches))
            run.engine.step(lrs)
    run.engine.close()
    layouts = [TextLayout.of(batch.attention_mask, batch.labels) for batch in batches]
    count = sum(len(layout.lengths) for layout in layouts)
    samples = Samples(
        sum(sum(layout.lengths) for layout in layouts) / count, sum(len(layout.labelled) for layout in layouts) / count
    )
    return Recorded(ledger.volume(), ledger.calls, samples)
