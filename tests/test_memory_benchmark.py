"""What the benchmark of memory says, against memory that was really taken."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from magneto_dist.config import AugmentConfig, Config, ModelConfig, TagsConfig, TrainConfig
from magneto_dist.training.optim import build_optimizer
from memory import ASSUMED, Case, largest_fit, row_of
from predicted_memory import StepMemory, kept_by_forward, predict
from step_memory import BareSession, measure, model_of, noise, take_steps, training_job

NUM_TAGS = 1000
CONFIG = Config(
    augment=AugmentConfig(image_size=64),
    tags=TagsConfig(max_tags=16),
    model=ModelConfig(
        d_model=64,
        num_heads=4,
        d_ff=256,
        tag_layers=1,
        image_layers=1,
        backbone="resnet18",
        backbone_stages=3,
        frozen_stages=2,
        batch_norm_group_size=8,
    ),
    train=TrainConfig(global_batch_size=32, max_micro_batch_size=16),
)


def with_train(**settings: object) -> Config:
    return replace(CONFIG, train=replace(CONFIG.train, **settings))  # type: ignore[arg-type]


def peak_of_allocations(call: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator has given out at once during `call`, by its own count.

    The profiler is told of every allocation by the allocator itself; the tracker listens to
    operators. They share nothing. Left out is what oneDNN takes for itself inside the backward pass
    of a convolution, which no tensor shows.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    results = profiled.profiler.kineto_results  # type: ignore[union-attr]
    changes = []
    events = [(event, "") for event in results.experimental_event_tree()]
    while events:
        event, parent = events.pop()
        events += [(child, event.name) for child in event.children]
        if event.tag.name == "Allocation":
            fields = event.extra_fields
            changes.append((event.start_time_ns, fields.ptr, fields.alloc_size, parent))
    held = peak = 0
    workspaces = set()
    for _, address, change, parent in sorted(changes, key=lambda found: found[0]):
        if change > 0 and parent == "aten::convolution_backward":
            workspaces.add(address)
        elif change < 0 and address in workspaces:
            workspaces.remove(address)
        else:
            held += change
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("recomputes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_prediction_is_what_a_cpu_allocates(recomputes):
    config = with_train(activation_checkpointing=recomputes)
    batches = noise(config, NUM_TAGS)
    model = model_of(config, NUM_TAGS)
    with torch.no_grad():
        model(**batches[0][0].inputs())  # folds the frozen stages
    gc.collect()
    optimizer = build_optimizer(model, config.optim)
    job = training_job(config, BareSession(torch.device("cpu"), model), model, optimizer)
    found = peak_of_allocations(lambda: take_steps(job, batches))
    parts = predict(config, NUM_TAGS, as_gpu=False).parts()
    made = ("gradients", "momentum", "activations", "temporaries")
    assert sum(parts[name] for name in made) == pytest.approx(found, rel=0.03)


def test_forward_keeps_what_torch_keeps_on_fakes_of_a_gpu():
    config = with_train(precision="fp16")
    as_predicted, by_torch = (kept_by_forward(config, NUM_TAGS, d) for d in ("cpu", "cuda"))
    assert as_predicted == pytest.approx(by_torch, rel=0.01)


@pytest.mark.slow
def test_parts_of_a_prediction_add_up_and_are_what_the_settings_make_them():
    whole = predict(with_train(max_micro_batch_size=32), NUM_TAGS)
    cut = predict(CONFIG, NUM_TAGS)
    half = predict(with_train(precision="fp16", activation_checkpointing=True), NUM_TAGS)
    model = model_of(CONFIG, NUM_TAGS)
    trained = [p for p in model.parameters() if p.requires_grad]
    for memory in (whole, cut, half):
        assert memory.momentum == memory.trained_parameters == memory.all_gradients
        assert memory.trained_parameters == 4 * sum(p.numel() for p in trained)
        assert 0 <= memory.gradients <= memory.all_gradients
        assert 0 < memory.folded_copy <= memory.frozen_parameters
        assert min(memory.parts().values()) >= 0
        assert memory.peak == sum(memory.parts().values())
    assert cut.gradients == cut.all_gradients  # the first micro-batch has left them
    assert whole.batch == pytest.approx(2 * cut.batch, rel=0.01)
    assert cut.batch >= 16 * 3 * 64 * 64
    assert 0.45 < cut.activations / whole.activations < 0.65
    assert half.activations < 0.8 * cut.activations


@pytest.mark.parametrize("bytes_per_row", [30_000_000, 7_000_000, 11_111_111])
def test_largest_micro_batch_fits_and_one_group_more_does_not(bytes_per_row):
    asked: dict[int, int] = {}
    budget = sum(size for size, _ in ASSUMED.values()) + 2_000_000_000

    def predicted(case: Case) -> StepMemory:
        """A line with a kink: below the global batch there are gradients of the one before."""
        gradients = 100_000_000 if case.micro_batch < 32 else 0
        parts = dict.fromkeys((field.name for field in fields(StepMemory)), 0)
        size = bytes_per_row * case.micro_batch
        memory = StepMemory(**{**parts, "activations": size, "gradients": gradients})
        asked[case.micro_batch] = row_of(case, memory, budget)["total"]
        return memory

    found = largest_fit(CONFIG, predicted, "fp16", False, budget)
    size = found["micro_batch"]
    assert size % CONFIG.model.batch_norm_group_size == 0
    assert asked[size] == found["total"] <= budget < asked[size + 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_prediction_is_what_a_gpu_allocates(precision):
    config = with_train(precision=precision)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        measured = process.submit(measure, config, NUM_TAGS, None).result()
    # Workspaces are large beside a small model.
    predicted = predict(config, NUM_TAGS).peak
    assert predicted == pytest.approx(measured.allocated, abs=100_000_000, rel=0.1)
