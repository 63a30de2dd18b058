from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from rae_scale.config.schema import LLMConfig
from rae_scale.models.conditioner import IGNORE_LABEL, Conditioner
from rae_scale.models.llm_zoo import LLM_ZOO, build_llm, resize_vocabulary
from rae_scale.models.packing import TextLayout, next_tokens

T, C = 4, 6  # image tokens and their channels


def make_conditioner(mask: str = "causal", seed: int = 0) -> Conditioner:
    torch.manual_seed(seed)
    llm = build_llm(LLMConfig(name="qwen2-tiny"), None)
    return Conditioner(llm, num_queries=T, user_channels=C, mask=mask)


def make_batch(length: int = 14) -> dict[str, Tensor]:
    """A generating, an understanding and a text-only sample; the last is shorter by three."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 300, (3, length), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[2, -3:] = 0
    labels = input_ids.clone()
    labels[:, :6] = IGNORE_LABEL
    labels[2, -3:] = IGNORE_LABEL
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "answer_start": torch.tensor([5, -1, -1]),
        "user_start": torch.tensor([-1, 3, -1]),
        "user_features": torch.randn(3, T, C, generator=generator),
        "labels": labels,
    }


def test_matches_the_language_model_run_on_one_sample_by_hand() -> None:
    conditioner, batch = make_conditioner(), make_batch()
    out = conditioner(**batch)
    embeds = conditioner.llm.model.embed_tokens(batch["input_ids"])
    embeds[0, 5 : 5 + T] = conditioner.latent_queries
    embeds[1, 3 : 3 + T] = conditioner.mm_projector(batch["user_features"][1])
    ends = [14, 14, 11]
    hidden = [
        conditioner.llm.model(inputs_embeds=embeds[i : i + 1, :end]).last_hidden_state[0] for i, end in enumerate(ends)
    ]
    loss = sum(
        F.cross_entropy(conditioner.llm.lm_head(h)[:-1], batch["labels"][i, 1:end], reduction="sum")
        for i, (h, end) in enumerate(zip(hidden, ends, strict=True))
    )
    torch.testing.assert_close(out.query_states[0], hidden[0][5 : 5 + T], rtol=0, atol=2e-6)
    assert torch.equal(out.query_states[1:], torch.zeros(2, T, 48))
    torch.testing.assert_close(out.text_loss_sum, loss, rtol=1e-6, atol=0)


def padded_run(conditioner: Conditioner, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same without packing: transformers' Qwen2 on the padded batch, with a mask, and logits everywhere."""
    ids, starts = batch["input_ids"], [batch[name].tolist() for name in ("answer_start", "user_start")]
    embeds = conditioner.llm.model.embed_tokens(ids)
    user = conditioner.mm_projector(batch["user_features"])
    visible = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & batch["attention_mask"].bool()[:, None]
    rows = []
    for row, (answer, given) in enumerate(zip(*starts, strict=True)):
        parts = embeds[row]
        for start, values in ((given, user[row]), (answer, conditioner.latent_queries)):
            if start >= 0:
                parts = torch.cat([parts[:start], values, parts[start + T :]])
        rows.append(parts)
        if answer >= 0 and conditioner.mask == "query-block":
            visible[row, answer : answer + T, answer : answer + T] = True
    hidden = conditioner.llm.model(
        inputs_embeds=torch.stack(rows), attention_mask={"full_attention": visible[:, None]}, use_cache=False
    ).last_hidden_state
    states = [
        hidden[row, start : start + T] if start >= 0 else torch.zeros_like(hidden[row, :T])
        for row, start in enumerate(starts[0])
    ]
    logits = conditioner.llm.lm_head(hidden).float().flatten(0, 1)
    loss = F.cross_entropy(logits, next_tokens(batch["labels"]).flatten(), ignore_index=IGNORE_LABEL, reduction="sum")
    return torch.stack(states), loss


@pytest.mark.parametrize("mask", ["causal", "query-block"])
@pytest.mark.parametrize("layout", ["given", "from the tensors"])
def test_packed_computes_what_a_padded_run_does(mask: str, layout: str) -> None:
    """States, loss, and the gradient of everything."""
    conditioner, batch = make_conditioner(mask).double(), make_batch()
    batch["user_features"] = batch["user_features"].double()
    given = TextLayout.of(batch["attention_mask"], batch["labels"]) if layout == "given" else None
    weight = torch.randn(3, T, 48, dtype=torch.float64)
    gradients = []
    for states, loss in (conditioner(**batch, layout=given), padded_run(conditioner, batch)):
        parameters = dict(conditioner.named_parameters())
        total = (states * weight).sum() + loss
        gradients.append((states, loss, torch.autograd.grad(total, list(parameters.values()))))
    (packed_states, packed_loss, packed), (states, loss, plain) = gradients
    torch.testing.assert_close(packed_states, states, rtol=0, atol=1e-6)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=0)
    for name, ours, theirs in zip(parameters, packed, plain, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=3e-6 * scale + 1e-9, msg=lambda text, name=name: name + text
        )


