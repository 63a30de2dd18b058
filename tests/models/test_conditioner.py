from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rae_scale.config.schema import LLMConfig
from rae_scale.models.conditioner import IGNORE_LABEL, Conditioner, fill_slots, next_tokens, read_slots
from rae_scale.models.llm_zoo import LLM_ZOO, build_llm, resize_vocabulary

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


def test_fill_and_read_slots_are_inverse_and_leave_the_rest() -> None:
    embeds, values = torch.randn(3, 9, 5), torch.randn(3, T, 5)
    start, positions = torch.tensor([0, 5, -1]), torch.arange(9)
    filled = fill_slots(embeds, values, start, positions)
    assert torch.equal(filled[0, :T], values[0])
    assert torch.equal(filled[0, T:], embeds[0, T:])
    assert torch.equal(filled[1, 5:], values[1])
    assert torch.equal(filled[1, :5], embeds[1, :5])
    assert torch.equal(filled[2], embeds[2])
    read = read_slots(filled, T, start, positions)
    assert torch.equal(read[:2], values[:2])
    assert torch.equal(read[2], torch.zeros(T, 5))
    # In slices of the sequence: each fills and reads its own, and the sum is the whole.
    parts = [fill_slots(embeds[:, part], values, start, part) for part in positions.split(3)]
    assert torch.equal(torch.cat(parts, dim=1), filled)
    reads = [read_slots(filled[:, part], T, start, part) for part in positions.split(3)]
    assert torch.equal(sum(reads), read)


def test_read_slots_of_text_shorter_than_the_slots() -> None:
    states = read_slots(torch.randn(2, 2, 5), T, torch.tensor([-1, -1]), torch.arange(2))
    assert torch.equal(states, torch.zeros(2, T, 5))


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


def watched_head(conditioner: Conditioner) -> list[tuple[int, ...]]:
    """The shapes of what the output layer gives from here on."""
    calls: list[tuple[int, ...]] = []
    conditioner.llm.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(tuple(output.shape)))
    return calls


def test_unlabelled_batch_has_zero_loss_and_still_runs_the_head() -> None:
    conditioner = make_conditioner()
    calls = watched_head(conditioner)
    loss = conditioner.text_loss_sum(torch.randn(2, 4, 48, requires_grad=True), torch.full((2, 4), IGNORE_LABEL))
    loss.backward()
    assert [shape[0] for shape in calls] == [1]
    assert loss.item() == 0.0
    assert not conditioner.llm.lm_head.weight.grad.any()


def test_logits_exist_only_at_labelled_positions() -> None:
    conditioner = make_conditioner()
    calls = watched_head(conditioner)
    labels = torch.tensor([[3, -100, 4, 5], [-100, -100, -100, 6]])  # nothing predicts the label of the first position
    loss = conditioner.text_loss_sum(torch.randn(2, 4, 48), next_tokens(labels))
    assert [shape[0] for shape in calls] == [3]
    assert loss.dtype == torch.float32


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
