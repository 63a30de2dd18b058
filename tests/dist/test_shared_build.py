"""A model is built once per machine, and every process starts from those very weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from awkward import scale_rae
from harness import run_ranks
from torch import nn

from rae_scale.config.schema import ParallelConfig
from rae_scale.models.composite import ScaleRAE
from rae_scale.parallel import Mesh, build_mesh, init_distributed, shutdown_distributed
from rae_scale.state import CheckpointError
from rae_scale.train import shared_build
from rae_scale.train.shared_build import build_once_per_machine, parameters_on_meta

pytestmark = pytest.mark.dist


def build() -> ScaleRAE:
    """Other weights on each rank: only one may be asked."""
    model = scale_rae()
    with torch.no_grad():
        model.connector.bias.fill_(1 + int(os.environ["RANK"]))
    model.conditioner.mm_projector.requires_grad_(False)
    return model


def build_empty() -> ScaleRAE:
    with parameters_on_meta():
        model = scale_rae()
    assert all(parameter.is_meta for parameter in model.parameters())
    model.conditioner.mm_projector.requires_grad_(False)
    return model


def same(model: nn.Module) -> nn.Module:
    return model


def two_ranks() -> None:
    init_distributed(ParallelConfig(dp_shard=2), "cpu")
    mesh = build_mesh(ParallelConfig(dp_shard=2), torch.device("cpu"))
    check_one_build(mesh)
    check_failure(mesh)
    check_two_machines(mesh)
    shutdown_distributed()


def check_one_build(mesh: Mesh) -> None:
    files: list[IO[bytes]] = []
    names: list[int] = []
    real = shared_build.written

    @contextlib.contextmanager
    def written(module: nn.Module) -> Iterator[IO[bytes]]:
        with real(module) as file:
            files.append(file)
            names.append(os.fstat(file.fileno()).st_nlink)
            yield file

    shared_build.written = written
    model = build_once_per_machine(build, build_empty, same, mesh)
    shared_build.written = real
    # Without a name, so that processes that are killed leave none behind.
    assert names == [0] * (mesh.rank == 0)
    assert all(file.closed for file in files)
    expected = scale_rae()
    with torch.no_grad():
        expected.connector.bias.fill_(1)
    named = dict(expected.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(named)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, named[name]), name
        assert parameter.requires_grad == (not name.startswith("conditioner.mm_projector")), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected.get_buffer(name)), name
    llm = model.conditioner.llm
    assert llm.lm_head.weight is llm.model.embed_tokens.weight
    # What one process writes to its weights is its own.
    with torch.no_grad():
        model.connector.weight.fill_(float(mesh.rank))
    mesh.barrier()
    assert float(model.connector.weight.detach().mean()) == mesh.rank


def check_failure(mesh: Mesh) -> None:
    """What the one process cannot do, all report."""

    def broken() -> ScaleRAE:
        raise ValueError("model.name='x' names no model")

    with pytest.raises(ValueError, match="names no model"):
        build_once_per_machine(broken, build_empty, same, mesh)
    room, shared_build.folder_with_room = shared_build.folder_with_room, no_room
    with pytest.raises(CheckpointError, match=r"rank 0: .*no room"):
        build_once_per_machine(build, build_empty, same, mesh)
    shared_build.folder_with_room = room


def no_room(size: int) -> str:
    raise OSError("no room")


def check_two_machines(mesh: Mesh) -> None:
    """Processes that share no files build for themselves."""
    real, shared_build.machine = shared_build.machine, lambda: (f"host-{mesh.rank}", "")
    model = build_once_per_machine(build, build_empty, same, mesh)
    assert float(model.connector.bias.detach().mean()) == 1 + mesh.rank
    shared_build.machine = real


def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(two_ranks, 2, tmp_path)


def test_no_room_names_the_folders_and_the_fix() -> None:
    with pytest.raises(OSError, match=r"\(1000000000.0 GB\).*none of .*has room for it; .*--ipc host.*TMPDIR"):
        shared_build.folder_with_room(10**18)