class NoWaiting(TorchDispatchMode):
    """Fails where a tensor's values decide sizes or Python values: on a GPU the host would wait for them."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not func._schema.name.startswith(self.WAITING) or "nonzero_static" in func._schema.name, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", ["causal", "query-block"])
def test_the_host_never_waits_when_it_knows_the_layout(mask: str) -> None:
    conditioner, batch = make_conditioner(mask), make_batch()
    layout = TextLayout.of(batch["attention_mask"], batch["labels"])
    with NoWaiting():
        out = conditioner(**batch, layout=layout)
        (out.query_states.sum() + out.text_loss_sum).backward()
    with pytest.raises(AssertionError), NoWaiting():
        conditioner(**batch)


def test_the_language_model_runs_on_real_tokens_only() -> None:
    conditioner, batch = make_conditioner(), make_batch()
    shapes = []
    conditioner.llm.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: shapes.append(output.shape)
    )
    conditioner(**batch)
    assert shapes == [(1, 14 + 14 + 11, 48)]


def test_positions_begin_anew_with_each_sample() -> None:
    """Rotary embedding knows differences only, so no result shows it; but in float32 late positions are less exact."""
    conditioner, batch = make_conditioner(), make_batch()
    seen = []
    hook = conditioner.llm.model.register_forward_pre_hook
    hook(lambda module, inputs, named: seen.append(named["position_ids"].tolist()), with_kwargs=True)
    conditioner(**batch)
    assert seen == [[[*range(14), *range(14), *range(11)]]]


def test_padding_changes_nothing() -> None:
    conditioner, batch = make_conditioner(), make_batch()
    padded = {name: value.clone() for name, value in batch.items()}
    for name, fill in (("input_ids", 7), ("attention_mask", 0), ("labels", IGNORE_LABEL)):
        padded[name] = F.pad(batch[name], (0, 5), value=fill)
    a, b = conditioner(**batch), conditioner(**padded)
    torch.testing.assert_close(a.query_states, b.query_states, rtol=0, atol=2e-6)
    torch.testing.assert_close(a.text_loss_sum, b.text_loss_sum, rtol=1e-6, atol=0)


def test_padding_on_the_left_is_not_seen() -> None:
    """The mask is honoured, not assumed: tokens that it hides have no influence."""
    conditioner, batch = make_conditioner(), make_batch()
    batch["attention_mask"][0, :2] = 0
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, :2] = 299
    a, b = conditioner(**batch).query_states, conditioner(**changed).query_states
    assert torch.equal(a, b)


@pytest.mark.parametrize(("mask", "sees_later_queries"), [("causal", False), ("query-block", True)])
def test_mask_decides_whether_a_query_sees_later_queries(mask: str, sees_later_queries: bool) -> None:
    conditioner, batch = make_conditioner(mask), make_batch()
    before = conditioner(**batch).query_states[0]
    with torch.no_grad():
        conditioner.latent_queries[-1] += 1.0
    after = conditioner(**batch).query_states[0]
    assert (not torch.equal(before[0], after[0])) == sees_later_queries
    assert not torch.equal(before[-1], after[-1])


def test_query_block_does_not_see_the_text_behind_it() -> None:
    conditioner, batch = make_conditioner("query-block"), make_batch()
    before = conditioner(**batch).query_states
    batch["input_ids"][0, 5 + T :] = 1
    assert torch.equal(before, conditioner(**batch).query_states)
    batch["input_ids"][0, 0] = 1
    assert not torch.equal(before, conditioner(**batch).query_states)


def test_every_part_has_a_gradient_whatever_the_samples_hold() -> None:
    """Sharded engines wait for each parameter's gradient on every rank, zero or not."""
    conditioner, batch = make_conditioner(), make_batch()
    for present in (True, False):
        if not present:
            none = torch.full((3,), -1)
            batch |= {"answer_start": none, "user_start": none, "labels": torch.full_like(batch["labels"], -100)}
        conditioner.zero_grad()
        out = conditioner(**batch)
        (out.query_states.square().sum() + out.text_loss_sum).backward()
        for name, parameter in conditioner.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()) == present, name


def watched_head(conditioner: Conditioner) -> list[int]:
    """The numbers of rows that the output layer is given from here on."""
    calls: list[int] = []
    conditioner.llm.lm_head.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    return calls


def test_unlabelled_batch_has_zero_loss_and_still_runs_the_head() -> None:
    conditioner = make_conditioner()
    calls = watched_head(conditioner)
    loss = conditioner.text_loss_sum(torch.randn(8, 48, requires_grad=True), torch.full((8,), IGNORE_LABEL), 0)
    loss.backward()
    assert calls == [1]
    assert loss.item() == 0.0
    assert not conditioner.llm.lm_head.weight.grad.any()


