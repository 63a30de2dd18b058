"""Tokenizers: Qwen's from a folder or the hub, and small ones of the same kind trained for the demo."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PADDING = "<|endoftext|>"
IMAGE_START = "<im_start>"
IMAGE_END = "<im_end>"

SYSTEM_PROMPT = "You are a helpful assistant."

# How Qwen2 cuts text into words before byte-pair encoding.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a Qwen-type tokenizer from a folder or a hub id and add `<im_start>` and `<im_end>`, if it lacks them.

    ValueError if it cannot be read or has no ChatML tokens.
    """
    from transformers import AddedToken, AutoTokenizer

    try:
        # Without this the library asks on the terminal whether to run the Python files that a folder may bring along.
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError) as error:  # a path that is no valid hub id either is a ValueError
        raise ValueError(
            f"model.llm.tokenizer={str(path)!r} cannot be read ({str(error).strip().splitlines()[0]}); give a folder "
            "that holds tokenizer.json, or a hub id"
        ) from error
    missing = [token for token in (TURN_START, TURN_END, PADDING) if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(
            f"model.llm.tokenizer={str(path)!r} has no {', '.join(missing)}; conversations are written in Qwen's chat "
            "format, so use a Qwen2.5 tokenizer or one made by train_tokenizer"
        )
    added = [AddedToken(token, special=True, normalized=False) for token in (IMAGE_START, IMAGE_END)]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.pad_token = PADDING
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_dir: str | Path) -> None:
    """Train a byte-level BPE tokenizer of Qwen2's kind on `texts` and write it to the folder `out_dir`.

    The frame of a conversation is learned along with the texts, so that it costs few tokens. The same texts give the
    same tokenizer. ValueError if `vocab_size` does not even hold the 256 bytes and the special tokens.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = (PADDING, TURN_START, TURN_END)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(special)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} holds no words: bytes and special tokens take {smallest}; raise it")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special), initial_alphabet=sorted(alphabet), show_progress=False
    )
    frame = f"system\n{SYSTEM_PROMPT}", "user\n", "assistant\nHere you go:\n"
    tokenizer.train_from_iterator([*texts, *frame], trainer)
    # After the words, as in Qwen2.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TURN_END, pad_token=PADDING).save_pretrained(out_dir)


def encode_captions(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int
) -> tuple[Tensor, Tensor]:
    """Captions alone, without a conversation around them, for the contrastive encoder's text tower.

    Returns input_ids and attention_mask, int64 [B, L], right padded to the longest, which is cut at `max_length`.
    """
    ids = [encode_text(tokenizer, caption)[:max_length] for caption in captions]
    length = max(map(len, ids))
    input_ids = torch.full((len(ids), length), tokenizer.pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, caption_ids in enumerate(ids):
        input_ids[row, : len(caption_ids)] = torch.tensor(caption_ids)
        attention_mask[row, : len(caption_ids)] = 1
    return input_ids, attention_mask


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text`, in which the spelling of a control token is only text.

    Captions come from the web: one that contains `<|im_end|>` must not end its turn. One text a call, since a list
    would start threads, which do not survive the fork of a data loader.
    """
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
