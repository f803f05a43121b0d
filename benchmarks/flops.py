"""How much of what the hardware can compute a training step uses."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from magneto_dist.batch import Batch
from magneto_dist.config import Config, TrainConfig
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.magneto import build_model
from magneto_dist.precision import HALF_DTYPES

_ROWS = 4
PEAKS: dict[str, dict[str, float]] = {
    # TFLOP/s, dense, float32 accumulation. NVIDIA Turing architecture whitepaper, appendix A.
    "RTX 2080 Ti": {"float32": 13.4, "fp16": 53.8},
    "T4": {"float32": 8.1, "fp16": 65.0},  # NVIDIA T4 data sheet
    "V100": {"float32": 15.7, "fp16": 125.0},  # NVIDIA V100 data sheet, SXM2
    "A100": {"float32": 19.5, "tf32": 156.0, "fp16": 312.0, "bf16": 312.0},  # A100 data sheet
    # NVIDIA H100 and H200 data sheets, which give twice as much, with sparsity.
    "H100 PCIe": {"float32": 51.0, "tf32": 378.0, "fp16": 756.0, "bf16": 756.0},
    "H100": {"float32": 67.0, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5},
    "H200": {"float32": 67.0, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5},
}


def arithmetic(config: TrainConfig) -> str:
    """In what a model is computed: float32, tf32, fp16 or bf16."""
    if config.precision != "no":
        return config.precision
    return "tf32" if config.tf32 else "float32"


def published_peak(device_name: str, kind: str) -> float | None:
    """FLOP/s of the data sheet; None: not known."""
    for name, peaks in PEAKS.items():
        if name in device_name:
            return peaks[kind] * 1e12 if kind in peaks else None
    return None


def matrix_product_rate(device: torch.device, kind: str) -> float:
    """FLOP/s of large square matrix products here, with the threads of this process."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=HALF_DTYPES.get(kind, torch.float32))
    seconds = []
    for _ in range(6):
        started_at_s = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started_at_s)
    return 2 * size**3 / median(seconds[1:])


def flops_per_image(batch: Batch, config: Config, num_tags: int) -> float:
    """Of a forward and backward pass: matrix products, convolutions and attention alone.

    Counted on the CPU, on a few rows and a model of its own, as the same work is done everywhere.

    Args:
        batch: any, on CPU; its first rows are used.
        config: of model and loss.
        num_tags: of the vocabulary.
    """
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    few = {name: t[:_ROWS].cpu() for name, t in tensors.items() if isinstance(t, Tensor)}
    batch = replace(batch, **few)
    model, counter = build_model(config.model, num_tags), FlopCounterMode(display=False)
    with counter:
        loss = ets_loss(model(**batch.inputs()), batch, count_for_loss(batch), config.loss).total
        loss.backward()
    return counter.get_total_flops() / len(batch.sample_valid)
