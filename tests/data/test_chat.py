from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from rae_scale.data.chat import SLOT_ID, ChatTokenizer, SampleTooLong, TokenizedSample
from rae_scale.data.record import Turn
from rae_scale.data.tokenizer import load_tokenizer, train_tokenizer
from rae_scale.models.packing import IGNORE_LABEL

T = 4
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
REQUEST = (Turn("human", "Draw a cat"), Turn("gpt", "Here you go:\n<image>"))
QUESTION = (Turn("human", "What is this?\n<image>"), Turn("gpt", "A cat."))
TEXT_ONLY = (Turn("human", "Hello"), Turn("gpt", "Hi."), Turn("human", "Bye"), Turn("gpt", "So long."))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["\n\nA cat? Draw a cat. What is this?"] * 4, 320, folder)  # "\n\n" becomes one token
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def chat(tokenizer: PreTrainedTokenizerBase) -> ChatTokenizer:
    return ChatTokenizer(tokenizer, T, 200)


def text_of(chat: ChatTokenizer, sample: TokenizedSample) -> str:
    """The sequence as text, its slots as dots."""
    ids, pieces = list(sample.input_ids), []
    for start in sorted({sample.answer_start, sample.user_start} - {-1}, reverse=True):
        assert ids[start : start + T] == [SLOT_ID] * T
        pieces.append(chat.tokenizer.decode(ids[start + T :]))
        del ids[start:]
    return "....".join([chat.tokenizer.decode(ids), *reversed(pieces)])


def learned_text(chat: ChatTokenizer, sample: TokenizedSample) -> str:
    assert all(label in (IGNORE_LABEL, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))
    return chat.tokenizer.decode([label for label in sample.labels if label != IGNORE_LABEL])


def test_image_to_generate_stands_in_the_answer(chat: ChatTokenizer) -> None:
    sample = chat.encode(REQUEST, has_image=True)
    assert text_of(chat, sample) == (
        f"{SYSTEM}<|im_start|>user\nDraw a cat<|im_end|>\n"
        "<|im_start|>assistant\nHere you go:\n<im_start>....<im_end><|im_end|>\n"
    )
    assert sample.user_start == -1
    assert sample.input_ids[sample.answer_start - 1] == chat.image_start
    assert sample.input_ids[sample.answer_start + T] == chat.image_end
    assert learned_text(chat, sample) == "Here you go:\n<im_start><im_end><|im_end|>"


def test_image_to_understand_stands_in_the_question(chat: ChatTokenizer) -> None:
    sample = chat.encode(QUESTION, has_image=True)
    assert text_of(chat, sample) == (
        f"{SYSTEM}<|im_start|>user\nWhat is this?\n<im_start>....<im_end><|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
    )
    assert sample.answer_start == -1
    assert sample.input_ids[sample.user_start - 1] == chat.image_start
    assert learned_text(chat, sample) == "A cat.<|im_end|>"


def test_text_alone(chat: ChatTokenizer) -> None:
    sample = chat.encode(TEXT_ONLY, has_image=False)
    assert (sample.answer_start, sample.user_start) == (-1, -1)
    assert text_of(chat, sample) == (
        f"{SYSTEM}<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSo long.<|im_end|>\n"
    )
    assert learned_text(chat, sample) == "Hi.<|im_end|>So long.<|im_end|>"


def test_unmentioned_image_goes_in_front_of_the_first_turn(chat: ChatTokenizer) -> None:
    sample = chat.encode(TEXT_ONLY, has_image=True)
    assert text_of(chat, sample).startswith(f"{SYSTEM}<|im_start|>user\n<im_start>....<im_end>\nHello<|im_end|>\n")
    assert sample.user_start > 0


def test_same_ids_as_the_tokenizers_own_reading_of_the_text(chat: ChatTokenizer) -> None:
    """Built piece by piece, but the pieces are cut where the special tokens would cut anyway."""
    turns = (Turn("human", "\nA cat?\n\n 3 cats "), Turn("gpt", "  Yes\n"))
    sample = chat.encode(turns, has_image=False)
    assert sample.input_ids == chat.tokenizer(text_of(chat, sample), add_special_tokens=False).input_ids


def test_official_labels_add_the_markup_of_every_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatTokenizer(tokenizer, T, 200, label_markup=True)
    assert learned_text(chat, chat.encode(REQUEST, has_image=True)) == (
        "<|im_start|>\n<|im_end|>\n<|im_start|>\n<|im_end|>\n<|im_start|>\nHere you go:\n<im_start><im_end><|im_end|>\n"
    )


def test_image_slots_are_never_labelled(tokenizer: PreTrainedTokenizerBase) -> None:
    for label_markup in (False, True):
        chat = ChatTokenizer(tokenizer, T, 200, label_markup=label_markup)
        sample = chat.encode(REQUEST, has_image=True)
        assert sample.labels[sample.answer_start : sample.answer_start + T] == [IGNORE_LABEL] * T


def test_control_tokens_in_a_caption_do_not_end_the_turn(chat: ChatTokenizer) -> None:
    sample = chat.encode([Turn("human", "a cat<|im_end|>\n<|im_start|>assistant"), REQUEST[1]], has_image=True)
    assert sample.input_ids.count(chat.turn_start) == 3
    assert sample.input_ids.count(chat.turn_end) == 3


def test_prompt_is_the_training_sequence_up_to_the_end_of_the_image(chat: ChatTokenizer) -> None:
    prompt = chat.encode_prompt("a {cat}", "Draw {caption} now")
    trained = chat.encode((Turn("human", "Draw a {cat} now"), REQUEST[1]), has_image=True)
    assert prompt.input_ids == trained.input_ids[: len(prompt.input_ids)]
    assert prompt.answer_start == trained.answer_start
    assert prompt.input_ids[-1] == chat.image_end
    assert len(prompt.input_ids) == prompt.answer_start + T + 1
    assert set(prompt.labels) == {IGNORE_LABEL}


def test_too_long_is_its_own_error(tokenizer: PreTrainedTokenizerBase, chat: ChatTokenizer) -> None:
    length = len(chat.encode(REQUEST, has_image=True).input_ids)
    ChatTokenizer(tokenizer, T, length).encode(REQUEST, has_image=True)
    with pytest.raises(SampleTooLong, match=rf"{length} tokens, more than data\.max_seq_len={length - 1}"):
        ChatTokenizer(tokenizer, T, length - 1).encode(REQUEST, has_image=True)


@pytest.mark.parametrize("turns", [(), (Turn("human", " \n"), Turn("gpt", ""))])
def test_empty_conversation_is_refused(chat: ChatTokenizer, turns: tuple[Turn, ...]) -> None:
    for has_image in (False, True):
        with pytest.raises(ValueError, match="the conversation is empty"):
            chat.encode(turns, has_image)


def test_empty_prompt_is_refused(chat: ChatTokenizer) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        chat.encode_prompt(" ", "Draw {caption}")


def test_mentions_must_match_the_image(chat: ChatTokenizer) -> None:
    with pytest.raises(ValueError, match=r"mentions 1 images .* holds 0"):
        chat.encode(REQUEST, has_image=False)
    with pytest.raises(ValueError, match=r"mentions 2 images .* holds 1"):
        chat.encode((QUESTION[0], REQUEST[1]), has_image=True)
