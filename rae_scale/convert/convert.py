"""A checkpoint from one format to another, a part of one tensor at a time.

    source (its names) -> ours.OurNames -> Chosen (EMA or raw) -> lora.Merged -> sink's plan -> writer.FolderWriter

What cannot be converted is found before anything is written; bytes that are not what they were, while they are read:
then nothing of it stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

import rae_scale
from rae_scale.config import Config
from rae_scale.convert.casts import CastErrors
from rae_scale.convert.lora import Merged, read_adapter
from rae_scale.convert.names import padding_boxes, read_target
from rae_scale.convert.open import locate, open_source
from rae_scale.convert.ours import Chosen, in_our_names
from rae_scale.convert.parts import TensorOut
from rae_scale.convert.settings import Settings
from rae_scale.convert.sinks import Entry, Job, Plan, Sink, To, sink_of
from rae_scale.convert.source import Source
from rae_scale.convert.verify import verify as verify_written
from rae_scale.convert.writer import FolderWriter
from rae_scale.models.official import MOST_LISTED
from rae_scale.state.format import CheckpointError
from rae_scale.state.read import CHUNK_BYTES, chunks_of
from rae_scale.state.weights import KIND_NAMES, WeightKind

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Report:
    """What was done. verified: elements compared, None if that was not asked for."""

    out: Path
    source: str
    weights: WeightKind | None
    tensors: int
    bytes: int
    casts: CastErrors
    verified: int | None
    remarks: Sequence[str]


def convert(
    path: str | Path,
    out: str | Path,
    to: To,
    *,
    weights: WeightKind | None = None,
    dtype: str = "float32",
    verify: bool = False,
    config: Config | None = None,
    lora: str | Path | None = None,
    only: Sequence[str] | None = None,
    decoder: str | Path | None = None,
    license: str | None = None,
) -> Report:
    """Write the checkpoint at `path`, of any known format, as the new folder `out` in the format `to`.

    At most about three times the largest tensor, in parts of `read.CHUNK_BYTES`, is in memory at a time. Killed at any
    point, the same call continues where it was; until it is complete and on disk, `out` has a hidden name.

    weights: "ema" or "weight"; None takes the moving average where there is one.
    dtype:   of the written tensors: float32, bfloat16 or float16.
    verify:  read the result back and compare every element.
    config:  our settings, where the source has none or others are wanted.
    lora:    folder of an adapter, as PEFT writes it, to be merged into the language model.
    only:    beginnings of our names to write (`to="native"`).
    decoder: the decoder that goes with a text-to-image model, of any known format (`to="hf"`).
    license: of the weights, for the model card (`to="hf"`).

    Raises:
        ValueError: `path` is damaged or of no known format; the model does not fit the format; tensors are missing,
            unknown or would be lost; or `out` exists.
    """
    path, out = locate(path), Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists; write into a new folder, or remove that one first")
    sink = sink_of(to)
    with open_source(path) as source:
        settings = Settings(source, path, config)
        tensors, taken = tensors_for(sink, source, settings, weights, only)
        purpose: dict[str, Any] = {
            "version": rae_scale.__version__,
            "source": fingerprint(path),
            "options": [to, taken, dtype, only, license],
            "config": None if config is None else config.model_dump(mode="json"),
            "adapter": None if lora is None else fingerprint(Path(lora)),
            "decoder": None if decoder is None else fingerprint(locate(decoder)),
        }
        with damage_first(tensors):
            job = Job(
                source=tensors if lora is None else merged(sink, tensors, settings, Path(lora)),
                facts=source.facts,
                settings=settings,
                weights=taken,
                dtype=DTYPES[dtype],
                only=None if only is None else tuple(only),
                decoder=None if decoder is None else Path(decoder),
                out=out,
                license=license,
            )
            plan = sink.plan(job)
            check_nothing_is_lost(job, plan, sink)
        with FolderWriter(out, purpose) as writer:
            remarks = [*([writer.message] if writer.message else []), *plan.remarks]
            with damage_first(tensors):
                write(job, plan, writer)
            # Not before, though what was read of a damaged source is in the folder by now: most of the check has been
            # made in passing, and the folder has no name yet.
            tensors.check()
            verified = verify_folder(job, writer.folder, sink) if verify else None
            writer.finish()
        entries = [entry for file in plan.files for entry in file.entries]
        return Report(
            out=out,
            source=source.what,
            weights=taken,
            tensors=len(entries),
            bytes=sum(entry.bytes for entry in entries),
            casts=writer.casts,
            verified=verified,
            remarks=remarks,
        )


def tensors_for(
    sink: Sink, source: Source, settings: Settings, weights: WeightKind | None, only: Sequence[str] | None
) -> tuple[Source, WeightKind | None]:
    """The source's tensors in our names, as the sink takes them, and which weights they are."""
    # Under our own names a checkpoint says all of itself, so that copying it asks for no model.
    ours = source if source.naming == sink.naming == "native" else in_our_names(source, settings.module)
    if sink.everything:
        if weights is not None:
            raise CheckpointError(f"--weights {weights}: a checkpoint keeps all kinds of them; leave it out")
        return ours, None
    taken = choose_weights(source, weights)
    return Chosen(ours, taken or "weight", None if only is None else tuple(only)), taken


