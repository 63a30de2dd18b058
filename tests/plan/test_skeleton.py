"""The skeleton is the trained module in all that plans and layouts read off it, and computes what that computes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rae_scale.config import Config
from rae_scale.data.tokenizer import load_tokenizer, train_tokenizer
from rae_scale.engines.zero_gathers import Call, record_calls
from rae_scale.models import llm_zoo
from rae_scale.models.composite import build_scale_rae
from rae_scale.models.llm_zoo import LLM_ZOO
from rae_scale.models.packing import TextLayout
from rae_scale.parallel import blocks_of
from rae_scale.plan.hollow import NoValues
from rae_scale.plan.qwen2 import build_planned_llm
from rae_scale.plan.skeleton import planned_module, tokens_of
from rae_scale.plan.trace import without_values
from rae_scale.train.layout import build_module


def config_of(name: str, llm: str, **llm_settings: Any) -> Config:
    return Config.model_validate({"model": {"name": name, "llm": {"name": llm, **llm_settings}}})


CONFIGS = {
    "tiny": config_of("dit-tiny", "qwen2-tiny"),
    "demo, tied": config_of("dit-demo", "qwen2-demo"),
    "frozen": config_of("dit-demo", "qwen2-demo", train=False),
    "query block": config_of("dit-tiny", "qwen2-tiny", mask="query-block"),
    "published": config_of("dit-9.8b-ddt", "qwen2.5-7b", connector="mlp"),
}


def described(module: nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype, bool, str]]:
    return [
        (name, tuple(p.shape), p.dtype, p.requires_grad, p.device.type)
        for name, p in module.named_parameters(remove_duplicate=False)
    ]


@pytest.mark.parametrize("which", CONFIGS)
def test_parameters_are_those_of_the_trained_module(which: str) -> None:
    config = CONFIGS[which]
    ours, group_of = planned_module(config)
    theirs, their_group = build_module(config)
    assert described(ours) == described(theirs)
    # Tied ones are listed once.
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [(n, b.shape) for n, b in ours.named_buffers()] == [(n, b.shape) for n, b in theirs.named_buffers()]
    names = [name for name, _ in ours.named_parameters()]
    assert [group_of(name) for name in names] == [their_group(name) for name in names]


def sample(module: Any, length: int = 24) -> dict[str, Any]:
    dit = module.dit.cfg
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(200, (2, length), generator=generator)
    latents = torch.randn(2, 2, dit.num_tokens, dit.in_channels, generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = 0
    return {
        "input_ids": ids,
        "labels": ids.where(mask.bool(), -100),
        "attention_mask": mask,
        "answer_start": torch.tensor([2, -1]),
        "user_start": torch.tensor([-1, 3]),
        "user_features": latents[0],
        "x_t": latents[1],
        "t": torch.tensor([0.2, 0.7]),
        "drop": torch.tensor([False, True]),
    }


def tree_of(call: Call) -> Any:
    return call.parameters, call.checkpointed, call.backwards, call.enters, [tree_of(child) for child in call.children]


def last_saved(call: Call) -> Iterator[tuple[str, ...] | None]:
    yield None if call.last_saved is None else call.last_saved.parameters
    for child in call.children:
        yield from last_saved(child)


@pytest.mark.parametrize("which", ["tiny", "demo, tied", "frozen"])
def test_modules_are_called_as_in_the_trained_module(which: str) -> None:
    """DeepSpeed gathers by these calls."""

    def record(build: Callable[[Config], Any]) -> Call:
        module = build(CONFIGS[which])[0]
        without_values(module)
        with NoValues():
            arguments = sample(module)
            layout = TextLayout((24, 21), tuple(range(20)))
            return record_calls(module, lambda it: it(**arguments, layout=layout), blocks_of(module))

    ours, theirs = record(planned_module), record(build_module)
    assert tree_of(ours) == tree_of(theirs)
    assert list(last_saved(ours)) == list(last_saved(theirs))


@pytest.mark.parametrize("mask", ["causal", "query-block"])
@pytest.mark.parametrize("bf16", [False, True])
def test_it_computes_the_same_bits(mask: str, bf16: bool) -> None:
    model = config_of("dit-tiny", "qwen2-tiny", mask=mask).model
    torch.manual_seed(0)
    theirs = build_scale_rae(model, 16, 16, 211)
    ours = build_scale_rae(model, 16, 16, 211, build_planned_llm)
    ours.load_state_dict(theirs.state_dict())

    def trained(module: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = module(**sample(module))
        (output.velocity.square().sum() + output.text_loss_sum).backward()
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        return [output.velocity, output.text_loss_sum, *grads]

    for one, other in zip(trained(ours), trained(theirs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("stage", ["encoder", "decoder", "pretrain"])
def test_every_stage_with_its_tokenizer(tmp_path: Path, stage: str) -> None:
    train_tokenizer(["a red circle", "two blue squares"], 280, tmp_path / "tokenizer")
    config = Config.model_validate(
        {
            "stage": stage,
            "model": {
                "name": "dit-demo",
                "llm": {"name": "qwen2-demo", "tokenizer": str(tmp_path / "tokenizer")},
                "encoder": {"name": "siglip-demo"},
                "decoder": {"name": "vit-tiny"},
            },
        }
    )
    ours, group_of = planned_module(config)
    theirs, their_group = build_module(config)
    assert described(ours) == described(theirs)
    assert {group_of(n) for n, _ in ours.named_parameters()} == {their_group(n) for n, _ in theirs.named_parameters()}
    length = len(load_tokenizer(tmp_path / "tokenizer"))
    assert tokens_of(tmp_path / "tokenizer") == length
    if stage != "decoder":
        assert any(length in parameter.shape for parameter in ours.parameters())


def test_a_tokenizer_that_has_the_image_tokens_is_not_given_them_twice(tmp_path: Path) -> None:
    train_tokenizer(["a red circle"], 270, tmp_path / "plain")
    tokenizer = load_tokenizer(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokens_of(tmp_path / "saved") == tokens_of(tmp_path / "plain") == len(tokenizer)


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match="not a named language model"):
        planned_module(config_of("dit-tiny", "qwen9"))
    with pytest.raises(ValueError, match="only the demo's is trained"):
        planned_module(Config.model_validate({"stage": "encoder"}))
    with pytest.raises(ValueError, match="choose the decoder made for this encoder"):
        planned_module(Config.model_validate({"stage": "decoder", "model": {"decoder": {"name": "vit-tiny"}}}))


def test_no_import_of_transformers_or_deepspeed() -> None:
    code = (
        "import sys, rae_scale.plan.skeleton as s\nfrom rae_scale.config import Config\n"
        "s.planned_module(Config())\nprint([name for name in ('transformers', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_other_rows_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(llm_zoo.LLM_ZOO, "qwen2-odd", replace(LLM_ZOO["qwen2-tiny"], vocab_size=211))
    module: Any = planned_module(config_of("dit-tiny", "qwen2-odd"))[0]
    assert module.conditioner.llm.config.vocab_size == len(module.conditioner.llm.lm_head.weight) == 211
