"""GPUs by their vendors' figures; read by ``launch.plan``.

Figures are those of NVIDIA's data sheets: the dense bf16 tensor-core rate with fp32 accumulation (where a sheet gives
the rate "with sparsity", half of it), the fp32 rate without tensor cores, which PyTorch uses unless TF32 is allowed,
and bandwidths in one direction (where a sheet gives both directions together, half of it). ``network_gbps`` is not a
property of the GPU: it is that of the vendor's reference system between nodes, and for cards without one an assumption,
100 Gbit/s Ethernet for a node of 8.

    a100-*       NVIDIA A100 data sheet (2021), SXM; DGX A100: 8 x 200 Gbit/s InfiniBand
    h100-80g     NVIDIA H100 data sheet (2023), SXM; DGX H100: 8 x 400 Gbit/s InfiniBand
    h200-141g    NVIDIA H200 data sheet (2023), SXM; DGX H200: 8 x 400 Gbit/s InfiniBand
    b200-180g    NVIDIA DGX B200 data sheet (2024), an eighth of the system; 8 x 400 Gbit/s InfiniBand
    l40s-48g     NVIDIA L40S data sheet (2023); PCIe 4.0 x16, no NVLink
    rtx4090-24g  NVIDIA Ada architecture white paper (2022), GeForce RTX 4090; PCIe 4.0 x16, no NVLink
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """One device.

    Attributes:
        tflops: peak of dense bf16 matrix products, TFLOP/s; fp16 has the same.
        fp32_tflops: peak of fp32 ones, TFLOP/s.
        memory_gib: what the vendor calls GB; devices report it as GiB, give or take a percent.
        memory_gbs: bandwidth of its memory, GB/s.
        link_gbs: to the other GPUs of its node, GB/s in one direction.
        network_gbps: between nodes, Gbit/s for each GPU in one direction.
    """

    tflops: float
    fp32_tflops: float
    memory_gib: float
    memory_gbs: float
    link_gbs: float
    network_gbps: float

    def peak_flops(self, precision: str) -> float:
        """FLOP/s of matrix products in a run's ``train.precision``."""
        return 1e12 * (self.fp32_tflops if precision == "fp32" else self.tflops)


GPUS: dict[str, GPU] = {
    "a100-40g": GPU(tflops=312, fp32_tflops=19.5, memory_gib=40, memory_gbs=1555, link_gbs=300, network_gbps=200),
    "a100-80g": GPU(tflops=312, fp32_tflops=19.5, memory_gib=80, memory_gbs=2039, link_gbs=300, network_gbps=200),
    "h100-80g": GPU(tflops=989, fp32_tflops=67, memory_gib=80, memory_gbs=3350, link_gbs=450, network_gbps=400),
    "h200-141g": GPU(tflops=989, fp32_tflops=67, memory_gib=141, memory_gbs=4800, link_gbs=450, network_gbps=400),
    "b200-180g": GPU(tflops=2250, fp32_tflops=75, memory_gib=180, memory_gbs=8000, link_gbs=900, network_gbps=400),
    "l40s-48g": GPU(tflops=362, fp32_tflops=91.6, memory_gib=48, memory_gbs=864, link_gbs=32, network_gbps=12.5),
    "rtx4090-24g": GPU(tflops=165, fp32_tflops=82.6, memory_gib=24, memory_gbs=1008, link_gbs=32, network_gbps=12.5),
}