def test_logits_exist_only_at_labelled_positions() -> None:
    conditioner = make_conditioner()
    calls = watched_head(conditioner)
    labels = torch.tensor([[3, -100, 4, 5], [-100, -100, -100, 6]])  # nothing predicts the label of the first position
    loss = conditioner.text_loss_sum(torch.randn(8, 48), next_tokens(labels).flatten(), 3)
    assert calls == [3]
    assert loss.dtype == torch.float32


def test_head_is_called_once_however_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    conditioner, batch = make_conditioner(), make_batch()
    calls = watched_head(conditioner)
    whole = conditioner(**batch).text_loss_sum
    monkeypatch.setattr(sys.modules["rae_kernels.linear_cross_entropy"], "LOGITS_BYTES", 3 * 320 * 4)
    in_chunks = conditioner(**batch).text_loss_sum
    torch.testing.assert_close(in_chunks, whole)
    assert calls == [21, 21]


def test_no_labels_no_head() -> None:
    conditioner, batch = make_conditioner(), make_batch()
    conditioner.llm.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    labels = batch.pop("labels")
    assert conditioner(**batch).text_loss_sum.item() == 0.0
    assert labels is not None


def test_query_initialisation_has_the_scale_of_the_release() -> None:
    torch.manual_seed(0)
    llm = build_llm(LLMConfig(name="qwen2-demo"), None)
    queries = Conditioner(llm, num_queries=256, user_channels=C).latent_queries
    assert queries.shape == (256, 128)
    assert queries.std().item() == pytest.approx(128**-0.5, rel=0.02)


@pytest.mark.parametrize(("name", "parameters"), [("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512)])
def test_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        llm = build_llm(LLMConfig(name=name, path="never/read/on/meta"), None)
    assert sum(parameter.numel() for parameter in llm.parameters()) == parameters


def test_rope_base_reaches_the_model() -> None:
    """transformers 4 and 5 spell it differently in the config, and 10,000 is their default."""
    llm = build_llm(LLMConfig(name="qwen2-tiny"), None)
    head_dim = 48 // 4
    torch.testing.assert_close(llm.model.rotary_emb.inv_freq, 1e6 ** -(torch.arange(0, head_dim, 2) / head_dim))


def test_vocabulary_follows_the_tokenizer() -> None:
    llm = build_llm(LLMConfig(name="qwen2-demo"), 300)
    assert llm.lm_head.weight.shape == (300, 128)
    assert llm.lm_head.weight is llm.model.embed_tokens.weight  # tied


@pytest.mark.parametrize("vocab_size", [310, 330])
def test_loaded_vocabulary_is_resized_and_new_rows_are_the_mean(tmp_path, vocab_size: int) -> None:
    torch.manual_seed(0)
    source = build_llm(LLMConfig(name="qwen2-tiny"), None)
    source.save_pretrained(tmp_path)
    llm = build_llm(LLMConfig(name="qwen2-tiny", path=str(tmp_path)), vocab_size)
    kept = min(vocab_size - 2, 320)
    for layer, old in (
        (llm.model.embed_tokens, source.model.embed_tokens),
        (llm.lm_head, source.lm_head),
    ):
        assert layer.weight.shape == (vocab_size, 48)
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight[:kept], old.weight[:kept])
        torch.testing.assert_close(layer.weight[-2:], layer.weight[:-2].mean(0).expand(2, -1))
    assert not torch.equal(llm.lm_head.weight, llm.model.embed_tokens.weight)


def test_loaded_vocabulary_of_the_right_length_is_left_alone() -> None:
    torch.manual_seed(0)
    llm = build_llm(LLMConfig(name="qwen2-tiny"), None)
    before = llm.lm_head.weight.clone()
    resize_vocabulary(llm, 320)
    assert torch.equal(llm.lm_head.weight, before)


def test_errors_name_the_setting(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"model\.llm\.name='qwen3' .*qwen2-tiny"):
        build_llm(LLMConfig(name="qwen3"), None)
    with pytest.raises(ValueError, match=r"model\.llm\.path=.*no weights could be read"):
        build_llm(LLMConfig(name="qwen2-tiny", path=str(tmp_path / "absent")), None)
    build_llm(LLMConfig(name="qwen2-tiny"), None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.llm\.path=.*\(48, 2, 4\).*'qwen2-demo'"):
        build_llm(LLMConfig(name="qwen2-demo", path=str(tmp_path)), None)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    build_llm(LLMConfig(name="qwen2-tiny"), None).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors.*layers\.1\.mlp\.up_proj\.weight"):
        build_llm(LLMConfig(name="qwen2-tiny", path=str(tmp_path)), None)


def test_zoo_names_dimensions_as_hugging_face_does() -> None:
    for spec in LLM_ZOO.values():
        config = spec.to_qwen2()
        for field in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
            assert getattr(config, field) == getattr(spec, field)
