"""`rae-scale data inspect | verify | stats | preview`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rae_scale.cli.data_report import print_inspected, print_stats, print_verified

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rae_scale.data.looking.sheet import Tile

Data = Annotated[str, typer.Argument(metavar="PATH", help="A folder of shards, a URL of one, a .tar or a .jsonl.")]
Shards = Annotated[
    str, typer.Argument(metavar="PATH", help="A folder of shards, or a URL of one (s3://, gs://, https://).")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]


def inspect(path: Data) -> None:
    """Show what is in a tar, a JSON lines file, a folder of shards, or a build that is not done."""
    from rae_scale.data.looking.inspect import inspect as inspect_path

    print_inspected(inspect_path(path))


def verify(
    path: Shards,
    decode: Annotated[bool, typer.Option("--decode", help="Also decode every image.")] = False,
    workers: Workers = 1,
    shards: Annotated[
        str | None,
        typer.Option(metavar="i/N", help="Every N-th shard and unit from number i on, for arrays of jobs."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File for the report as JSON.")] = None,
) -> None:
    """Read all of a data set: shards against their hashes, each row, manifests against the index. Status 1: damaged."""
    from rae_scale.data.build import Part
    from rae_scale.data.looking.verify import verify as verify_path

    report = verify_path(path, decode=decode, workers=workers, part=Part.parse(shards or "0/1", "--shards"))
    if out is not None:
        write_json(out, report.as_json())
    print_verified(report)
    if report.problems:
        raise typer.Exit(1)


def stats(
    path: Data,
    count: Annotated[
        int | None, typer.Option(min=1, help="Samples that are examined, evenly spaced (10,000).", show_default=False)
    ] = None,
    complete: Annotated[bool, typer.Option("--all", help="Examine all samples.")] = False,
    workers: Workers = 1,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub name, to count tokens of captions.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for stats.json and stats.png.")] = None,
    tensorboard: Annotated[Path | None, typer.Option("--tensorboard", help="Folder for TensorBoard.")] = None,
) -> None:
    """Show how image sizes, aspects, captions and formats are distributed, and what was rejected and why."""
    from rae_scale.data.looking.stats import DEFAULT_COUNT
    from rae_scale.data.looking.stats import stats as stats_of

    if complete and count is not None:
        raise ValueError(f"--all examines all samples, and --count {count} of them; give one of the two")
    few = DEFAULT_COUNT if count is None else count
    found = stats_of(path, count=None if complete else few, tokenizer=tokenizer, workers=workers)
    print_stats(found)
    if out is not None:
        from rae_scale.data.looking.plots import save_png

        write_json(out / "stats.json", found.as_json())
        save_png(found, out / "stats.png")
        print(f"{out}: stats.json, stats.png")
    if tensorboard is not None:
        from rae_scale.data.looking.plots import save_tensorboard

        save_tensorboard(found, tensorboard)
        print(f"{tensorboard}: for tensorboard --logdir")


def preview(
    path: Annotated[
        str | None, typer.Argument(metavar="[PATH]", help="A folder of shards, a URL of one, a .tar or a .jsonl.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="PNG file; further pages are numbered.")] = Path("preview.png"),
    count: Annotated[int, typer.Option(min=1, help="Pictures.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Which pictures, of PATH.")] = 0,
    config: Annotated[
        Path | None, typer.Option(help="Instead of PATH: a run file, to see what --step of that run trains on.")
    ] = None,
    step: Annotated[int | None, typer.Option(min=1, help="As the log counts: 1 is the first.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Wins over --config; repeat for more.")
    ] = None,
    side: Annotated[int, typer.Option(min=16, help="Pixels of a picture's place.")] = 192,
    columns: Annotated[int, typer.Option(min=1, help="Pictures in a row.")] = 8,
    caption_lines: Annotated[int, typer.Option(min=1, help="Lines of a caption.")] = 8,
    font: Annotated[
        list[Path] | None, typer.Option(help="Font file for scripts that the machine's fonts lack; repeat for more.")
    ] = None,
) -> None:
    """Draw pictures with their captions on a sheet: some of a data set, or those of a training step."""
    from rae_scale.data.looking.fonts import Fonts
    from rae_scale.data.looking.sheet import write_sheets

    fonts = Fonts(12, font or ())
    tiles = chosen_tiles(path, count, seed, config, step, setting or [])
    written = write_sheets(tiles, out, fonts, side=side, columns=columns, caption_lines=caption_lines)
    if not written:
        raise ValueError(f"{path}: holds no samples to show")
    print("\n".join(map(str, written)))
    if fonts.missing:
        print(
            f"no font here has {''.join(sorted(fonts.missing)[:20])!r}: they are written as their codes, like "
            "[6F22]; give a font that has them with --font"
        )


def chosen_tiles(
    path: str | None, count: int, seed: int, config: Path | None, step: int | None, settings: list[str]
) -> Iterator[Tile]:
    if (path is None) == (config is None):
        raise ValueError("give either PATH, or --config with --step")
    if (config is None) != (step is None) or (settings and config is None):
        raise ValueError("--config, --step and --set belong together: --config configs/run/demo.yaml --step 100")
    if path is not None:
        from rae_scale.data.looking.preview import tiles_of

        return tiles_of(path, count, seed)
    from rae_scale.config import load_config
    from rae_scale.train.seen import tiles_of_step

    assert config is not None and step is not None
    return tiles_of_step(load_config(config, settings), step, count)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
