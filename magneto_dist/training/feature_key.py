"""What cached features depend on: the same folder for the same features, and for no others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from magneto_dist.config import Config
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError
from magneto_dist.model.backbone import Backbone

_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "simplejpeg")
_SOURCES = (
    "data/augment.py",
    "data/auto_augment.py",
    "data/dali_pipeline.py",
    "data/decode_cpu.py",
    "data/decode_dali.py",
    "data/encoded_images.py",
    "data/image_bytes.py",
    "data/randomness.py",
    "data/sample.py",
    "data/stream.py",
    "model/backbone.py",
    "model/folding.py",
    "model/image_stream.py",
    "training/feature_network.py",
)
"""Files of ours that decide what the features are."""


def ingredients(
    config: Config, dataset: Dataset, decoder: str, backbone: Backbone
) -> dict[str, Any]:
    """Everything that the features of a view depend on, as JSON can hold it.

    Raises:
        InputError: the backbone is not frozen.
    """
    if backbone.frozen_norms_drift or any(p.requires_grad for p in backbone.parameters()):
        raise InputError(
            f"--data.feature_views {config.data.feature_views}: --model.frozen_stages"
            f" {config.model.frozen_stages} leaves stages of {config.model.backbone} that are"
            " trained; set it to all, or train on the pictures"
        )
    shards = [
        (split, shard.name, shard.num_samples, shard.num_bytes, shard.sha256)
        for split in ("train", "validation")
        for shard in dataset.shards(split)
    ]
    packages = [*_PACKAGES, *(["nvidia-dali-cuda130"] if decoder.startswith("dali") else [])]
    return {
        "data": _hash(
            shards,
            asdict(dataset.fields),
            dataset.vocabulary.sha256,
            dataset.ignores_unknown_tags,
        ),
        "backbone": [config.model.backbone, list(dict(backbone.stages.named_children()))],
        "weights": _weights_hash(backbone),
        "transform": asdict(config.augment),
        "max_image_megapixels": config.data.max_image_megapixels,
        "view_seed": config.data.feature_seed,
        "decoder": decoder,
        "dtype": config.data.feature_dtype,
        "computed_in": [config.train.param_dtype, config.train.precision, config.train.tf32],
        "frozen_dtype": str(backbone.frozen_dtype),
        "versions": {package: version(package) for package in packages},
        "code": _code_hash(),
    }


def cache_folder(config: Config, made_of: dict[str, Any]) -> Path:
    """Where features with these ingredients lie."""
    given = config.data.cache_dir
    cache = Path(given) if given else Path.home() / ".cache" / "magneto_dist"
    return cache / "features" / _hash(made_of)[:16]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _weights_hash(backbone: Backbone) -> str:
    sha = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _code_hash() -> str:
    package = Path(__file__).parent.parent
    return _hash([(package / name).read_text(encoding="utf-8") for name in _SOURCES])


def require_same(made_of_ranks: Sequence[dict[str, Any]]) -> None:
    """Compares the ingredients of all ranks.

    Raises:
        InputError: two ranks differ, and would read other features.
    """
    first = made_of_ranks[0]
    for rank, other in enumerate(made_of_ranks):
        for name, value in first.items():
            if other[name] != value:
                raise InputError(
                    f"the ranks differ in what cached features depend on, {name}: {value} on rank 0"
                    f" and {other[name]} on rank {rank}: install the same on every node"
                )
