"""Conversations as token sequences: Qwen's ChatML, with an image as a run of slots (paper figure 3).

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\nGenerate an image of a red circle<|im_end|>\\n
    <|im_start|>assistant\\nHere you go:\\n<im_start>[T slots]<im_end><|im_end|>\\n

`<image>` in a turn becomes the slots between `<im_start>` and `<im_end>`, in the user's turn (an image to understand)
as in the assistant's (one to generate): whose turn it stands in tells the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rae_scale.data.record import ANSWER_WITH_IMAGE, IMAGE_PLACEHOLDER, Turn
from rae_scale.data.tokenizer import IMAGE_END, IMAGE_START, SYSTEM_PROMPT, TURN_END, TURN_START, encode_text
from rae_scale.models.packing import IGNORE_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLOT_ID = 0  # any valid id: the model overwrites the slots
ROLES = {"human": "user", "gpt": "assistant"}


class SampleTooLong(ValueError):
    """A conversation that does not fit `data.max_seq_len`."""


@dataclass(frozen=True)
class TokenizedSample:
    """One conversation. `labels` align with `input_ids`, -100 where nothing is to be learned."""

    input_ids: list[int]
    labels: list[int]
    answer_start: int
    """First slot of the image to generate; -1 if there is none."""
    user_start: int
    """First slot of the image to understand; -1 if there is none."""


class ChatTokenizer:
    """Turns conversations into token sequences.

    By default the labels are what the assistant has to produce: the text of its turns, the `<im_start>` that begins an
    image, the `<im_end>` that follows it, and the `<|im_end|>` that ends the turn. `label_markup` also labels every
    newline, `<|im_start|>` and `<|im_end|>` of all turns, as the official release does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int,
        max_seq_len: int,
        *,
        label_markup: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.max_seq_len = max_seq_len
        ids = tokenizer.convert_tokens_to_ids([TURN_START, TURN_END, IMAGE_START, IMAGE_END])
        self.turn_start, self.turn_end, self.image_start, self.image_end = ids
        self.newline = encode_text(tokenizer, "\n")
        self.header_length = {role: len(encode_text(tokenizer, f"{role}\n")) for role in ("system", *ROLES.values())}
        self.markup = {self.turn_start, self.turn_end, *self.newline} if label_markup else set()

    def encode(self, turns: Sequence[Turn], has_image: bool) -> TokenizedSample:
        """Encode a conversation that has one image (`has_image`) or none.

        An image that no turn mentions goes in front of the first turn.

        Raises:
            SampleTooLong: more than `max_seq_len` tokens.
            ValueError: no turn, nothing but white space, or not as many `<image>` as images.
        """
        if not any(turn.value.strip() for turn in turns):
            raise ValueError("the conversation is empty: it has no turn with any text; drop the sample")
        values = place_image([turn.value for turn in turns], has_image)
        sequence = Sequencer(self)
        sequence.turn("system", SYSTEM_PROMPT)
        for turn, value in zip(turns, values, strict=True):
            sequence.turn(ROLES[turn.role], value)
        length = len(sequence.input_ids)
        if length > self.max_seq_len:
            raise SampleTooLong(
                f"the conversation has {length} tokens, more than data.max_seq_len={self.max_seq_len}; raise it or "
                "drop the sample"
            )
        return sequence.sample()

    def encode_prompt(self, prompt: str, prompt_template: str) -> TokenizedSample:
        """The request for an image of `prompt`, up to and including the slots and `<im_end>`: what sampling needs.

        `prompt_template` holds `{caption}`, as in training. Labels are all ignored. Errors as in `encode`.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty; describe the image")
        turns = [Turn("human", prompt_template.replace("{caption}", prompt)), Turn("gpt", ANSWER_WITH_IMAGE)]
        sample = self.encode(turns, has_image=True)
        end = sample.answer_start + self.num_image_tokens + 1
        return TokenizedSample(sample.input_ids[:end], [IGNORE_LABEL] * end, sample.answer_start, sample.user_start)


class Sequencer:
    """A token sequence under construction."""

    def __init__(self, chat: ChatTokenizer) -> None:
        self.chat = chat
        self.input_ids: list[int] = []
        self.labels: list[int] = []
        self.image_at = {"user": -1, "assistant": -1}

    def turn(self, role: str, value: str) -> None:
        """Append one whole turn, its closing newline included."""
        chat, learned = self.chat, role == "assistant"
        self.append([chat.turn_start], learned=False)
        before, *after_image = value.split(IMAGE_PLACEHOLDER)
        # Encoded with its role, as one text: merging happens across the newline between them.
        ids = encode_text(chat.tokenizer, f"{role}\n{before}")
        header_length = chat.header_length[role]
        self.append(ids[:header_length], learned=False)
        self.append(ids[header_length:], learned=learned)
        for text in after_image:
            self.image(role, learned)
            self.append(encode_text(chat.tokenizer, text), learned=learned)
        self.append([chat.turn_end], learned=learned)
        self.append(chat.newline, learned=False)

    def image(self, role: str, learned: bool) -> None:
        """Append the slots of the image between their two tokens."""
        chat = self.chat
        self.append([chat.image_start], learned=learned)
        self.image_at[role] = len(self.input_ids)
        self.input_ids += [SLOT_ID] * chat.num_image_tokens
        self.labels += [IGNORE_LABEL] * chat.num_image_tokens
        self.append([chat.image_end], learned=learned)

    def append(self, ids: list[int], *, learned: bool) -> None:
        self.input_ids += ids
        self.labels += [token if learned or token in self.chat.markup else IGNORE_LABEL for token in ids]

    def sample(self) -> TokenizedSample:
        return TokenizedSample(self.input_ids, self.labels, self.image_at["assistant"], self.image_at["user"])


def place_image(values: list[str], has_image: bool) -> list[str]:
    """The turns' texts with exactly one `<image>` among them, or none. ValueError if theirs are not as many."""
    mentions = sum(value.count(IMAGE_PLACEHOLDER) for value in values)
    if mentions > has_image:
        raise ValueError(
            f"the conversation mentions {mentions} images ({IMAGE_PLACEHOLDER}) but the sample holds {int(has_image)}; "
            "at most one image belongs to a sample: drop the sample or the surplus placeholders"
        )
    if mentions < has_image:
        return [f"{IMAGE_PLACEHOLDER}\n{values[0]}", *values[1:]]
    return values
