"""The parts of a training run: its data, how batches are cut, its model and optimizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from magneto_dist.config import Config
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.randomness import seed_for
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.demo import ensure_demo
from magneto_dist.errors import InputError
from magneto_dist.model.backbone import recompute_activations
from magneto_dist.model.embedding import load_tag_embedding
from magneto_dist.model.encoder import pack_tags
from magneto_dist.model.magneto import build_model
from magneto_dist.training.checkpoint import Progress, load_weights
from magneto_dist.training.optim import build_optimizer
from magneto_dist.training.resume import initialise_from
from magneto_dist.training.session import Session


def open_data(config: Config) -> Dataset:
    """The data set that `config` names, with what training needs.

    Raises:
        InputError: items, pictures or labels are missing.
    """
    path = config.data.path or str(ensure_demo())
    dataset = Dataset.open(path, config.data.cache_dir, config.data.cache_gb)
    for split in ("train", "validation"):
        if not dataset.splits.get(split) or dataset.num_samples(split) == 0:
            raise InputError(
                f"{path}: training needs items in the split {split!r}; it has none: build it with a"
                " larger --validation_fraction, or cut it anew with `launchers/shards.py split`"
            )
        num_unlabelled = dataset.num_samples(split) - dataset.num_labelled(split)
        if num_unlabelled and config.train.objective == "important":
            raise InputError(
                f"{path}: {num_unlabelled} items of {split!r} have no 'important' labels; train on"
                " labelled items, or use launchers/pretrain.py, which needs none"
            )
    if not dataset.has_images and config.model.sees_pictures:
        raise InputError(
            f"{path} holds no pictures, and --model.kind {config.model.kind} looks at them; use"
            " tf-t or ff"
        )
    return dataset


def derive_plan(config: Config, session: Session, start: Progress) -> BatchPlan:
    """How global batches are cut over the ranks; as before, where there are as many."""
    size = config.train.global_batch_size
    if start.step and start.num_ranks == session.world.num_ranks:
        return BatchPlan(size, start.num_ranks, start.micro_batch_size, start.micro_steps)
    return BatchPlan.derive(
        global_batch_size=size,
        num_ranks=session.world.num_ranks,
        max_micro_batch_size=config.train.max_micro_batch_size,
        group_size=config.model.batch_norm_group_size,
    )


def initial_model(config: Config, dataset: Dataset, checkpoint: Path | None) -> nn.Module:
    """The model that a run begins or goes on with.

    Raises:
        InputError: weights or vectors cannot be read or do not fit.
    """
    torch.manual_seed(seed_for(config.seed, "initial weights"))
    model = _build(config, dataset, has_weights=checkpoint is not None)
    if checkpoint:
        load_weights(checkpoint, model)
    elif config.init_from:
        initialise_from(model, Path(config.init_from), config, dataset.vocabulary)
    return model


def prepare(
    config: Config, session: Session, model: nn.Module, plan: BatchPlan
) -> tuple[nn.Module, Any]:
    """The model as `session` trains it, and its optimizer."""
    if config.tags.trim_padding and not config.train.compile and session.is_plain:
        pack_tags(model)
    return session.prepare(model, build_optimizer(model, config.optim), plan)


def _build(config: Config, dataset: Dataset, has_weights: bool) -> nn.Module:
    supervised = config.train.objective == "important"
    settings = config.model
    if has_weights:  # a checkpoint's; files that the run began with may be gone
        settings = replace(settings, backbone_weights="none", tag_embedding_init=None)
    model = build_model(settings, len(dataset.vocabulary), gate=supervised)
    if settings.tag_embedding_init:
        path = Path(settings.tag_embedding_init)
        coverage = load_tag_embedding(model, dataset.vocabulary, path)
        print(f"{path}: vectors for {coverage:.1%} of {len(dataset.vocabulary)} tags")
    if config.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.train.param_dtype == "float64":
        model = model.double()
    if config.train.activation_checkpointing:
        recompute_activations(model)
    if config.train.compile:
        # The compiler takes torch's fused encoder layer for one whose output has other strides.
        torch.backends.mha.set_fastpath_enabled(False)
        model.compile()
    return model
