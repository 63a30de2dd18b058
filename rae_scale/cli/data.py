"""`rae-scale data`: build shards and look at them, draw the shapes world, train a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rae_scale.cli import data_adapters, data_build, data_latents, data_look

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rae_scale.data.record import Sample

app = typer.Typer(no_args_is_help=True, help="Build training data and look at it.")

Out = Annotated[Path, typer.Option("--out", help="New folder.")]


app.command("build")(data_build.build)
app.command("merge")(data_build.merge)
app.command("adapters")(data_adapters.adapters)
app.command("inspect")(data_look.inspect)
app.command("verify")(data_look.verify)
app.command("stats")(data_look.stats)
app.command("preview")(data_look.preview)
app.command("latents")(data_latents.latents)


@app.command()
def tokenizer(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help=".tar or .jsonl files, or MDS folders.")],
    out: Out,
    vocab_size: Annotated[int, typer.Option(help="Entries, the 256 bytes and the control tokens included.")] = 512,
    prompt_template: Annotated[
        str | None, typer.Option(help="Human turn of a captioned image; default: that of data.prompt_template.")
    ] = None,
) -> None:
    """Train a small tokenizer of Qwen2's kind on the texts of a data set (for models trained from nothing)."""
    from rae_scale.config.schema import DataConfig
    from rae_scale.data.tokenizer import train_tokenizer

    if out.exists():
        raise ValueError(f"--out {out} exists; choose a new folder, or remove it first")
    template = prompt_template or DataConfig().prompt_template
    texts = (turn.value for path in inputs for sample in samples_of(path) for turn in sample.conversation(template))
    # Under another name until it is whole: what a killed run leaves is not taken for a tokenizer.
    partial = out.with_name(f"{out.name}.partial")
    train_tokenizer(texts, vocab_size, partial)
    partial.rename(out)
    print(f"{out}: tokenizer with {vocab_size} entries")


def samples_of(path: Path) -> Iterator[Sample]:
    """The readable samples of an input file or an MDS folder."""
    from rae_scale.data.mds_reader import MDSReader
    from rae_scale.data.sources import Source

    if path.is_dir():
        yield from MDSReader(path)
    else:
        yield from (item.sample for item in Source(path) if item.sample is not None)


def parse_weight(text: str) -> tuple[str, float]:
    task, _, weight = text.partition("=")
    try:
        return task, float(weight)
    except ValueError:
        raise ValueError(f"--task-weight {text!r}: write it as TASK=WEIGHT, for example colors=2") from None


@app.command()
def shapes(
    out: Annotated[Path, typer.Option("--out", help="Folder of the tars.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Which stream of pictures.")] = 0,
    size: Annotated[int, typer.Option(min=32, help="Side of a picture in pixels.")] = 64,
    task_weight: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=WEIGHT", help="How often a task's captions come, relative to the others; repeat."),
    ] = None,
) -> None:
    """Draw captioned pictures of the shapes world as webdataset tars."""
    from rae_scale.data.shapes.tars import write_tars
    from rae_scale.data.shapes.world import TASK_WEIGHTS, WorldConfig

    weights = {**TASK_WEIGHTS, **dict(parse_weight(text) for text in task_weight or [])}
    paths = write_tars(out, count, seed, WorldConfig(size=size, task_weights=weights))
    print(f"{out}: {count:,} pictures in {len(paths)} tars")
