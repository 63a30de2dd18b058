"""`from rae_scale import RaeScale`: a model in two lines, from a folder or the Hugging Face hub.

A thin face of `TextToImage`: it finds the folder, and deals in prompts and PIL images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from rae_scale.infer.load import Weights
from rae_scale.infer.pipeline import Precision, TextToImage
from rae_scale.infer.published import is_hub_id

if TYPE_CHECKING:
    import torch


class RaeScale:
    """A trained text-to-image model.

    >>> model = RaeScale.from_pretrained("path/or/owner-name")
    >>> image = model.generate("a red circle above a blue square", seed=0)
    """

    def __init__(self, pipeline: TextToImage) -> None:
        self.pipeline = pipeline

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        weights: Weights = None,
        decoder: str | Path | None = None,
        revision: str | None = None,
    ) -> RaeScale:
        """Load a model that draws.

        path: a folder made by `rae-scale convert --to hf`, an exported folder, a checkpoint or a run folder; or, where
            no such folder exists, the hub's owner/name of the first kind, which is downloaded into the hub's cache.
        device: auto, cpu or cuda.
        dtype: None (float32 weights, computing on a GPU as the model was trained), "float32" or "bfloat16".
        weights: "ema" or "raw" of a checkpoint that has both; None takes the moving average where there is one.
        decoder: folder of other decoder weights.
        revision: branch, tag or commit on the hub.

        Raises:
            ValueError: nothing is there, it is damaged, it lacks what is asked for, or it draws no pictures.
        """
        return cls(
            TextToImage.from_checkpoint(
                local_folder(path, revision), weights=weights, decoder=decoder, device=device, dtype=precision(dtype)
            )
        )

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 16,
    ) -> Image.Image | list[Image.Image]:
        """Draw. The same weights, prompt, seed and settings give the same picture.

        seed: of each prompt's first picture, one for all or one for each; a prompt's next has seed + 1.
        steps, guidance: None takes the settings that the model was trained with.
        batch_size: pictures made at once.

        Returns one image for one prompt (a str, num_images_per_prompt=1), else a list, prompt after prompt.

        Raises:
            ValueError: an empty or too long prompt, another number of seeds than of prompts, or a number out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        for name, number in (("num_images_per_prompt", num_images_per_prompt), ("batch_size", batch_size)):
            if number < 1:
                raise ValueError(f"{name}={number}: give 1 or more")
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed, or one for each prompt")
        numbers = range(num_images_per_prompt)
        pictures = self.pipeline.generate(
            [text for text in prompts for _ in numbers],
            [first + number for first in seeds for number in numbers],
            self.pipeline.sampler(steps=steps, guidance=guidance),
            batch_size=batch_size,
        )
        images = [Image.fromarray(picture) for picture in pictures]
        return images[0] if isinstance(prompt, str) and num_images_per_prompt == 1 else images


def local_folder(path: str | Path, revision: str | None) -> Path:
    """`path`, or the hub's repository of that name, downloaded (or already in the cache)."""
    if Path(path).exists() or not is_hub_id(str(path)):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for the hub, and {path} is no repository there; leave it out")
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision))
    except (OSError, ValueError) as error:  # what the hub's client raises is one of these
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path}: there is no such folder, and the hub gave no repository of that name ({reason}); give a folder, "
            "or owner/name as the hub spells it"
        ) from error


def precision(dtype: str | torch.dtype | None) -> Precision:
    """`dtype`, which may be torch's own, as the pipeline spells it."""
    if dtype is None:
        return None
    match str(dtype).removeprefix("torch."):
        case "float32":
            return "float32"
        case "bfloat16":
            return "bfloat16"
    raise ValueError(f"dtype={str(dtype)!r}: models are run in float32 or bfloat16; choose one of them")
