"""`rae-scale data`: build and look into shards, draw the shapes world, train a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rae_scale.data.inspect import InspectReport
    from rae_scale.data.record import Sample

app = typer.Typer(no_args_is_help=True, help="Build and inspect training data.")

Out = Annotated[Path, typer.Option("--out", help="New folder.")]


@app.command()
def build(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Webdataset .tar or .jsonl files.")],
    out: Out,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Size of a shard.")] = 128,
    verify: Annotated[
        Literal["decode", "header"], typer.Option(help="decode: decode every image once; header: only read its size.")
    ] = "decode",
) -> None:
    """Turn tars or JSON lines into MDS shards. What cannot be used is listed, with its reason, in rejected.jsonl."""
    from rae_scale.data.build import REJECTED_NAME
    from rae_scale.data.build import build as build_shards

    report = build_shards(inputs, out, shard_bytes=shard_megabytes * 2**20, verify=verify)
    print(f"{out}: {report.written:,} samples in {report.shards} shards, {report.bytes / 2**20:,.1f} MiB")
    if report.rejected:
        print(f"rejected {report.rejected.total():,} of {report.read:,}, each listed in {out / REJECTED_NAME}:")
        print_counts(report.rejected.most_common())
    for path, reason in report.damaged.items():
        print(f"damaged: {path}: {reason}")


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A .tar, a .jsonl, or a folder of MDS shards.")],
) -> None:
    """Show what is in a tar, a JSON lines file or a folder of shards."""
    from rae_scale.data.inspect import inspect as inspect_path

    print_report(inspect_path(path))


def print_report(report: InspectReport) -> None:
    shards = f" in {report.shards} shards" if report.shards else ""
    print(f"{report.path}: {report.kind}, {report.samples:,} samples{shards}, {report.bytes / 2**20:,.1f} MiB")
    if report.damage:
        print(f"damaged: {report.damage}")
    if report.examined < report.samples:
        print(f"examined {report.examined:,} of them, evenly spaced:")
    if report.kind != "mds":
        print_counts(report.layouts.most_common())
    print_counts([(f"{name} images", count) for name, count in report.image_formats.most_common()])
    print_counts(
        [("text only", report.text_only), ("conversations", report.conversations), ("captions", report.captions)]
    )
    print_counts([(f"rejected: {reason}", count) for reason, count in report.rejected.most_common()])
    spreads = {
        "caption length": report.caption_length,
        "image width": report.width,
        "image height": report.height,
        "image bytes": report.image_bytes,
    }
    for name, spread in spreads.items():
        if spread is not None:
            print(f"  {name}: {spread.least:,.0f} to {spread.most:,.0f}, median {spread.median:,.0f}")
    for preview in report.previews:
        print(f"  {preview.key}  [{preview.image}]  {preview.text[:100]}")


def print_counts(counts: Iterable[tuple[str, int]]) -> None:
    for name, count in counts:
        if count:
            print(f"  {count:>12,}  {name}")


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
