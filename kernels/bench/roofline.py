"""How fast one training step of a DiT with per-token adaLN can be: its FLOPs, its bytes, and the times that they need.

    python kernels/bench/roofline.py --hidden 2048 --depth 32 --tokens 256 --batch 64 --gpu H200
    python kernels/bench/roofline.py --gpu H200 --gemm-tflops 790 --copy-tbs 4.3 --json roofline.json

Every operation needs at least its FLOPs over the rate of matrix products, and at least its bytes (each input read once,
each output written once) over the memory bandwidth: the larger of the two times is its floor, and the step's is their
sum. The data sheet's rates are used unless measured ones are given. Two ways to compute are set side by side:

    eager  the reference functions one PyTorch call at a time, under bf16 autocast
    fused  the operators of rae_kernels

Letters: N tokens of the whole batch, T of one image, h hidden size, F padded width of SwiGLU, z width of the condition.
Bytes per token are written as bytes per channel times channels: residual stream and its gradient in `residual` bytes,
everything that matrix products read or write in bf16 (2 bytes).

The bytes of single operations are in `rae_kernels.traffic`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from rae_kernels.traffic import (
    BIAS_GRADIENTS,
    CONDITION,
    EAGER_OPTIMIZER,
    FLASH_BACKWARD,
    FOURIER_FEATURES,
    FUSED_OPTIMIZER,
    eager_traffic,
    fused_traffic,
    linear_widths,
    padded_inner,
)


class GPU(NamedTuple):
    """Dense bf16 FLOP/s and bytes/s."""

    flops: float
    bandwidth: float


# From NVIDIA's data sheets; the dense figure is half of the one printed "with sparsity".
GPUS = {
    "A100": GPU(312e12, 2.039e12),
    "H100": GPU(989.4e12, 3.35e12),
    "H200": GPU(989.4e12, 4.8e12),
    "B200": GPU(2250e12, 8.0e12),
}


@dataclass(frozen=True)
class Shape:
    """A DiT and its batch. The wide head, if `head_depth` > 0, is conditioned on its own width."""

    hidden: int = 2048
    depth: int = 32
    z: int = 2048
    channels: int = 1152
    tokens: int = 256
    batch: int = 64
    head_hidden: int = 2688
    head_depth: int = 0

    @property
    def stacks(self) -> list[tuple[int, int, int]]:
        """(blocks, hidden size, width of their condition)"""
        wide = [(self.head_depth, self.head_hidden, self.head_hidden)] if self.head_depth else []
        return [(self.depth, self.hidden, self.z), *wide]

    @property
    def last(self) -> tuple[int, int]:
        """Hidden size and condition of the final layer."""
        return (self.head_hidden, self.head_hidden) if self.head_depth else (self.hidden, self.z)


class Row(NamedTuple):
    """One kind of work in a step, all blocks together."""

    name: str
    kind: str
    flops: float
    bytes: float


def outer_widths(shape: Shape) -> list[tuple[int, int]]:
    """(in, out) of the products outside the blocks that run for every token."""
    hidden, z = shape.last
    widths = [(shape.channels, shape.hidden), (z, 2 * hidden), (hidden, shape.channels)]
    return widths + ([(shape.channels, hidden), (shape.hidden, hidden)] if shape.head_depth else [])


def parameters(shape: Shape) -> int:
    """Of the model as it is held, padding included."""
    z = shape.z
    count = sum((i + 1) * o for i, o in outer_widths(shape)) + shape.last[0]
    count += (FOURIER_FEATURES + 1) * z + (z + 1) * z + z
    for depth, hidden, width in shape.stacks:
        count += depth * (sum((i + 1) * o for i, o in linear_widths(hidden, width)) + 2 * hidden)
    return count


def step_rows(shape: Shape, way: str, *, residual: int = 4, recompute_swiglu: bool = True) -> list[Row]:
    """The work of forward, backward and optimizer. way: "eager" or "fused"."""
    n = shape.tokens * shape.batch
    traffic = eager_traffic(residual) if way == "eager" else fused_traffic(residual, recompute_swiglu=recompute_swiglu)
    bytes_of: dict[str, float] = dict.fromkeys(traffic, 0.0)
    products = attention = attention_bytes = bias = condition = 0.0
    for depth, hidden, z in shape.stacks:
        widths = linear_widths(hidden, z)
        products += depth * sum(6.0 * n * i * o for i, o in widths)
        bias += depth * n * sum(BIAS_GRADIENTS.backward * o for _, o in widths)
        attention += depth * (1 + FLASH_BACKWARD) * 4.0 * n * shape.tokens * hidden
        attention_bytes += depth * n * hidden * (8.0 + 16.0)
        condition += depth * n * z * sum(CONDITION)
        for name, per_channel in traffic.items():
            channels = padded_inner(hidden) if name == "swiglu" else hidden
            bytes_of[name] += depth * n * channels * sum(per_channel)
    last = shape.last[0]
    bytes_of["norm_modulate"] += n * last * sum(traffic["norm_modulate"])
    products += sum(6.0 * n * i * o for i, o in outer_widths(shape))
    bias += n * sum(BIAS_GRADIENTS.backward * o for _, o in outer_widths(shape))
    per_parameter = EAGER_OPTIMIZER if way == "eager" else FUSED_OPTIMIZER
    return [
        Row("matrix products", "products", products, 0.0),
        Row("attention", "attention", attention, attention_bytes),
        *(Row(name, "memory", 0.0, count) for name, count in bytes_of.items()),
        Row("bias gradients", "memory", 0.0, bias),
        Row("condition: casts and gradient sum", "memory", 0.0, condition),
        *(Row(name, "optimizer", 0.0, float(size * parameters(shape))) for name, size in per_parameter.items()),
    ]


def model_flops(shape: Shape) -> float:
    """Of a training step, as in MFU: backward counts twice the forward, padding not at all."""
    n, flops = shape.tokens * shape.batch, 0.0
    for depth, hidden, z in shape.stacks:
        logical = 4 * hidden * hidden + 3 * hidden * (8 * hidden // 3) + 6 * hidden * z
        flops += depth * (6.0 * n * logical + 12.0 * n * shape.tokens * hidden)
    per_image = (FOURIER_FEATURES + shape.z) * shape.z
    return flops + sum(6.0 * n * i * o for i, o in outer_widths(shape)) + 6.0 * shape.batch * per_image


def seconds(row: Row, gpu: GPU) -> float:
    return max(row.flops / gpu.flops, row.bytes / gpu.bandwidth)


def block_end_saving(shape: Shape, residual: int = 4) -> float:
    """Bytes per step that one operator for a block's last gated residual and the next norm would save.

    Kept apart deliberately: a block that begins and ends at x can be checkpointed, sharded and compiled by itself.
    """
    traffic = fused_traffic(residual)
    apart = sum(sum(traffic[name]) for name in ("gated_residual", "norm_modulate", "residual gradient sum"))
    saved = apart - sum(traffic["gated_residual_norm_modulate"])
    return sum(depth * saved * shape.tokens * shape.batch * hidden for depth, hidden, _ in shape.stacks)


def analyse(shape: Shape, gpu: GPU, *, residual: int = 4, recompute_swiglu: bool = True) -> dict[str, object]:
    """Everything as plain data: shape, rates, rows of both ways with time and share, totals."""
    ways = {}
    for way in ("eager", "fused") if residual == 4 else ("fused",):
        rows = step_rows(shape, way, residual=residual, recompute_swiglu=recompute_swiglu)
        total = sum(seconds(row, gpu) for row in rows)
        ways[way] = {
            "rows": [row._asdict() | {"ms": 1e3 * (s := seconds(row, gpu)), "share": s / total} for row in rows],
            "floor_ms": 1e3 * total,
            "images_per_second": shape.batch / total,
            "fraction_of_rate": model_flops(shape) / total / gpu.flops,
        }
    saved = block_end_saving(shape, residual)
    fused_ms: float = ways["fused"]["floor_ms"]  # type: ignore[assignment]
    return {
        "shape": asdict(shape) | {"residual_bytes": residual, "recompute_swiglu": recompute_swiglu},
        "rates": gpu._asdict(),
        "parameters": parameters(shape),
        "model_tflop": model_flops(shape) / 1e12,
        "per_channel": {name: traffic._asdict() for name, traffic in fused_traffic(residual).items()},
        "ways": ways,
        "fusing_block_ends": {
            "bytes": saved,
            "ms": 1e3 * saved / gpu.bandwidth,
            "share": 1e3 * saved / gpu.bandwidth / fused_ms,
        },
    }


def table(result: dict[str, object]) -> str:
    """The same as text."""
    ways: dict[str, dict[str, object]] = result["ways"]  # type: ignore[assignment]
    lines = [f"{result['parameters']:,} parameters, {result['model_tflop']:.1f} TFLOP per step (model FLOPs)"]
    for way, found in ways.items():
        lines += ["", f"{way:36s} {'TFLOP':>9s} {'GB':>9s} {'ms':>9s} {'share':>7s}"]
        rows: list[dict[str, float]] = found["rows"]  # type: ignore[assignment]
        for row in rows:
            lines.append(
                f"{row['name']:36s} {row['flops'] / 1e12:9.2f} {row['bytes'] / 1e9:9.2f} {row['ms']:9.2f} "
                f"{row['share']:7.1%}"
            )
        lines.append(
            f"floor {found['floor_ms']:.1f} ms, {found['images_per_second']:.1f} images/s, "
            f"{found['fraction_of_rate']:.1%} of the rate of matrix products"
        )
    fusing: dict[str, float] = result["fusing_block_ends"]  # type: ignore[assignment]
    lines += [
        "",
        f"one operator across block ends would save {fusing['bytes'] / 1e9:.2f} GB, {fusing['ms']:.2f} ms, "
        f"{fusing['share']:.1%} of the fused step",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None if name == "z" else default)
    parser.add_argument("--gpu", choices=[*GPUS], default="H200")
    parser.add_argument("--gemm-tflops", type=float, help="measured rate of matrix products; default: data sheet")
    parser.add_argument("--copy-tbs", type=float, help="measured copy bandwidth, read + written; default: data sheet")
    parser.add_argument("--residual", type=int, choices=[2, 4], default=4, help="bytes of the residual stream")
    parser.add_argument("--save-swiglu", action="store_true", help="SwiGLU's result is kept for backward")
    parser.add_argument("--json", type=Path, help="also write everything there")
    given = parser.parse_args(arguments)
    fields = {name: getattr(given, name) for name in asdict(Shape())}
    fields["z"] = fields["z"] or fields["hidden"]
    sheet = GPUS[given.gpu]
    gpu = GPU(
        given.gemm_tflops * 1e12 if given.gemm_tflops else sheet.flops,
        given.copy_tbs * 1e12 if given.copy_tbs else sheet.bandwidth,
    )
    result = analyse(Shape(**fields), gpu, residual=given.residual, recompute_swiglu=not given.save_swiglu)
    print(table(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
