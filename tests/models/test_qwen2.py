"""transformers' Qwen2 by our operations, compared with itself before."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen2ForCausalLM

from rae_scale.models.llm_zoo import LLM_ZOO
from rae_scale.models.packed_llm import OutputLayer, run_packed
from rae_scale.models.qwen2 import FeedForward, Norm, use_our_operations
from rae_scale.ops import Sequences

LENGTHS = [5, 1, 8]


def make_llm(dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    llm = Qwen2ForCausalLM(LLM_ZOO["qwen2-tiny"].to_qwen2())
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return llm.to(dtype)


def test_layers_keep_their_parameters_and_are_ours() -> None:
    theirs = make_llm()
    ours = use_our_operations(copy.deepcopy(theirs))
    assert {name: p.shape for name, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    kinds = [type(part) for part in ours.modules()]
    assert (kinds.count(Norm), kinds.count(FeedForward), kinds.count(OutputLayer)) == (5, 2, 1)


def test_twice_is_once() -> None:
    llm = use_our_operations(make_llm())
    llm.model.layers[0].self_attn.packed_attention = replaced = object()
    kinds = [type(part) for part in llm.modules()]
    assert [type(part) for part in use_our_operations(llm).modules()] == kinds
    assert llm.model.layers[0].self_attn.packed_attention is replaced


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("part", ["layers.0.input_layernorm", "layers.1.mlp"])
def test_parts_compute_what_transformers_does(part: str, dtype: torch.dtype, tolerance: float) -> None:
    theirs = make_llm(dtype)
    ours = use_our_operations(copy.deepcopy(theirs))
    x = torch.randn(2, 7, 48).to(dtype).requires_grad_()
    results = []
    for llm in (theirs, ours):
        layer = llm.model.get_submodule(part)
        y = layer(x)
        weight = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
        results.append((y, *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])))
    for mine, other in zip(*reversed(results), strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * float(other.detach().abs().max()))


def test_packed_sequences_are_computed_as_each_alone() -> None:
    llm = make_llm()
    embeds = torch.randn(sum(LENGTHS) + 2, 48)
    alone = [llm.model(inputs_embeds=part[None]).last_hidden_state[0] for part in embeds[:-2].split(LENGTHS)]
    positions = torch.cat([torch.arange(length) for length in [*LENGTHS, 2]])
    packed = run_packed(use_our_operations(llm).model, embeds, positions, Sequences.of(LENGTHS))
    torch.testing.assert_close(packed[:-2], torch.cat(alone), rtol=0, atol=5e-6)
    assert packed[-2:].isfinite().all()


def test_a_call_without_packed_sequences_is_as_before() -> None:
    theirs = make_llm()
    ours = use_our_operations(copy.deepcopy(theirs))
    ids, mask = torch.randint(1, 300, (2, 6)), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    results = [llm(input_ids=ids, attention_mask=mask).logits[mask.bool()] for llm in (ours, theirs)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_no_mask_of_all_pairs_of_tokens_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.models.qwen2.modeling_qwen2.create_causal_mask", lambda **_: pytest.fail("a mask was made")
    )
    llm = use_our_operations(make_llm())
    run_packed(llm.model, torch.randn(14, 48), torch.arange(14), Sequences.of(LENGTHS))


def test_saved_config_names_no_attention_of_ours(tmp_path) -> None:
    """Whoever loads the folder without us would not find it."""
    use_our_operations(make_llm()).save_pretrained(tmp_path)
    assert "rae_scale" not in (tmp_path / "config.json").read_text()


def test_another_activation_is_refused() -> None:
    llm = make_llm()
    llm.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        use_our_operations(llm)
