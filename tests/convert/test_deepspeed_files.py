"""DeepSpeed's files, in every build that its engine does not easily produce, and those that do not belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rae_scale.convert.deepspeed import open_deepspeed
from rae_scale.convert.open import open_source
from rae_scale.parallel.boxes import Box, whole
from rae_scale.state import CheckpointError

PARAMETERS = {"dit.x_embed.weight": (5, 3), "dit.x_embed.bias": (5,), "connector.bias": (1,)}
Contents = dict[str, dict[str, Any]]
"""File name -> what is saved in it."""


def logical(name: str, shape: tuple[int, ...], shift: float = 0.0) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) + 100.0 * len(name) + shift


def stage3(
    parameters: Mapping[str, tuple[int, ...]] = PARAMETERS, ranks: int = 2, tp: int = 0, tps: int = 1
) -> Contents:
    """Stage 3 of one tensor-parallel rank: a group of everything."""
    files: Contents = {}
    for rank in range(ranks):
        flats = []
        for shift in (0.0, 0.25, 0.5):
            parts = []
            for name, shape in parameters.items():
                flat = logical(name, shape, shift + 1000 * tp).view(-1)
                padded = torch.cat([flat, torch.full((-len(flat) % ranks,), torch.nan)])
                parts.append(padded.chunk(ranks)[rank])
            flats.append(torch.cat(parts))
        files[f"zero_pp_rank_{rank}_mp_rank_{tp:02d}_optim_states.pt"] = {
            "optimizer_state_dict": {
                "zero_stage": 3,
                "partition_count": ranks,
                "fp32_flat_groups": [flats[0]],
                "optimizer_state_dict": {
                    "state": {0: {"exp_avg": flats[1], "exp_avg_sq": flats[2]}},
                    "param_groups": [{"params": [0], "step": 4}],
                },
            }
        }
        files[f"zero_pp_rank_{rank}_mp_rank_{tp:02d}_model_states.pt"] = {
            "param_shapes": [{name: torch.Size(shape) for name, shape in parameters.items()}],
            "frozen_param_shapes": {},
            "frozen_param_fragments": {},
            "shared_params": {},
            "buffer_names": [],
            "module": {},
            "global_steps": 9,
            "mp_world_size": tps,
        }
    return files


OPTIM_1, MODEL_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"


def save(folder: Path, files: Contents) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        torch.save(content, folder / name)
    return folder


def test_parts_of_odd_lengths(tmp_path: Path) -> None:
    source = open_deepspeed(save(tmp_path, stage3(ranks=4)))
    for name, shape in PARAMETERS.items():
        for shift, kind in ((0.0, "weight"), (0.25, "exp_avg"), (0.5, "exp_avg_sq")):
            assert torch.equal(source.read(kind, name, whole(shape)), logical(name, shape, shift))
    assert (source.facts.step, source.facts.optimizer_step) == (9, 4)


def optim(files: Contents, name: str = OPTIM_1) -> dict[str, Any]:
    found: dict[str, Any] = files[name]["optimizer_state_dict"]
    return found


def drop_moment(files: Contents) -> None:
    del optim(files)["optimizer_state_dict"]["state"][0]["exp_avg"]


def cut_flat(files: Contents) -> None:
    optim(files)["fp32_flat_groups"][0] = optim(files)["fp32_flat_groups"][0][:-1].clone()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.pop(OPTIM_1), r"optim_states of 1 ranks and model_states of 2: they are not all of one"),
        (lambda f: f.pop(OPTIM_1.replace("_1_", "_0_")), r"no optim_states of pp_rank 0 mp_rank 0 \(1 of 2 are"),
        (lambda f: f.pop(MODEL_1), r"has optim_states of 2 ranks and model_states of 1"),
        (lambda f: [f.pop(name) for name in list(f) if "model" in name], r"has no \*model_states\.pt"),
        (lambda f: f.update({f"bf16_{OPTIM_1}": f[OPTIM_1]}), r"are of one rank; remove the one that is left over"),
        (lambda f: f.update({"layer_00-model_states.pt": {}}), r"experts or pipeline stages are not read here"),
        (lambda f: f.update({"expert_0_mp_rank_00_optim_states.pt": {}}), r"experts or pipeline stages"),
        (lambda f: optim(f).update(partition_count=4), r"is one of 4 parts, and .* has those of 2 ranks"),
        (lambda f: optim(f).update(partition_count=[2, 1]), r"cut into \[1, 2\] parts; experts"),
        (lambda f: optim(f).update(zero_stage=2), r"has no 'single_partition_of_fp32_groups'"),
        (lambda f: optim(f).pop("zero_stage"), r"has no 'zero_stage': it is not of ZeRO"),
        (
            lambda f: optim(f)["optimizer_state_dict"]["param_groups"][0].update(step=5),
            r"different numbers of updates \{4\} and \{5\}",
        ),
        (drop_moment, r"different optimizer state"),
        (cut_flat, r"weight, group 0 has 11 elements per rank, and its parameters 12"),
        (lambda f: f[MODEL_1].update(global_steps=10), r"different global_steps 9 and 10"),
        (lambda f: f[MODEL_1].update(mp_world_size=2), r"is of 2 tensor-parallel ranks, and .* has 1"),
        (lambda f: f[MODEL_1]["param_shapes"][0].popitem(), r"different param_shapes"),
        (
            lambda f: f[MODEL_1].update(param_shapes=None),
            r"has no 'param_shapes': it was saved without",
        ),
        (lambda f: f[MODEL_1].update(param_shapes=[3]), r"not built as DeepSpeed 0\.19 builds its files"),
    ],
)
def test_files_that_are_not_of_one_checkpoint(edit: Callable[[Contents], Any], message: str, tmp_path: Path) -> None:
    files = stage3()
    open_deepspeed(save(tmp_path / "sound", files))
    edit(files)
    with pytest.raises(CheckpointError, match=message):
        open_deepspeed(save(tmp_path / "damaged", files))


def line_of(first: Tensor, second: Tensor) -> Contents:
    """Stage 1 on two ranks: `first` and `second` in a line, with DeepSpeed's `param_alignment` of 8 elements; one
    persistent buffer, one frozen parameter, names as a wrapper leaves them."""
    line = torch.cat([first, torch.full((8 - len(first),), torch.nan), second])
    files: Contents = {}
    for rank, part in enumerate(line.split(8)):
        files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {
            "optimizer_state_dict": {
                "zero_stage": 1,
                "partition_count": [2],
                "single_partition_of_fp32_groups": [part.clone()],
                "param_alignment_paddings": [[8 - len(first), 0]],
                # As "elastic" checkpoints have it.
                "base_optimizer_state": [{"exp_avg": 2 * part, "exp_avg_sq": 3 * part, "step": torch.tensor(6.0)}],
            }
        }
    files["mp_rank_00_model_states.pt"] = {
        "param_shapes": [{"module.dit.a": first.shape, "module.dit.b": torch.Size([7, 1])}],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "buffer_names": ["module.dit.seen"],
        "module": {"module.dit.a": torch.zeros(5), "module.dit.seen": torch.tensor(3), "module.dit.c": torch.ones(2)},
        "global_steps": 2,
    }
    return files


def test_a_line_with_padding_behind_every_parameter(tmp_path: Path) -> None:
    first, second = torch.arange(5.0), torch.arange(10.0, 17.0)
    source = open_deepspeed(save(tmp_path, line_of(first, second)))
    expected = {"dit.a": first, "dit.b": second.view(7, 1), "dit.c": torch.ones(2), "dit.seen": torch.tensor(3)}
    assert source.forms["weight"].keys() == expected.keys() and source.forms["exp_avg"].keys() == {"dit.a", "dit.b"}
    for name, value in expected.items():
        assert torch.equal(source.read("weight", name, whole(value.shape)), value)
    assert torch.equal(source.read("exp_avg_sq", "dit.b", Box((1, 0), (3, 1))), 3 * second.view(7, 1)[1:3])
    assert source.facts.optimizer_step == 6


@pytest.mark.parametrize(("length", "fits"), [(6, False), (7, True), (8, True)])
def test_a_line_of_another_length(length: int, fits: bool, tmp_path: Path) -> None:
    """It may be rounded up to a multiple of twice the ranks."""
    files = line_of(torch.arange(5.0), torch.ones(length))
    if fits:
        open_deepspeed(save(tmp_path, files))
        return
    with pytest.raises(CheckpointError, match=r"weight, group 0 has 14 elements, and its parameters 15; its files are"):
        open_deepspeed(save(tmp_path, files))


def test_a_line_of_twice_the_length(tmp_path: Path) -> None:
    files = line_of(torch.arange(5.0), torch.ones(8))
    flats = files[OPTIM_1]["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    flats[0] = flats[0].repeat(2)
    with pytest.raises(CheckpointError, match=r"weight, group 0 has 24 elements, and its parameters 15"):
        open_deepspeed(save(tmp_path, files))


@pytest.mark.parametrize(("length", "fits"), [(3, True), (4, False)])
def test_frozen_parts(length: int, fits: bool, tmp_path: Path) -> None:
    files = stage3()
    for rank in range(2):
        files[f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"] |= {
            "frozen_param_shapes": {"dit.frozen": torch.Size([5])},
            "frozen_param_fragments": {"dit.frozen": torch.arange(length * rank, length * rank + length).bfloat16()},
        }
    if fits:
        source = open_deepspeed(save(tmp_path, files))
        assert torch.equal(source.read("weight", "dit.frozen", Box((1,), (5,))), torch.arange(1, 5).bfloat16())
        assert "dit.frozen" not in source.forms["exp_avg"]
        return
    with pytest.raises(CheckpointError, match=r"dit\.frozen \[5\] has 4 elements; its files are of two"):
        open_deepspeed(save(tmp_path, files))


def test_a_language_model_keeps_the_second_name_of_a_tied_matrix(tmp_path: Path) -> None:
    files = stage3({"model.embed_tokens.weight": (6, 2)})
    for name in files:
        if "model_states" in name:
            files[name]["shared_params"] = {"lm_head.weight": "model.embed_tokens.weight"}
    source = open_deepspeed(save(tmp_path, files))
    assert source.naming == "llm" and source.forms["weight"].keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    expected = logical("model.embed_tokens.weight", (6, 2))
    assert torch.equal(source.read("weight", "lm_head.weight", whole((6, 2))), expected)


def two_tensor_parallel(parameters: Mapping[str, tuple[int, ...]]) -> Contents:
    return {**stage3(parameters, tp=0, tps=2), **stage3(parameters, tp=1, tps=2)}


def test_four_ranks_of_two_by_two(tmp_path: Path) -> None:
    name = "dit.blocks.0.attn.qkv.weight"
    source = open_deepspeed(save(tmp_path, two_tensor_parallel({name: (6, 3)})))
    parts = [logical(name, (6, 3), 1000 * rank).view(3, 2, 3) for rank in range(2)]
    assert torch.equal(source.read("weight", name, whole((12, 3))), torch.cat(parts, 1).view(12, 3))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"dit.blocks.0.attn.qkv.weight": (7, 2)}, r"qkv\.weight is \[7, 2\], \[7, 2\] on the .* no split of ours"),
        ({"dit.unknown.weight": (2, 2)}, r"dit\.unknown\.weight is no parameter of our model"),
        ({"model.embed_tokens.weight": (2, 2)}, r"is of 2 tensor-parallel ranks and not of our model"),
    ],
)
def test_parts_that_cannot_be_merged(parameters: Mapping[str, tuple[int, ...]], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_deepspeed(save(tmp_path, two_tensor_parallel(parameters)))


def test_ranks_that_drifted_apart(tmp_path: Path) -> None:
    source = open_deepspeed(save(tmp_path, two_tensor_parallel({"connector.bias": (3,), "dit.x_embed.bias": (2,)})))
    with pytest.raises(CheckpointError, match=r"connector\.bias of tensor-parallel rank 1 differs from rank 0's"):
        source.check()


def test_which_tag_is_read(tmp_path: Path) -> None:
    save(tmp_path / "global_step1", stage3())
    assert str(tmp_path / "global_step1") in open_source(tmp_path).what
    save(tmp_path / "global_step2", stage3())
    with pytest.raises(CheckpointError, match=r"has global_step1, global_step2 and no file 'latest'"):
        open_source(tmp_path)
    (tmp_path / "latest").write_text("global_step2\n")
    assert str(tmp_path / "global_step2") in open_source(tmp_path).what
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"names '\.\./elsewhere', and .* has global_step1, global_step2"):
        open_source(tmp_path)
