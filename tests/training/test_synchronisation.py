"""A training step never waits for its device: nothing is read back, nothing copied in lockstep.

With CUDA its own debug mode tells. Without it the step runs on "meta" tensors, a device that has
shapes and no values: whatever would need a value on the CPU fails there by itself, and copies
between the two devices are looked at as they are made.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from magneto_dist.batch import Batch
from magneto_dist.binning import binned_sums
from magneto_dist.config import Config
from magneto_dist.config_io import load_config
from magneto_dist.metrics import metric_sums
from magneto_dist.training.loop import Counts, train_step
from magneto_dist.training.optim import build_optimizer
from processes import REPOSITORY
from step_memory import BareSession, model_of, noise, training_job

NUM_TAGS = 40


class _Copies(TorchDispatchMode):
    """Names the operators that wait for a copy between the CPU and the device."""

    def __init__(self) -> None:
        super().__init__()
        self.blocking: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = func._overloadpacket
        if operator in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            by_place = args[2] if operator is torch.ops.aten.copy_ and len(args) > 2 else False
            tensors = [each for each in (*args, result) if isinstance(each, torch.Tensor)]
            crosses = len({tensor.device for tensor in tensors}) > 1
            if crosses and not kwargs.get("non_blocking", by_place):
                self.blocking.append(str(func))
        return result


def tiny(name: str) -> Config:
    config = load_config(REPOSITORY / "configs" / name)
    return replace(
        config,
        augment=replace(config.augment, image_size=32),
        model=replace(
            config.model, backbone="resnet18", backbone_weights="none", d_model=16, num_heads=2,
            d_ff=32, image_layers=1, tag_layers=1, batch_norm_group_size=4,
        ),
        train=replace(config.train, global_batch_size=8, max_micro_batch_size=4, ema_decay=0.9),
    )  # fmt: skip


def step_on(device: torch.device, config: Config, watch, items: int = 8) -> None:
    """The second of two steps, metrics and all, under `watch`; the first makes what lasts."""
    model = model_of(config, NUM_TAGS).to(device)
    optimizer = build_optimizer(model, config.optim)
    job = training_job(config, BareSession(device, model), model, optimizer)
    micro_batches: list[Batch] = noise(config, NUM_TAGS)[1]
    if device.type == "cuda":
        micro_batches = [batch.pin_memory() for batch in micro_batches]
    counts = Counts(items, 8 * config.tags.max_tags, 0, 0)
    train_step(job, micro_batches, counts, log=True)
    with watch:
        train_step(job, micro_batches, counts, log=True)


@pytest.fixture
def without_autocast(monkeypatch):
    """Which the model and the loss turn off, and which does not know "meta" at all."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.mark.parametrize("name", ["demo.yaml", "ls.yaml", "nuswide.yaml"])
@pytest.mark.parametrize("items", [8, 7])  # the model is not told which rows are valid, or it is
def test_a_step_reads_nothing_back(name, items, without_autocast):
    copies = _Copies()
    step_on(torch.device("meta"), tiny(name), copies, items)
    assert copies.blocking == []


def test_what_is_summed_over_a_split_is_not_read_back_batch_by_batch(without_autocast):
    config, device = tiny("demo.yaml"), torch.device("meta")
    model = model_of(config, NUM_TAGS).to(device).eval()
    batch = noise(config, NUM_TAGS)[1][0].to(device)
    copies = _Copies()
    with copies, torch.no_grad():
        prediction = model(**batch.inputs())
        sums = metric_sums(prediction, batch, 0.5, NUM_TAGS) | binned_sums(prediction, batch)
    assert copies.blocking == []
    assert {value.dtype for value in sums.values()} == {torch.float64}


def test_what_is_read_back_is_noticed():
    x = torch.zeros(3, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        x.sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        x[x > 0]
    copies = _Copies()
    with copies:
        torch.zeros(3).to("meta", non_blocking=True)
        torch.zeros(3, device="meta").copy_(torch.zeros(3), non_blocking=True)
        assert copies.blocking == []
        torch.zeros(3).to("meta")
        torch.tensor([1.0], device="meta")
        torch.zeros(3, device="meta").copy_(torch.zeros(3))
    assert len(copies.blocking) >= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["demo.yaml", "ls.yaml", "nuswide.yaml"])
def test_cuda_finds_no_synchronisation(name):
    class Strict:
        def __enter__(self) -> None:
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_: object) -> None:
            torch.cuda.set_sync_debug_mode("default")

    step_on(torch.device("cuda"), tiny(name), Strict())
