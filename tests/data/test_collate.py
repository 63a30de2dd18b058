from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rae_scale.data.chat import TokenizedSample
from rae_scale.data.collate import Batch, collate, stack_images
from rae_scale.data.microbatch import MicroBatch

PAD = 9


def make_batch() -> Batch:
    samples = [
        TokenizedSample([1, 2, 3], [-100, 2, 3], answer_start=1, user_start=-1),
        TokenizedSample([4, 5, 6, 7, 8], [-100, -100, -100, 7, 8], answer_start=-1, user_start=2),
        TokenizedSample([4], [4], answer_start=-1, user_start=-1),
    ]
    image = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    return collate(
        samples,
        [image, image // 2, None],
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
    assert batch.pixels.shape == (3, 8, 8, 3)
    assert batch.pixels.dtype == torch.uint8
    assert torch.equal(batch.pixels[1], batch.pixels[0] // 2)
    assert not batch.pixels[2].any()
    assert batch.has_image.tolist() == [True, True, False]


def test_images_are_the_pixels_divided_by_255_bit_for_bit() -> None:
    batch = make_batch()
    images = batch.images()
    assert images.is_contiguous()
    assert torch.equal(images, batch.pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255.0))


def test_the_rows_of_one_array_are_stacked_without_a_copy() -> None:
    block = np.random.default_rng(0).integers(256, size=(3, 4, 4, 3), dtype=np.uint8)
    stacked = stack_images(list(block), 4)
    assert stacked.data_ptr() == block.ctypes.data and np.array_equal(stacked, block)


@pytest.mark.parametrize(
    "take",
    [
        lambda block: [block[1], block[0], block[2]],
        lambda block: [block[0], None, block[2]],
        lambda block: [None, block[1], block[2]],
        lambda block: list(block[:2]),
        lambda block: [block[0], block[1], block[2].copy()],
        lambda block: [block[0], block[1], block[2].swapaxes(0, 1)],
        lambda block: [row[:, ::-1] for row in block],
    ],
)
def test_what_is_not_just_the_rows_is_copied(take: Callable[[np.ndarray], list[np.ndarray | None]]) -> None:
    block = np.random.default_rng(0).integers(1, 256, size=(3, 4, 4, 3), dtype=np.uint8)
    images = take(block)
    stacked = stack_images(images, 4).numpy()
    assert not np.shares_memory(stacked, block)
    for row, image in zip(stacked, images, strict=True):
        assert np.array_equal(row, np.zeros((4, 4, 3)) if image is None else image)


def test_every_tensor_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(id(tensor)) or tensor)
    batch = make_batch()
    micro_batch = MicroBatch(batch, 3, []).pin_memory()
    assert sorted(pinned) == sorted(id(value) for value in vars(batch).values() if isinstance(value, torch.Tensor))
    assert micro_batch.batch is not None and micro_batch.batch.sample_ids == batch.sample_ids
    assert MicroBatch(None, 3, []).pin_memory().batch is None


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
