"""What the values of our settings may be, section by section and together.

The dataclasses of `config.py` call these when they are made. All raise an InputError that names the
key, what was given, and what is allowed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from magneto_dist.errors import InputError

if TYPE_CHECKING:
    from magneto_dist.config import (
        AugmentConfig,
        CheckpointConfig,
        Config,
        DataConfig,
        LogConfig,
        LossConfig,
        ModelConfig,
        OptimConfig,
        TagsConfig,
        TrainConfig,
    )

_STAGE = re.compile(r"\w+(\.\w+)*:\w+")


def check_augment(augment: AugmentConfig) -> None:
    """See `AugmentConfig`."""
    _require(augment.image_size >= 1, "augment.image_size", augment.image_size, "at least 1")
    _require(
        0 < augment.crop_scale_min <= augment.crop_scale_max <= 1,
        "augment.crop_scale_min",
        augment.crop_scale_min,
        "0 < crop_scale_min <= crop_scale_max <= 1",
    )
    _require(
        augment.crop_aspect_max >= 1, "augment.crop_aspect_max", augment.crop_aspect_max, ">= 1"
    )
    _fraction("augment.flip_probability", augment.flip_probability)
    _fraction("augment.eval_crop_fraction", augment.eval_crop_fraction)
    _require(augment.eval_crop_fraction > 0, "augment.eval_crop_fraction", 0, "above 0")


def check_tags(tags: TagsConfig) -> None:
    """See `TagsConfig`."""
    _require(tags.max_tags >= 1, "tags.max_tags", tags.max_tags, "at least 1")
    for name in ("beta_add", "beta_drop", "irrelevant_ratio"):
        value = getattr(tags, name)
        _require(0 <= value <= 100, f"tags.{name}", value, "between 0 and 100")
    _fraction("tags.beta_drop", tags.beta_drop)


def check_data(data: DataConfig) -> None:
    """See `DataConfig`."""
    for name in data.stages:
        _require(_STAGE.fullmatch(name) is not None, "data.stages", name, "module:function")
    _require(
        data.num_workers is None or data.num_workers >= 0,
        "data.num_workers",
        data.num_workers,
        "None or at least 0",
    )
    for name in ("prefetch_batches", "dali_queue_depth"):
        _require(getattr(data, name) >= 1, f"data.{name}", getattr(data, name), "at least 1")
    _require(data.loader_timeout_s >= 0, "data.loader_timeout_s", data.loader_timeout_s, ">= 0")
    _require(
        data.num_streams >= 1 and data.num_streams & (data.num_streams - 1) == 0,
        "data.num_streams",
        data.num_streams,
        "a power of two",
    )
    _require(data.shuffle_window >= 1, "data.shuffle_window", data.shuffle_window, ">= 1")
    for name in ("feature_views", "feature_seed"):
        _require(getattr(data, name) >= 0, f"data.{name}", getattr(data, name), "at least 0")
    _require(
        not (data.feature_views and data.stages),
        "data.feature_views",
        data.feature_views,
        "0 with --data.stages, which may change pictures",
    )
    _require(
        not (data.feature_views and data.constant_image),
        "data.feature_views",
        data.feature_views,
        "0 with --data.constant_image true, which reads no pictures",
    )
    _fraction("data.max_bad_fraction", data.max_bad_fraction)
    _require(
        data.max_image_megapixels > 0,
        "data.max_image_megapixels",
        data.max_image_megapixels,
        "above 0",
    )
    for name in ("cache_gb", "feature_cache_gb"):
        _require(getattr(data, name) > 0, f"data.{name}", getattr(data, name), "above 0")
    _require(data.read_ahead_steps >= 0, "data.read_ahead_steps", data.read_ahead_steps, ">= 0")


def check_model(model: ModelConfig) -> None:
    """See `ModelConfig`."""
    for name in (
        "d_model",
        "num_heads",
        "d_ff",
        "image_layers",
        "tag_layers",
        "batch_norm_group_size",
    ):
        _require(getattr(model, name) >= 1, f"model.{name}", getattr(model, name), "at least 1")
    _require(
        model.d_model % model.num_heads == 0,
        "model.num_heads",
        model.num_heads,
        f"a divisor of model.d_model ({model.d_model})",
    )
    _require(0 <= model.dropout < 1, "model.dropout", model.dropout, "0 <= dropout < 1")
    _require(
        model.backbone_stages is None or model.backbone_stages >= 1,
        "model.backbone_stages",
        model.backbone_stages,
        "None or at least 1",
    )
    _require(
        model.frozen_stages == "all" or model.frozen_stages >= 0,
        "model.frozen_stages",
        model.frozen_stages,
        '"all" or at least 0',
    )
    rounds = model.frozen_precision in ("fp16", "bf16")
    _require(
        not (rounds and model.frozen_stages == 0),
        "model.frozen_precision",
        model.frozen_precision,
        "no or auto with --model.frozen_stages 0: nothing is frozen (--train.precision is for"
        " what is trained)",
    )
    _require(
        not (rounds and model.frozen_batch_norm == "drifting"),
        "model.frozen_precision",
        model.frozen_precision,
        "no or auto with --model.frozen_batch_norm drifting, whose statistics move in float32",
    )


def check_loss(loss: LossConfig) -> None:
    """See `LossConfig`."""
    _require(loss.dice_smoothing > 0, "loss.dice_smoothing", loss.dice_smoothing, "above 0")


def check_optim(optim: OptimConfig) -> None:
    """See `OptimConfig`."""
    _require(optim.lr > 0, "optim.lr", optim.lr, "above 0")
    _require(0 <= optim.momentum < 1, "optim.momentum", optim.momentum, "0 <= momentum < 1")
    for name in ("weight_decay", "warmup_steps", "clip_norm", "plateau_patience"):
        _require(getattr(optim, name) >= 0, f"optim.{name}", getattr(optim, name), "at least 0")
    _require(
        0 < optim.plateau_factor < 1,
        "optim.plateau_factor",
        optim.plateau_factor,
        "0 < plateau_factor < 1",
    )


def check_train(train: TrainConfig) -> None:
    """See `TrainConfig`."""
    for name in ("global_batch_size", "max_micro_batch_size", "epochs", "eval_every_epochs"):
        _require(getattr(train, name) >= 1, f"train.{name}", getattr(train, name), "at least 1")
    _require(
        train.param_dtype == "float32" or train.precision == "no",
        "train.param_dtype",
        train.param_dtype,
        "float32 with mixed precision",
    )
    _require(train.power_sgd_rank >= 1, "train.power_sgd_rank", train.power_sgd_rank, ">= 1")
    _require(
        train.power_sgd_start_step >= 2,
        "train.power_sgd_start_step",
        train.power_sgd_start_step,
        "at least 2",
    )
    _require(
        not (train.activation_checkpointing and train.compile),
        "train.activation_checkpointing",
        train.activation_checkpointing,
        "false with --train.compile true: the compiler fails on stages that run twice",
    )
    _require(0 <= train.ema_decay < 1, "train.ema_decay", train.ema_decay, "0 <= ema_decay < 1")
    _fraction("train.threshold", train.threshold)
    _require(
        train.collective_timeout_s >= 0,
        "train.collective_timeout_s",
        train.collective_timeout_s,
        "at least 0",
    )


def check_checkpoint(checkpoint: CheckpointConfig) -> None:
    """See `CheckpointConfig`."""
    _require(
        checkpoint.every_steps >= 1, "checkpoint.every_steps", checkpoint.every_steps, "at least 1"
    )
    _require(checkpoint.keep >= 1, "checkpoint.keep", checkpoint.keep, "at least 1")


def check_log(log: LogConfig) -> None:
    """See `LogConfig`."""
    _require(log.every_steps >= 1, "log.every_steps", log.every_steps, "at least 1")
    _require(log.pictures >= 0, "log.pictures", log.pictures, "at least 0")
    _require(log.profile_steps >= 0, "log.profile_steps", log.profile_steps, "at least 0")
    after = log.profile_after_steps
    _require(after >= 1, "log.profile_after_steps", after, "at least 1")


def check_config(config: Config) -> None:
    """Settings that are in no section, and what one section says of another."""
    _require(config.seed >= 0, "seed", config.seed, "at least 0")
    _require(
        config.max_steps is None or config.max_steps >= 1,
        "max_steps",
        config.max_steps,
        "None or at least 1",
    )
    _require(
        not config.train.activation_checkpointing
        or config.model.backbone_batch_norm in ("ghost", "frozen"),
        "train.activation_checkpointing",
        config.train.activation_checkpointing,
        f"false with --model.backbone_batch_norm {config.model.backbone_batch_norm}, whose"
        " statistics would move twice a step; take ghost or frozen",
    )
    _require(
        config.train.param_dtype == "float32"
        or config.model.frozen_precision not in ("fp16", "bf16"),
        "model.frozen_precision",
        config.model.frozen_precision,
        f"no or auto with --train.param_dtype {config.train.param_dtype}, which is for exactness",
    )
    if config.data.feature_views:
        reason = _no_features(config.model)
        _require(reason is None, "data.feature_views", config.data.feature_views, f"0 {reason}")


def _no_features(model: ModelConfig) -> str | None:
    """Why the features of pictures cannot be computed once."""
    if not model.sees_pictures:
        return f"with --model.kind {model.kind}, which looks at no pictures"
    if not model.backbone_is_frozen:
        return (
            f"with --model.frozen_stages {model.frozen_stages}, for features move while the"
            " backbone is trained; set that to all, or train on the pictures"
        )
    if model.frozen_batch_norm == "drifting":
        return "with --model.frozen_batch_norm drifting, whose statistics move; take fixed"
    return None


def _require(holds: bool, key: str, given: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"--{key} {given}: must be {allowed}")


def _fraction(key: str, value: float) -> None:
    _require(0 <= value <= 1, key, value, "between 0 and 1")
