"""The sharded engines without company: one GPU, or a look at them on a laptop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checks import CPU, assert_close_to, build, build_eager, run
from harness import run_ranks
from toy_model import engine_config

from rae_scale.config.schema import ParallelConfig
from rae_scale.parallel import Mesh, build_mesh, init_distributed
from rae_scale.state import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.dist


def one_rank(folder: str) -> None:
    mesh = build_mesh(ParallelConfig(), init_distributed(ParallelConfig(), "cpu"))
    reference = build_eager()
    run(reference, Mesh(CPU), range(2))
    path = save_checkpoint(folder, 2, reference, mesh, {}, keep_last=1)
    run(reference, Mesh(CPU), range(2, 4))
    linear = torch.nn.functional.linear
    # Twice each: closing an engine leaves room for another.
    for cfg in [engine_config("fsdp2"), engine_config("zero", 3), engine_config("fsdp2"), engine_config("zero", 1)]:
        engine = build(cfg, mesh)
        load_checkpoint(path, engine, mesh)
        run(engine, mesh, range(2, 4))
        assert_close_to(engine, reference, f"{cfg.name} alone")
        engine.close()
        assert not torch.distributed.is_initialized()
        assert torch.nn.functional.linear is linear


def test_sharded_engines_run_in_one_process(tmp_path: Path) -> None:
    run_ranks(one_rank, 1, tmp_path, args=(str(tmp_path / "run"),))
