from __future__ import annotations

import pickle

import numpy as np
import pytest
from tiny_world import TinyWorld, make_sample

from rae_scale.data.chat import ChatTokenizer
from rae_scale.data.record import BadSample, DecodedSample, Sample, Turn
from rae_scale.data.tokenizer import load_tokenizer
from rae_scale.train.batches import CaptionBatches, ConversationBatches, ImageBatches


@pytest.fixture(scope="module")
def conversations(world: TinyWorld) -> ConversationBatches:
    chat = ChatTokenizer(load_tokenizer(world.tokenizer), num_image_tokens=16, max_seq_len=128)
    return ConversationBatches(chat, "Generate an image of {caption}", image_size=4)


def decoded(sample: Sample, index: int = 0) -> DecodedSample:
    pixels = None if sample.image is None else np.full((4, 4, 3), 51, dtype=np.uint8)
    return DecodedSample(index, f"data:{index}:{sample.key}", sample, pixels)


def test_a_batch_of_conversations(conversations: ConversationBatches) -> None:
    samples = [make_sample(number) for number in (0, 3, 7)]  # generated, understood, text alone
    batch = conversations.collate([conversations.prepare(decoded(s, 5 + i)) for i, s in enumerate(samples)])
    assert [start >= 0 for start in batch.answer_start.tolist()] == [True, False, False]
    assert [start >= 0 for start in batch.user_start.tolist()] == [False, True, False]
    assert batch.has_image.tolist() == [True, True, False]
    assert (batch.pixels[0] == 51).all() and not batch.pixels[2].any()
    assert batch.sample_index.tolist() == [5, 6, 7]
    assert batch.sample_ids[0] == "data:5:sample-0" and batch.captions[0] == "a red picture"


def test_makers_of_batches_travel_to_workers(conversations: ConversationBatches) -> None:
    copy = pickle.loads(pickle.dumps(conversations))
    sample = decoded(make_sample(0))
    assert copy.prepare(sample).tokens == conversations.prepare(sample).tokens


def test_a_conversation_that_cannot_be_used_says_why(conversations: ConversationBatches) -> None:
    long = Sample("k", None, (), (Turn("human", "word " * 200), Turn("gpt", "yes")))
    with pytest.raises(BadSample, match=r"too long: .*data.max_seq_len=128"):
        conversations.prepare(decoded(long))
    with pytest.raises(BadSample, match="bad conversation"):
        conversations.prepare(decoded(Sample("k", None, (), (Turn("human", "<image>"), Turn("gpt", "yes")))))


def test_image_stages_need_images_and_captions(world: TinyWorld) -> None:
    images, pairs = ImageBatches(4), CaptionBatches(4, load_tokenizer(world.tokenizer), max_length=6)
    uncaptioned = Sample("k", b"image", (), (Turn("human", "<image>"), Turn("gpt", "yes")))
    batch = images.collate([images.prepare(decoded(uncaptioned))])
    assert batch.input_ids.shape == (1, 0) and batch.pixels.shape == (1, 4, 4, 3)
    with pytest.raises(BadSample, match="no caption"):
        pairs.prepare(decoded(uncaptioned))
    with pytest.raises(BadSample, match="no image"):
        images.prepare(decoded(make_sample(7)))


def test_captions_are_tokens_without_a_conversation(world: TinyWorld) -> None:
    tokenizer = load_tokenizer(world.tokenizer)
    maker = CaptionBatches(4, tokenizer, max_length=6)
    samples = [Sample("a", b"image", ("a red picture",)), Sample("b", b"image", ("a red picture " * 9,))]
    batch = maker.collate([maker.prepare(decoded(sample)) for sample in samples])
    assert batch.input_ids.shape == (2, 6) and batch.attention_mask[1].all()
    length = int(batch.attention_mask[0].sum())
    assert tokenizer.decode(batch.input_ids[0, :length]) == "a red picture"
    assert (batch.labels == -100).all()
