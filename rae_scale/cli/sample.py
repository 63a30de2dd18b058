"""`rae-scale sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rae_scale.cli.options import BatchSize, DecoderFolder, Device, Guidance, Method, Steps, Weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rae_scale.infer.grid import Picture

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def sample(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run folder (its newest checkpoint), checkpoint, export, or shared folder.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for pictures and samples.jsonl, or one picture file.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What to draw; repeat for more.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt per line.")] = None,
    num_per_prompt: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 1,
    seed: Annotated[
        int, typer.Option(min=0, max=2**62, help="Seed of each prompt's first picture; its next has seed + 1.")
    ] = 0,
    grid: Annotated[bool, typer.Option("--grid", help="Also write grid.png, every picture with its prompt.")] = False,
    batch_size: BatchSize = 16,
    weights: Weights = None,
    steps: Steps = None,
    guidance: Guidance = None,
    method: Method = None,
    decoder: DecoderFolder = None,
    device: Device = "auto",
) -> None:
    """Draw pictures of prompts. The same weights, prompt, seed and settings give the same picture.

    --out a/folder writes 00000.png, 00001.png, ... and samples.jsonl with each one's prompt and seed.
    --out a/file.png writes that one file: the picture, or the grid if there are several or --grid is given.
    """
    from rae_scale.infer.pipeline import TextToImage

    wanted = prompts_of(prompt or [], prompts_file)
    prompts = [text for text in wanted for _ in range(num_per_prompt)]
    seeds = [seed + number for _ in wanted for number in range(num_per_prompt)]
    pipeline = TextToImage.from_checkpoint(checkpoint, weights=weights, decoder=decoder, device=device)
    sampler = pipeline.sampler(steps=steps, guidance=guidance, method=method)
    pictures = list(pipeline.generate(prompts, seeds, sampler, batch_size=batch_size))
    if out.suffix.lower() in PICTURE_SUFFIXES:
        write_file(out, pictures, prompts, num_per_prompt, as_grid=grid or len(pictures) > 1)
    else:
        write_folder(out, pictures, prompts, seeds, num_per_prompt, with_grid=grid)


def prompts_of(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file, one per line that is not empty."""
    prompts = list(given)
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts-file {file}: not a UTF-8 text file ({error}); convert it to UTF-8") from None
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError('nothing to draw: give --prompt "a red circle" (repeatable) or --prompts-file FILE')
    return prompts


def write_file(out: Path, pictures: list[Picture], prompts: list[str], columns: int, *, as_grid: bool) -> None:
    from PIL import Image

    from rae_scale.infer.grid import labelled_grid

    out.parent.mkdir(parents=True, exist_ok=True)
    image = labelled_grid(pictures, prompts, grid_columns(columns)) if as_grid else Image.fromarray(pictures[0])
    image.save(out)
    print(f"{out}: {len(pictures)} pictures" if as_grid else str(out))


def write_folder(
    out: Path, pictures: list[Picture], prompts: list[str], seeds: list[int], columns: int, *, with_grid: bool
) -> None:
    from PIL import Image

    from rae_scale.infer.grid import labelled_grid

    out.mkdir(parents=True, exist_ok=True)
    with (out / "samples.jsonl").open("w", encoding="utf-8") as index:
        for number, (picture, prompt, seed) in enumerate(zip(pictures, prompts, seeds, strict=True)):
            name = f"{number:05d}.png"
            Image.fromarray(picture).save(out / name)
            index.write(json.dumps({"file": name, "prompt": prompt, "seed": seed}, ensure_ascii=False) + "\n")
    if with_grid:
        labelled_grid(pictures, prompts, grid_columns(columns)).save(out / "grid.png")
    print(f"{out}: {len(pictures)} pictures{', grid.png' if with_grid else ''}, samples.jsonl")


def grid_columns(num_per_prompt: int) -> int | None:
    """One row per prompt when each has several pictures, or else about a square."""
    return num_per_prompt if num_per_prompt > 1 else None
