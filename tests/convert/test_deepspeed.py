"""Checkpoints of DeepSpeed: every tensor that its engine wrote, bit for bit."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from harness import run_ranks

from rae_scale.convert.convert import convert
from rae_scale.convert.deepspeed import open_deepspeed
from rae_scale.convert.open import open_source
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state import CheckpointError, read_weights
from tests.convert.zero_folders import LAYOUTS, OPTIMIZER_STEP, REFERENCE, STEP, expected_state, write_all

TIED = {"conditioner.llm.lm_head.weight": "conditioner.llm.model.embed_tokens.weight"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of DeepSpeed's own for every layout."""
    folder = tmp_path_factory.mktemp("zero")
    run_ranks(write_all, 2, folder, args=(str(folder / "runs"),))
    return folder / "runs"


def random_box(shape: tuple[int, ...]) -> Box:
    start = tuple(random.randrange(length) for length in shape)
    stop = tuple(random.randrange(first + 1, length + 1) for first, length in zip(start, shape, strict=True))
    return Box(start, stop)


def check_everything(folder: Path, name: str) -> None:
    """Every tensor of a layout, whole and in boxes."""
    random.seed(0)
    expected = expected_state(LAYOUTS[name])
    with open_source(folder) as source:
        source.check()
        assert {(kind, tensor) for kind, forms in source.forms.items() for tensor in forms} == expected.keys()
        for (kind, tensor), value in expected.items():
            form = source.forms[kind][tensor]
            assert (form.shape, form.dtype) == (value.shape, value.dtype)
            for box in (whole(form.shape), *(random_box(form.shape) for _ in range(5))):
                found = source.read(kind, tensor, box)
                assert found.dtype == value.dtype and found.is_contiguous()
                assert torch.equal(found, value[box.slices]), (kind, tensor, box)
        assert source.facts.step == STEP and source.facts.optimizer_step == OPTIMIZER_STEP
        assert source.naming == "native" and f"ZeRO-{LAYOUTS[name].stage}" in source.what


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_everything_that_two_ranks_wrote(name: str, written: Path) -> None:
    check_everything(written / name, name)


@pytest.mark.dist
@pytest.mark.long
def test_everything_that_four_ranks_wrote(tmp_path: Path) -> None:
    run_ranks(write_all, 4, tmp_path, args=(str(tmp_path / "runs"),))
    for name in LAYOUTS:
        check_everything(tmp_path / "runs" / name, name)


@pytest.mark.dist
@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.tp == 1])
def test_it_reads_what_deepspeeds_own_script_reads(name: str, written: Path) -> None:
    reference = torch.load(written / name / REFERENCE, weights_only=True)
    source = open_deepspeed(written / name)
    for tensor, value in reference.items():
        found = source.read("weight", TIED.get(tensor, tensor), whole(value.shape))
        assert found.dtype == value.dtype and torch.equal(found, value), tensor
    left_out = source.forms["weight"].keys() - {TIED.get(tensor, tensor) for tensor in reference}
    # Of stage 1, its script leaves out what is frozen.
    assert bool(left_out) == (LAYOUTS[name].stage == 1)


@pytest.mark.dist
def test_tensor_parallel_parts_become_native_weights(written: Path, tmp_path: Path) -> None:
    report = convert(written / "zero3-tp2", tmp_path / "out", "native", verify=True)
    assert report.verified
    weights = read_weights(report.out)
    for (kind, name), value in expected_state(LAYOUTS["zero3-tp2"]).items():
        assert kind != "weight" or torch.equal(weights[name], value)


@pytest.mark.dist
def test_a_flipped_bit_in_what_the_engine_wrote(written: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(written / "zero3-tp2", tmp_path / "damaged"))
    path = folder / f"global_step{STEP}" / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"mp_rank_01_optim_states\.pt is damaged"):
        convert(folder, tmp_path / "out", "native")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"], "nothing stays of what was written before"
