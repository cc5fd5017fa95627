"""What devices can do, as data: every figure with its source. Imports no JAX."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    value: float
    source: str  # document of the vendor, year, and how the figure follows from it


@dataclass(frozen=True)
class Device:
    """One device of a mesh. Figures of links count one direction. None: not known, and nothing is predicted from it."""

    memory_bytes: Figure
    flops: Figure | None = None  # bfloat16 products a second, dense, at best
    bandwidth: Figure | None = None  # of its memory, bytes a second
    links: Figure | None = None  # bytes a second to the devices that fast links join
    network: Figure | None = None  # bytes a second to all others
    joined: int = 1  # devices that fast links join: those of a host, of a pod


H100 = "NVIDIA H100 Tensor Core GPU datasheet, 2023, SXM"
H200 = "NVIDIA H200 Tensor Core GPU datasheet, 2024, SXM"
V5P = "Google Cloud documentation, TPU v5p, 2025"
CONNECTX = "eight ConnectX-7 of 400 Gb/s for eight GPUs"

DEVICES = {
    "tpu-v5p": Device(
        memory_bytes=Figure(95 * 2**30, f"{V5P}: 95 GiB of HBM a chip"),
        flops=Figure(459e12, f"{V5P}: 459 TFLOPs a chip in BF16"),
        bandwidth=Figure(2765e9, f"{V5P}: 2,765 GB/s a chip"),
        links=Figure(600e9, f"{V5P}: 1,200 GB/s a chip over all its links, both directions"),
        network=Figure(6.25e9, f"{V5P}: 50 Gb/s a chip of data center network"),
        joined=8960,  # the same page: chips of a pod
    ),
    "h100": Device(
        memory_bytes=Figure(80e9, f"{H100}: 80 GB"),
        flops=Figure(989.5e12, f"{H100}: 1,979 TFLOPS in BFLOAT16 with sparsity, half of it without"),
        bandwidth=Figure(3.35e12, f"{H100}: 3.35 TB/s"),
        links=Figure(450e9, f"{H100}: NVLink 900 GB/s, both directions"),
        network=Figure(50e9, f"NVIDIA DGX H100 datasheet, 2023: {CONNECTX}"),
        joined=8,
    ),
    "h200": Device(
        memory_bytes=Figure(141e9, f"{H200}: 141 GB"),
        flops=Figure(989.5e12, f"{H200}: 1,979 TFLOPS in BFLOAT16 with sparsity, half of it without"),
        bandwidth=Figure(4.8e12, f"{H200}: 4.8 TB/s"),
        links=Figure(450e9, f"{H200}: NVLink 900 GB/s, both directions"),
        network=Figure(50e9, f"NVIDIA DGX H200 datasheet, 2024: {CONNECTX}"),
        joined=8,
    ),
}
CPU = "cpu"  # this machine: its memory alone is known


def find_device(name: str) -> Device:
    """Raises ValueError where there is none of that name."""
    if name == CPU:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(memory_bytes=Figure(memory, "this machine, as its system says"))
    if name not in DEVICES:
        raise ValueError(f"there is no device {name!r} in the table: choose {', '.join(DEVICES)} or {CPU}")
    return DEVICES[name]