@contextmanager
def damage_first(source: Source) -> Iterator[None]:
    """Where something fails and the source is damaged, the damage is what is raised."""
    try:
        yield
    except CheckpointError:
        source.check()
        raise


def choose_weights(source: Source, wanted: WeightKind | None) -> WeightKind | None:
    """Which weights of the source to take; None where it has one kind and does not say which.

    Raises:
        CheckpointError: the wanted ones are not there.
    """
    held = source.facts.weights
    if "ema" in source.forms:
        return wanted or "ema"
    if wanted is None or wanted == (held or "weight"):
        return wanted or held
    raise CheckpointError(
        f"{source.what} holds the {KIND_NAMES[held or 'weight']} and no {KIND_NAMES[wanted]}; leave --weights out to "
        "take what is there, or convert a checkpoint that has them"
    )


def merged(sink: Sink, tensors: Source, settings: Settings, folder: Path) -> Source:
    if sink.everything:
        raise CheckpointError(
            f"--lora {folder}: optimizer state belongs to the weights before the adapter was merged; use --to native, "
            "and run.init_from"
        )
    return Merged(tensors, read_adapter(folder, settings.module))


def check_nothing_is_lost(job: Job, plan: Plan, sink: Sink) -> None:
    """Every tensor of the source has its place in the plan, whole but for padding that is zero.

    Raises:
        CheckpointError: lists what would be lost, or what is asked for and not there.
    """
    entries = [entry for file in plan.files for entry in file.entries]
    placed = {(entry.kind, patch.name) for entry in entries for patch in entry.target.patches}
    held = {(kind, name) for kind, forms in job.source.forms.items() for name in forms}
    problems = [f"{kind} of {name} has no place in the destination" for kind, name in sorted(held - placed)]
    problems += [f"{kind} of {name} is not in the source" for kind, name in sorted(placed - held)]
    if not problems and sink.naming != "native":
        problems = list(lost_padding(job, entries))
    if problems:
        more = len(problems) - MOST_LISTED
        listed = [*problems[:MOST_LISTED], *([f"and {more} more"] if more > 0 else [])]
        raise CheckpointError(
            f"{job.source.what} cannot be converted:\n  " + "\n  ".join(listed) + "\nuse --to native, which holds all"
        )


def lost_padding(job: Job, entries: Sequence[Entry]) -> list[str]:
    """Parameters with something in the padding that the destination has no place for."""
    problems = []
    for name, boxes in padding_boxes(job.module, (entry.target for entry in entries)).items():
        parts = (part for box in boxes for part in chunks_of(box, CHUNK_BYTES // torch.float32.itemsize))
        lost = sum(int(job.source.read("weight", name, part).count_nonzero()) for part in parts)
        if lost:
            problems.append(f"{name} has {lost} entries in its padding that are not zero and would be lost")
    return problems


def write(job: Job, plan: Plan, writer: FolderWriter) -> None:
    hashes = {}
    for file in plan.files:
        tensors = [
            TensorOut(
                entry.key, entry.target.shape, entry.dtype, partial(read_target, job.source, entry.kind, entry.target)
            )
            for entry in file.entries
        ]
        if file.write is None:
            hashes[file.name] = writer.write(file.name, tensors, file.metadata)
        else:
            hashes[file.name] = writer.write_as(file.name, tensors, file.write)
    plan.complete(writer.folder, hashes)


def verify_folder(job: Job, folder: Path, sink: Sink) -> int:
    with open_source(folder) as written:
        ours = written if written.naming == "native" else in_our_names(written, job.module)
        return verify_written(job.source, ours, job.dtype)


def fingerprint(path: Path) -> dict[str, Any]:
    """The state of a file or folder as far as it shows without reading it: every file's size and time of change."""
    root = path.resolve()
    files = sorted(found for found in root.rglob("*") if found.is_file()) if root.is_dir() else [root]
    states = [(file.relative_to(root).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = xxhash.xxh3_128_hexdigest(json.dumps(states).encode())
    return {"path": str(root), "files": len(states), "state": digest}
