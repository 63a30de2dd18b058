from __future__ import annotations

import torch

from rae_scale.data.chat import TokenizedSample
from rae_scale.data.collate import Batch, collate

PAD = 9


def make_batch() -> Batch:
    samples = [
        TokenizedSample([1, 2, 3], [-100, 2, 3], answer_start=1, user_start=-1),
        TokenizedSample([4, 5, 6, 7, 8], [-100, -100, -100, 7, 8], answer_start=-1, user_start=2),
        TokenizedSample([4], [4], answer_start=-1, user_start=-1),
    ]
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    return collate(
        samples,
        [image, image / 2, None],
        image_size=8,
        pad_id=PAD,
        sample_index=[7, 2**40, 0],
        sample_ids=["a", "b", "c"],
        captions=["x", "y", ""],
    )


def test_pads_on_the_right_to_the_longest() -> None:
    batch = make_batch()
    assert len(batch) == 3
    assert batch.input_ids.tolist() == [[1, 2, 3, PAD, PAD], [4, 5, 6, 7, 8], [4, PAD, PAD, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[-100, 2, 3, -100, -100], [-100, -100, -100, 7, 8], [4, -100, -100, -100, -100]]
    assert batch.answer_start.tolist() == [1, -1, -1]
    assert batch.user_start.tolist() == [-1, 2, -1]
    assert batch.sample_index.tolist() == [7, 2**40, 0]
    for name in ("input_ids", "attention_mask", "labels", "answer_start", "user_start", "sample_index"):
        assert getattr(batch, name).dtype == torch.int64, name


def test_absent_images_are_blank_and_marked() -> None:
    batch = make_batch()
    assert batch.pixels.shape == (3, 3, 8, 8)
    assert batch.pixels.dtype == torch.float32
    assert torch.equal(batch.pixels[1], batch.pixels[0] / 2)
    assert not batch.pixels[2].any()
    assert batch.has_image.tolist() == [True, True, False]


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = make_batch()
    moved = batch.to("meta")
    assert all(value.is_meta for value in vars(moved).values() if isinstance(value, torch.Tensor))
    assert (moved.sample_ids, moved.captions) == (["a", "b", "c"], ["x", "y", ""])
    assert not batch.pixels.is_meta


def test_to_keeps_on_the_host_what_the_device_would_have_to_be_asked_for() -> None:
    layout = make_batch().to("meta").layout
    assert layout is not None
    assert layout.lengths == (3, 5, 1)
    assert layout.labelled == (0, 1, 5, 6)
    assert make_batch().to("meta").to("meta").layout == layout
