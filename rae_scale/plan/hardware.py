"""GPUs, networks and clusters by name, and what of their peak rates training reaches.

Rates are bytes/s and FLOP/s, times are seconds, and links are counted in one direction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rae_scale.models.flops import PEAK_BF16_FLOPS

GIB = 1 << 30
GIGABIT = 1e9 / 8
PCIE_4, PCIE_5 = 32e9, 64e9
"""Sixteen lanes, in each direction."""


@dataclass(frozen=True)
class GPU:
    """One kind of GPU, or of another device that was measured.

    device:    what `torch.cuda.get_device_name` returns.
    memory_bytes: that torch can use (`total_memory`, rounded down), which is less than the data sheet's.
    flops:     dense bf16 peak, FLOP/s.
    bandwidth: of its memory.
    link:      between GPUs of a node, in each direction: NVLink through its switch, or PCIe.
    host_link: to the memory of the host, in each direction: PCIe.
    node_gpus: GPUs of an ordinary node.
    """

    name: str
    device: str
    memory_bytes: int
    flops: float
    bandwidth: float
    link: float
    host_link: float
    node_gpus: int = 8

    @property
    def has_nvlink(self) -> bool:
        return self.link > self.host_link


# Data sheets of NVIDIA: "A100 Tensor Core GPU" (2022), "H100 Tensor Core GPU" (2023), "H200" (2024), "HGX B200" (2025).
# They print NVLink and PCIe as the sum of both directions. Cards on PCIe are taken without bridges, which join pairs.
def _gpu(name: str, device: str, gibibytes: float, bandwidth: float, link: float, host_link: float) -> GPU:
    return GPU(name, device, int(gibibytes * GIB), PEAK_BF16_FLOPS[device], bandwidth, link, host_link)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40g", "NVIDIA A100-SXM4-40GB", 39.3, 1.555e12, 300e9, PCIE_4),
        _gpu("a100-80g", "NVIDIA A100-SXM4-80GB", 79.1, 2.039e12, 300e9, PCIE_4),
        _gpu("a100-40g-pcie", "NVIDIA A100-PCIE-40GB", 39.3, 1.555e12, PCIE_4, PCIE_4),
        _gpu("a100-80g-pcie", "NVIDIA A100 80GB PCIe", 79.1, 1.935e12, PCIE_4, PCIE_4),
        _gpu("h100-80g", "NVIDIA H100 80GB HBM3", 79.1, 3.35e12, 450e9, PCIE_5),
        _gpu("h100-pcie", "NVIDIA H100 PCIe", 79.1, 2.0e12, PCIE_5, PCIE_5),
        _gpu("h200", "NVIDIA H200", 139.7, 4.8e12, 450e9, PCIE_5),
        _gpu("b200", "NVIDIA B200", 178.3, 8.0e12, 900e9, PCIE_5),
    )
}


@dataclass(frozen=True)
class Network:
    """What joins nodes.

    rate:    bytes/s of one GPU's own adapter in each direction, or of the node's single one if `shared`.
    shared:  the GPUs of a node share one adapter.
    hop:     latency of one hop of a ring or tree through it, for long and for short messages: NCCL's own numbers
             (`hwLatencies` in its tuning, NET: 14 and 2.7 us), which are for InfiniBand; Ethernet is slower.
    """

    name: str
    rate: float
    shared: bool = False
    hop: float = 14e-6
    short_hop: float = 2.7e-6


NETWORKS = {
    network.name: network
    for network in (
        Network("ib-ndr-400", 400 * GIGABIT),
        Network("ib-hdr-200", 200 * GIGABIT),
        Network("roce-400", 400 * GIGABIT, hop=16e-6, short_hop=4e-6),
        Network("ethernet-100", 100 * GIGABIT, hop=30e-6, short_hop=12e-6),
        Network("shared-400", 400 * GIGABIT, shared=True, hop=16e-6, short_hop=4e-6),
    )
}


@dataclass(frozen=True)
class Cluster:
    """`gpus` of one kind, `gpus_per_node` to a node; the ranks of a node are consecutive.

    Raises:
        ValueError: the GPUs do not fill whole nodes.
    """

    gpu: GPU
    network: Network
    gpus: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.gpus_per_node < 1:
            raise ValueError(f"a cluster of {self.gpus} GPUs, {self.gpus_per_node} to a node; both must be at least 1")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}; choose a multiple of "
                f"{self.gpus_per_node}, or another number of GPUs per node"
            )

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def network_rate(self) -> float:
        """Bytes/s of one GPU through the network in each direction, while its whole node uses it."""
        return self.network.rate / (min(self.gpus, self.gpus_per_node) if self.network.shared else 1)


def find_cluster(gpu: str, gpus: int, network: str | None = None, gpus_per_node: int | None = None) -> Cluster:
    """The cluster that names describe. Without a network: the one that such nodes are sold with (`usual_network`).

    Raises:
        ValueError: an unknown name, or GPUs that do not fill their nodes.
    """
    kind = named("GPU", gpu, GPUS)
    joined = named("network", network or usual_network(kind), NETWORKS)
    return Cluster(kind, joined, gpus, gpus_per_node or min(kind.node_gpus, gpus))


def usual_network(gpu: GPU) -> str:
    """One NDR adapter per GPU in HGX nodes of Hopper and Blackwell, one HDR in those of A100, one shared for PCIe."""
    if not gpu.has_nvlink:
        return "shared-400"
    return "ib-hdr-200" if gpu.name.startswith("a100") else "ib-ndr-400"


def named(what: str, name: str, table: Mapping[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f"{name!r} is no {what} that the planner knows; choose one of {', '.join(table)}")
    return table[name]


@dataclass(frozen=True)
class Rates:
    """What training reaches, as fractions of the peak unless said otherwise; `--calibrate` measures most of them.

    matmul:    of the bf16 peak, products of a transformer's shapes. One H200 gave 790 TFLOP/s of 989 (0.80) for
               8192 x 8192 x 8192; a layer's shapes are less square, and the clock falls under a long load.
    attention: of the bf16 peak, forward and backward of fused attention together at 256 to 512 tokens. FlashAttention-3
               (arXiv 2407.08608, figures 5 and 6) has 467 forward and 305 backward on an H100 at 512 tokens of heads of
               128 channels; shorter sequences and narrower heads have less.
    memory:    of the memory bandwidth, element-wise kernels. One H200 copied 4.3 of 4.8 TB/s (0.90).
    link:      of NVLink or PCIe, rings inside a node: what NCCL itself counts on, 360 of 450 GB/s on Hopper and 720 of
               900 on Blackwell.
    network:   of the adapter, rings between nodes.
    overlap:   of the time of forward and backward, how much an engine's gathers and reductions can hide behind. The
               rest is what has nothing to hide behind (the first gather, the last reduction) and what communication
               takes from the GPU's multiprocessors. Not measured.
    base, short_base: seconds of a collective before its first hop, for long and short messages, and
    hop, short_hop:   of one hop inside a node: NCCL's numbers for rings (`baseLatencies` 8.4 and 6.6 us, `hwLatencies`
               of NVLink 3.4 and 0.6 us).
    fp8:       speed of 8-bit products beside bf16 ones, casts included; the peak is twice as high. Not measured.
    launch:    seconds that the host takes to issue a kernel through PyTorch and autograd. Not measured on a GPU host.
    source:    where these came from.
    """

    matmul: float = 0.68
    attention: float = 0.28
    memory: float = 0.85
    link: float = 0.80
    network: float = 0.90
    overlap: float = 0.90
    base: float = 8.4e-6
    short_base: float = 6.6e-6
    hop: float = 3.4e-6
    short_hop: float = 0.6e-6
    fp8: float = 1.4
    launch: float = 7e-6
    source: str = "defaults"

    def __post_init__(self) -> None:
        for name in ("matmul", "attention", "memory", "link", "network", "overlap"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"rates.{name}={value} is no fraction of a peak rate; it must be above 0, at most 1")


DEFAULT_RATES = Rates()


@dataclass(frozen=True)
class Calibration:
    """What `--calibrate` measured (`rae_scale/plan/calibrate.py`).

    gpu:     one of `GPUS`, or the machine's own device with what was measured as its peaks.
    network: what joined the nodes, None if there was one only.
    """

    gpu: GPU
    network: Network | None
    rates: Rates

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_calibration(path: Path) -> Calibration:
    """
    Raises:
        ValueError: `path` is no file of `--calibrate`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        network = content["network"]
        return Calibration(
            GPU(**content["gpu"]),
            None if network is None else Network(**network),
            Rates(**content["rates"] | {"source": str(path)}),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no calibration ({error}); write one with `rae-scale plan --calibrate {path}`"
        ) from None
