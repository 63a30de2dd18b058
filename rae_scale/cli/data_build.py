"""`rae-scale data build` and `data merge`: tars and JSON lines to a folder of MDS shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rae_scale.data.build import BuildOptions, BuildReport, Done, Unit

DEFAULT_NEAR_DISTANCE = 4


def build(
    out: Annotated[Path, typer.Option("--out", help="Folder of the data set.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[INPUT]...", help="Webdataset .tar, .tar.gz or .jsonl files, or a .json that lists tars."
        ),
    ] = None,
    input_list: Annotated[
        Path | None, typer.Option("--list", help="File with more inputs, a path per line (relative: to its folder).")
    ] = None,
    adapter: Annotated[
        str, typer.Option(help="How the corpus keeps its samples; auto sees it from the files.")
    ] = "auto",
    adapter_option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Option of the adapter; repeat.")
    ] = None,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Size of a shard.")] = 128,
    verify: Annotated[
        Literal["decode", "header"] | None,
        typer.Option(help="decode (default): decode every image once; header: only read its size."),
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Refuse images with more pixels, before decoding.")] = None,
    min_size: Annotated[int | None, typer.Option(help="Refuse images whose shorter side has fewer pixels.")] = None,
    max_aspect: Annotated[float | None, typer.Option(help="Refuse images longer than this times their width.")] = None,
    max_caption_length: Annotated[int | None, typer.Option(help="Refuse longer captions, in characters.")] = None,
    exif_transpose: Annotated[
        bool, typer.Option("--exif-transpose", help="Turn images as their EXIF data say.")
    ] = False,
    resize: Annotated[int | None, typer.Option(help="Shrink larger images to this shorter side, in pixels.")] = None,
    reencode: Annotated[
        Literal["jpeg", "png", "webp"] | None, typer.Option(help="Write every image in this format.")
    ] = None,
    quality: Annotated[int | None, typer.Option(help="Of the JPEG and WebP files that are written anew (95).")] = None,
    dedup: Annotated[
        Literal["off", "exact", "near"], typer.Option(help="Leave out equal images, or also nearly equal ones.")
    ] = "off",
    near_distance: Annotated[
        int | None, typer.Option(help=f"Of 64 bits, how many may differ with near ({DEFAULT_NEAR_DISTANCE}).")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Input files at a time; default: one per core, or what Ray has.")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Processes of this machine, or a Ray cluster (RAY_ADDRESS).")
    ] = "local",
    units: Annotated[
        str | None, typer.Option(metavar="I/N", help="Build only part I (from 0) of N; then `data merge` is needed.")
    ] = None,
    check_inputs: Annotated[
        bool, typer.Option("--check-inputs", help="Hash the inputs of what is there already, whatever their dates.")
    ] = False,
) -> None:
    """Turn tars or JSON lines into MDS shards. What is left out is listed, with its reason, in rejected.jsonl.

    Each input file becomes a folder in --out. The same command again goes on where one that was killed has stopped.
    """
    from rae_scale.data.build import BuildOptions, Part
    from rae_scale.data.build import build as build_shards
    from rae_scale.data.manifests import expand_inputs
    from rae_scale.data.prepare import PrepareOptions

    paths = expand_inputs([*(inputs or []), *(listed_inputs(input_list) if input_list else [])])
    if quality is not None and not (exif_transpose or resize or reencode):
        raise ValueError("--quality has no effect on images that are not changed; give --reencode or --resize with it")
    asked: dict[str, Any] = {
        "verify": verify,
        "max_pixels": max_pixels,
        "min_size": min_size,
        "max_aspect": max_aspect,
        "max_caption_length": max_caption_length,
        "exif_transpose": exif_transpose,
        "resize": resize,
        "reencode": reencode,
        "quality": quality,
    }
    options = BuildOptions(
        shard_bytes=shard_megabytes * 2**20,
        adapter=adapter,
        adapter_options=dict(parse_option(text) for text in adapter_option or []),
        prepare=PrepareOptions(**{name: value for name, value in asked.items() if value is not None}),
        dedup=dedup,
        near_distance=DEFAULT_NEAR_DISTANCE if dedup == "near" and near_distance is None else near_distance,
    )
    progress = Progress(options)
    part = Part.parse(units) if units else None
    progress.total = len(paths) if part is None else len(range(part.index, len(paths), part.count))
    report = build_shards(
        paths,
        out,
        options,
        workers=workers or (len(os.sched_getaffinity(0)) if engine == "local" else max(1, len(paths))),
        engine=engine,
        part=part,
        always_hash=check_inputs,
        on_scan=progress.scanned,
        on_unit=progress.built,
    )
    print_report(report)


def merge(
    out: Annotated[Path, typer.Argument(help="Folder that all of `data build --units` have written to.")],
) -> None:
    """Make the index of a data set that several builders wrote, once all of its units are there."""
    from rae_scale.data.build import merge as merge_units

    print_report(merge_units(out))


def listed_inputs(path: Path) -> list[Path]:
    return [path.parent / line.strip() for line in path.read_text().splitlines() if line.strip()]


def parse_option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ValueError(f"--adapter-option {text!r}: write it as NAME=VALUE")
    return name, value


class Progress:
    """A line for each unit."""

    def __init__(self, options: BuildOptions) -> None:
        self.options = options
        self.total = 0
        self.scans = 0
        self.units = 0

    def scanned(self, unit: Unit) -> None:
        self.scans += 1
        print(f"[{self.scans}/{self.total}] {unit.name}: looked through for duplicates", flush=True)

    def built(self, unit: Unit, done: Done) -> None:
        self.units += 1
        counts = done.manifest.counts
        parts = [f"{counts.kept:,} kept", f"{counts.rejected.total():,} rejected"]
        if self.options.dedup != "off":
            parts.append(f"{counts.duplicates:,} duplicates")
        parts.append(f"{done.manifest.size / 2**20:,.1f} MiB")
        if not done.written:
            parts.append("there already")
        print(f"[{self.units}/{self.total}] {unit.name}: {', '.join(parts)}", flush=True)


def print_report(report: BuildReport) -> None:
    from rae_scale.data.build import REJECTED_NAME

    out, counts = report.out_dir, report.counts
    if report.unscanned:
        print(
            f"{out}: this part is looked through for duplicates, {len(report.unscanned):,} units of other parts are "
            f"not yet (first: {report.unscanned[0]}); run the same command again when they are"
        )
        return
    print(f"{out}: {counts.kept:,} samples in {report.shards:,} shards, {report.bytes / 2**20:,.1f} MiB")
    rejected = counts.rejected.total()
    print(f"  {counts.read:,} in = {counts.kept:,} kept + {rejected:,} rejected + {counts.duplicates:,} duplicates")
    if left_out := rejected + counts.duplicates:
        where = out / REJECTED_NAME if report.merged else out / "*" / REJECTED_NAME
        print(f"left out {left_out:,} of {counts.read:,}, each listed in {where}:")
        for reason, count in [*counts.rejected.most_common(), ("duplicate", counts.duplicates)]:
            if count:
                print(f"  {count:>12,}  {reason}")
    for unit, reason in report.damaged.items():
        print(f"damaged: {unit}: {reason}")
    if not report.merged:
        print(f"{report.units:,} units are there; when those of all parts are: rae-scale data merge {out}")
