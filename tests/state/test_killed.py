"""Processes that are really killed while they save, and what is on disk then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from toy_model import train_step

from rae_scale.engines import Engine
from rae_scale.parallel import Mesh
from rae_scale.state import intact_checkpoint, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
NAMED = ("point_to", "prune", "rmtree")
"""From here on `latest` names the new checkpoint."""


def test_a_killed_save_leaves_a_checkpoint_that_loads(build: Callable[..., Engine], mesh: Mesh, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    expected, engine = {}, build()
    for step in (1, 2):
        train_step(engine, step - 1, 0, 1, 1)
        expected[step] = {(p.kind, p.name): p.tensor.clone() for p in engine.pieces()}
    for number, (name, status) in enumerate(json.loads(done.stdout)):
        assert status == -9, f"{name}: not killed"
        run_dir = tmp_path / str(number)
        found = intact_checkpoint(run_dir, mesh)
        assert found is not None, name
        loaded = build()
        step = load_checkpoint(found, loaded, mesh)["step"]
        assert step == (2 if any(part in name for part in NAMED) else 1), name
        for piece in loaded.pieces():
            assert torch.equal(piece.tensor, expected[step][piece.kind, piece.name]), (name, piece.name)
        # The next save clears up what is left.
        path = save_checkpoint(run_dir, 3, loaded, mesh, {}, keep_last=1)
        assert {file.name for file in path.parent.iterdir()} == {"latest", "step-00000003"}, name
