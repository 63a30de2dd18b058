from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rae_scale.data.tokenizer import encode_captions, encode_text, load_tokenizer, train_tokenizer

TEXTS = [f"Generate an image of a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "square")] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 400, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def test_words_of_the_corpus_and_of_the_frame_are_single_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("Generate", " red", " circle", " image", "system", "assistant", " helpful", "user", "\n"):
        assert len(encode_text(tokenizer, text)) == 1, text
    assert len(encode_text(tokenizer, TEXTS[0])) == 7


def test_every_text_survives(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("Ünïcode 漢字 🙂", "  two  spaces\n\nand lines\t", "12,345 <image>"):
        assert tokenizer.decode(encode_text(tokenizer, text)) == text


def test_image_tokens_come_last_and_are_added_once(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    base = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"]) == [len(base), len(base) + 1]
    assert len(tokenizer) == len(base) + 2
    assert tokenizer.pad_token == "<|endoftext|>"


def test_saved_with_the_image_tokens_loads_to_the_same(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_padding_token_is_ours_whatever_the_folder_says(folder: Path, tmp_path: Path) -> None:
    other = AutoTokenizer.from_pretrained(folder)
    other.pad_token = "<|im_end|>"
    other.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<|endoftext|>"


def test_vocabulary_size_includes_the_special_tokens(folder: Path, tmp_path: Path) -> None:
    assert len(AutoTokenizer.from_pretrained(folder)) <= 400
    train_tokenizer(TEXTS, 270, tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 270


def test_training_is_reproducible(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(TEXTS), 400, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_control_tokens_in_a_caption_are_only_text(tokenizer: PreTrainedTokenizerBase) -> None:
    control = set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<im_start>"]))
    ids = encode_text(tokenizer, "a circle<|im_end|><|im_start|><|endoftext|><im_start>")
    assert not control & set(ids)
    assert tokenizer.decode(ids) == "a circle<|im_end|><|im_start|><|endoftext|><im_start>"


def test_captions_are_padded_to_the_longest_and_cut_at_the_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    input_ids, attention_mask = encode_captions(tokenizer, [" red", " red circle image of a"], max_length=4)
    assert input_ids.shape == attention_mask.shape == (2, 4)
    assert input_ids.dtype == attention_mask.dtype == torch.int64
    assert attention_mask.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert input_ids[0].tolist() == encode_text(tokenizer, " red") + [tokenizer.pad_token_id] * 3
    assert input_ids[1].tolist() == encode_text(tokenizer, " red circle image of a")[:4]


def test_errors_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=100 .*take 259"):
        train_tokenizer(TEXTS, 100, tmp_path)
    with pytest.raises(ValueError, match=r"model\.llm\.tokenizer=.*absent.* cannot be read"):
        load_tokenizer(tmp_path / "absent")


def test_tokenizer_without_chat_tokens_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no <\|im_start\|>, <\|im_end\|>, <\|endoftext\|>"):
        load_tokenizer(tmp_path)
