"""Text to image: what a picture depends on, what it does not, and where models are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rae_scale.infer.export import export
from rae_scale.infer.pipeline import TextToImage
from rae_scale.state import latest_checkpoint
from tests.infer.trained import STEPS, Trained

PROMPTS = ["a red picture", "a blue picture with a longer text", "green"]
SEEDS = [5, 6, 5]


@pytest.fixture(scope="module")
def pipeline(trained: Trained) -> TextToImage:
    return TextToImage.from_checkpoint(trained.run, device="cpu")


def test_pictures_are_uint8_and_as_large_as_the_encoders(pipeline: TextToImage) -> None:
    pictures = pipeline.generate(PROMPTS, SEEDS)
    assert pictures.dtype == np.uint8
    assert pictures.shape == (3, 16, 16, 3)
    assert pictures.std() > 0
    assert pipeline.image_size == 16


def test_the_same_prompt_seed_and_settings_give_the_same_picture(pipeline: TextToImage) -> None:
    assert np.array_equal(pipeline.generate(PROMPTS, SEEDS), pipeline.generate(PROMPTS, SEEDS))


def test_seed_and_prompt_change_the_picture(pipeline: TextToImage) -> None:
    first, other_seed, other_prompt = pipeline.generate(["red", "red", "blue"], [1, 2, 1])
    assert not np.array_equal(first, other_seed)
    assert not np.array_equal(first, other_prompt)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_picture_does_not_depend_on_its_batch(pipeline: TextToImage, batch_size: int) -> None:
    together = pipeline.generate(PROMPTS, SEEDS).astype(int)
    apart = pipeline.generate(PROMPTS, SEEDS, batch_size=batch_size).astype(int)
    reversed_ = pipeline.generate(PROMPTS[::-1], SEEDS[::-1])[::-1].astype(int)
    # Sums in another order may round to the neighbouring level.
    assert np.abs(together - apart).max() <= 1
    assert np.abs(together - reversed_).max() <= 1


def test_guidance_leaves_the_null_vector_for_the_unconditional_branch(pipeline: TextToImage) -> None:
    unconditional = pipeline.generate(["red", "blue"], [1, 1], pipeline.sampler(guidance=0.0))
    assert np.array_equal(*unconditional)
    conditional = pipeline.generate(["red"], [1], pipeline.sampler(guidance=1.0))
    guided = pipeline.generate(["red"], [1], pipeline.sampler(guidance=3.0))
    assert not np.array_equal(conditional, guided)
    assert not np.array_equal(conditional[0], unconditional[0])


def test_settings_that_are_not_given_are_the_runs(pipeline: TextToImage) -> None:
    assert pipeline.sampler() == pipeline.config.sampler
    assert pipeline.sampler(steps=None, guidance=7.0).guidance == 7.0
    assert pipeline.sampler(guidance=7.0).steps == STEPS
    more = pipeline.generate(["red"], [1], pipeline.sampler(steps=STEPS + 3))
    assert not np.array_equal(more, pipeline.generate(["red"], [1]))


def test_run_checkpoint_and_export_give_the_same_picture(
    trained: Trained, pipeline: TextToImage, tmp_path: Path
) -> None:
    expected = pipeline.generate(["red"], [1])
    for source in (latest_checkpoint(trained.run), export(trained.run, tmp_path / "export")):
        assert source is not None
        assert np.array_equal(TextToImage.from_checkpoint(source, device="cpu").generate(["red"], [1]), expected)


def test_the_moving_average_is_drawn_with_unless_raw_weights_are_asked_for(
    trained: Trained, pipeline: TextToImage
) -> None:
    default = pipeline.generate(["red"], [1])
    ema = TextToImage.from_checkpoint(trained.run, weights="ema", device="cpu").generate(["red"], [1])
    raw = TextToImage.from_checkpoint(trained.run, weights="raw", device="cpu").generate(["red"], [1])
    assert np.array_equal(default, ema)
    assert not np.array_equal(default, raw)


def test_another_decoder_can_be_given(trained: Trained, pipeline: TextToImage, tmp_path: Path) -> None:
    other = export(trained.decoder_run, tmp_path / "bf16", dtype="bfloat16")
    drawn = TextToImage.from_checkpoint(trained.run, decoder=other, device="cpu").generate(["red"], [1])
    assert not np.array_equal(drawn, pipeline.generate(["red"], [1]))


def test_a_checkpoint_of_another_stage_is_refused(trained: Trained) -> None:
    with pytest.raises(ValueError, match="stage=decoder, which draws no pictures"):
        TextToImage.from_checkpoint(trained.decoder_run, device="cpu")


def test_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing does not exist; give a run folder"):
        TextToImage.from_checkpoint(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no complete checkpoint yet"):
        TextToImage.from_checkpoint(tmp_path)


def test_every_prompt_needs_its_seed(pipeline: TextToImage) -> None:
    with pytest.raises(ValueError, match="1 prompts and 2 seeds"):
        pipeline.generate(["red"], [1, 2])
    with pytest.raises(ValueError, match="0 prompts"):
        pipeline.generate([], [])


def test_an_empty_prompt_is_refused(pipeline: TextToImage) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        pipeline.generate(["  "], [1])
