"""Run as a program: convert a large ZeRO-3 checkpoint, and compare with copying as many bytes.

    python large.py FOLDER [--model dit-9.8b-ddt] [--dtype float32] [--moments] [--ranks 8] [--stretch BYTES]

The checkpoint is of real shapes and mostly of zeros, which take no room on disk, with some numbers in every part of
each tensor. It is converted to native weights; the same again, killed half-way and continued; and as many bytes as the
result has are copied by plain reading and writing. Every element of the results is compared. Prints JSON: sizes in
bytes, seconds, the converting process's peak memory, and its speed as a part of the copy's.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from killed import in_child
from safetensors import safe_open
from torch import Tensor

from rae_scale.convert import stretches
from rae_scale.convert.convert import DTYPES, convert
from rae_scale.convert.torchfile import ROOT, NamePickler, StorageName, TensorName, write_data
from rae_scale.models.dit import DiT
from rae_scale.models.zoo import DIT_ZOO
from rae_scale.state.tensorfile import TensorToWrite

BLOCK = 4 << 20  # elements
HOLE_BYTES = 1 << 18
MARKS = 3  # elements of each part of each tensor that are not zero
STEP = 10
Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: str) -> Shapes:
    with torch.device("meta"):
        dit = DiT(DIT_ZOO[model])
    return {f"dit.{name}": tuple(parameter.shape) for name, parameter in dit.named_parameters()}


def numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def marks(number: int, rank: int, length: int) -> Tensor:
    """What tensor `number` begins with on `rank`; exact in bfloat16."""
    return torch.tensor([1 + number % 128, 1 + rank, -1.0][: min(MARKS, length)])


class HoleyFile(io.BufferedWriter):
    """Leaves out stretches of zeros: the file system gives them back and stores nothing."""

    def write(self, data: Any) -> int:
        view = memoryview(data)
        for start in range(0, len(view), HOLE_BYTES):
            piece = view[start : start + HOLE_BYTES]
            if len(piece) == HOLE_BYTES and not torch.frombuffer(piece, dtype=torch.uint8).any():
                self.seek(HOLE_BYTES, os.SEEK_CUR)
            else:
                super().write(piece)
        return len(view)


def write_checkpoint(folder: Path, shapes: Shapes, ranks: int, moments: bool) -> None:
    """What DeepSpeed writes of a model whose parameters are one group."""
    tag = folder / f"global_step{STEP}"
    tag.mkdir(parents=True)
    (folder / "latest").write_text(tag.name)
    description = {
        "param_shapes": [{name: torch.Size(shape) for name, shape in shapes.items()}],
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "buffer_names": [],
        "shared_params": {},
        "module": {},
        "global_steps": STEP,
        "mp_world_size": 1,
    }
    for rank in range(ranks):
        torch.save(description, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        write_optim(tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", shapes, rank, ranks, moments)


def write_optim(path: Path, shapes: Shapes, rank: int, ranks: int, moments: bool) -> None:
    lengths = [-(-numel(shape) // ranks) for shape in shapes.values()]
    total = sum(lengths)
    flats = [TensorName(StorageName(str(n), torch.float32, total), (total,)) for n in range(3 if moments else 1)]
    state = {0: {"exp_avg": flats[1], "exp_avg_sq": flats[2], "step": STEP}} if moments else {}
    content = {
        "optimizer_state_dict": {
            "zero_stage": 3,
            "partition_count": ranks,
            "optimizer_state_dict": {"state": state, "param_groups": [{"params": [0]}]},
            "fp32_flat_groups": flats[:1],
        }
    }
    pickled = io.BytesIO()
    NamePickler(pickled, protocol=2).dump(content)
    data = TensorToWrite("", (total,), torch.float32, lambda: blocks(list(shapes.values()), rank, ranks))
    with HoleyFile(io.FileIO(path, "wb")) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{ROOT}/data.pkl", pickled.getvalue())
        archive.writestr(f"{ROOT}/byteorder", "little")
        for number in range(len(flats)):
            write_data(archive, f"{ROOT}/data/{number}", data, file.tell())


def blocks(shapes: list[tuple[int, ...]], rank: int, ranks: int) -> Iterator[Tensor]:
    """The flat tensor of a rank: its part of every parameter, one behind the other."""
    zeros, block, filled, clean = torch.zeros(BLOCK), torch.zeros(BLOCK), 0, True
    for number, shape in enumerate(shapes):
        whole, length = numel(shape), -(-numel(shape) // ranks)
        held = max(min(whole - rank * length, length), 0)
        part = torch.cat([marks(number, rank, held), torch.zeros(length - min(MARKS, held))])[: MARKS + 1]
        done = 0
        while done < length:
            count = min(BLOCK - filled, length - done)
            if done < len(part):
                piece = part[done : done + count]
                block[filled : filled + len(piece)] = piece
                clean = False
            filled, done = filled + count, done + count
            if filled == BLOCK:
                yield zeros if clean else block.clone()
                block.zero_()
                filled, clean = 0, True
    yield block[:filled]


def check_result(folder: Path, shapes: Shapes, ranks: int, dtype: torch.dtype) -> None:
    """Every element of the converted weights."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(shapes)
        for number, (name, shape) in enumerate(shapes.items()):
            tensor = file.get_tensor(name)
            assert tensor.shape == shape and tensor.dtype == dtype, name
            flat, length, seen = tensor.view(-1), -(-numel(shape) // ranks), 0
            for rank in range(ranks):
                held = max(min(numel(shape) - rank * length, length), 0)
                expected = marks(number, rank, held)
                assert torch.equal(flat[rank * length :][: len(expected)].float(), expected), (name, rank)
                seen += len(expected)
            assert int(flat.count_nonzero()) == seen, name


def plain_copy(source: Path, target: Path, count: int) -> None:
    """`count` bytes by reading and writing, and onto the disk, as a conversion puts them."""
    with source.open("rb") as read, target.open("wb") as written:
        while count:
            block = read.read(min(count, 4 << 20))
            if not block:
                read.seek(0)
                continue
            written.write(block)
            count -= len(block)
        written.flush()
        os.fsync(written.fileno())


def die_after(count: int) -> None:
    """This process is killed when it has put `count` bytes onto the disk."""
    real = stretches.StretchWriter.note

    def note(self: Any, stretch: Any) -> None:
        real(self, stretch)
        if stretch.stop >= count:
            os.kill(os.getpid(), signal.SIGKILL)

    stretches.StretchWriter.note = note  # type: ignore[method-assign]


def timed(action: Callable[[], Any], report: Path | None = None) -> float:
    """Seconds that it takes in a process of its own, which must end well. report: where it leaves its peak memory."""

    def run() -> None:
        action()
        if report is not None:
            report.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))

    start = time.perf_counter()
    status = in_child(run)
    assert status == 0, f"ended with {status}"
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="dit-9.8b-ddt", choices=DIT_ZOO)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--moments", action="store_true", help="with AdamW's moments, three times the bytes to check")
    parser.add_argument("--stretch", type=int, default=stretches.STRETCH_BYTES)
    options = parser.parse_args()
    folder, shapes = options.folder, shapes_of(options.model)
    dtype = DTYPES[options.dtype]
    stretches.STRETCH_BYTES = options.stretch
    parameters = sum(map(numel, shapes.values()))
    size = parameters * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if free < 1.2 * size:
        sys.exit(f"{folder} has {free / 1e9:.0f} GB left and {1.2 * size / 1e9:.0f} GB are needed: --dtype bfloat16")
    source, out, again, peak = (folder / name for name in ("zero3", "out", "again", "peak"))
    generated = timed(lambda: write_checkpoint(source, shapes, options.ranks, options.moments))
    read = sum(path.stat().st_size for path in source.rglob("*.pt"))

    def to_native(target: Path) -> Any:
        return convert(source, target, "native", dtype=options.dtype)

    largest = max(source.rglob("*.pt"), key=lambda path: path.stat().st_size)

    def copy() -> float:
        seconds = timed(lambda: plain_copy(largest, folder / "copy", size))
        (folder / "copy").unlink()
        return seconds

    # Before and after: a disk is not always as fast.
    before = copy()
    converted = timed(lambda: to_native(out), peak)
    timed(lambda: check_result(out, shapes, options.ranks, dtype))
    shutil.rmtree(out)
    copies = [before, copy()]

    def killed() -> None:
        die_after(size // 2)
        to_native(again)

    status = in_child(killed)
    assert status == -signal.SIGKILL, status
    held = (folder / ".again.tmp" / "model.safetensors").stat().st_size
    continued = timed(lambda: (folder / "message").write_text(to_native(again).remarks[0]))
    timed(lambda: check_result(again, shapes, options.ranks, dtype))
    shutil.rmtree(again)
    print(
        json.dumps(
            {
                "parameters": parameters,
                "bytes_of_checkpoint": read,
                "bytes_written": size,
                "seconds": {"generate": generated, "convert": converted, "copies": copies, "continue": continued},
                "speed_of_copy": sum(copies) / 2 / converted,
                "peak_bytes": int(peak.read_text()),
                "held_when_killed": held,
                "message": (folder / "message").read_text(),
            }
        )
    )


if __name__ == "__main__":
    main()
