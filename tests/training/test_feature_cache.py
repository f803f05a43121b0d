"""Cached features are the live ones; what they depend on; room for them; refusals."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_photographs import PHOTOS, WEIGHTS

from magneto_dist.batch import Batch
from magneto_dist.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    TagsConfig,
)
from magneto_dist.data.feature_files import view_of
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError, PreemptedError
from magneto_dist.model.backbone import build_backbone
from magneto_dist.model.image_stream import frozen_regions
from magneto_dist.model.magneto import MAGNeto, build_model
from magneto_dist.training import feature_key
from magneto_dist.training.feature_cache import CachedFeatures, cached_features, ranks_that_fill
from magneto_dist.training.feature_key import cache_folder, ingredients
from magneto_dist.training.heartbeat import Whereabouts
from magneto_dist.training.session import Session
from magneto_dist.world import World
from processes import run

VIEWS = 3
CONFIG = Config(
    seed=5,
    data=DataConfig(
        num_workers=0, decoder="cpu", num_streams=4, feature_views=VIEWS, feature_seed=11
    ),
    augment=AugmentConfig(image_size=32),
    tags=TagsConfig(max_tags=8),
    model=ModelConfig(
        d_model=16,
        num_heads=2,
        d_ff=16,
        tag_layers=1,
        image_layers=1,
        backbone="resnet18",
        backbone_stages=2,
        frozen_stages="all",
        batch_norm_group_size=4,
    ),
)
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}


def with_(config: Config, section: str, **changes: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


def model_of(config: Config, dataset: Dataset) -> MAGNeto:
    torch.manual_seed(0)
    model = build_model(config.model, len(dataset.vocabulary))
    assert isinstance(model, MAGNeto)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def build(
    config: Config,
    dataset: Dataset,
    model: MAGNeto,
    stopped: Callable[[], bool] = lambda: False,
) -> CachedFeatures:
    session, decoder = Session(config.train), config.data.decoder
    return cached_features(config, session, dataset, decoder, model, stopped, Whereabouts())


def loader(dataset: Dataset, split: str, config: Config, cached: CachedFeatures | None) -> Loader:
    features = None if cached is None else getattr(cached, split)
    plan = BatchPlan.derive(16, 1, 16, group_size=4)
    training = split == "train"
    return Loader(dataset, split, config, World(), plan, training=training, features=features)


def epoch_of(each: Loader, epoch: int) -> list[Batch]:
    steps = each.steps_per_epoch
    return list(each.batches(1 + epoch * steps, (epoch + 1) * steps))


def features_by_id(model: MAGNeto, batches: list[Batch]) -> dict[int, torch.Tensor]:
    found = {}
    for batch in batches:
        assert batch.pixels is not None
        features = frozen_regions(model.image_stream.backbone, batch.pixels)
        found |= dict(zip(batch.sample_ids.tolist(), features, strict=True))
    return found


def assert_cached_is_live(config: Config, dataset: Dataset) -> None:
    """Training in two epochs, and evaluation: features and what the model makes of them."""
    model = model_of(config, dataset)
    cached = build(config, dataset, model)
    rounded = {config.data.feature_dtype, config.model.frozen_precision} & ROUNDING.keys()
    rounding = max(ROUNDING[name] for name in rounded)
    # What the live pipeline shows in its epoch v, with the seed of the views.
    live_config = replace(config, seed=config.data.feature_seed)
    live = [
        features_by_id(model, epoch_of(loader(dataset, "train", live_config, None), view))
        for view in range(VIEWS)
    ]
    seen = set()
    for epoch in (0, 1):
        batches = epoch_of(loader(dataset, "train", config, cached), epoch)
        plain = epoch_of(loader(dataset, "train", config, None), epoch)
        for batch, other in zip(batches, plain, strict=True):
            assert batch.pixels is None
            assert torch.equal(batch.tag_ids, other.tag_ids)  # tag adding & dropping is as ever
            assert (batch.keys, batch.rejects) == (other.keys, other.rejects)
            views = view_of(batch.sample_ids.numpy(), epoch, VIEWS, config.data.feature_seed)
            ids = batch.sample_ids.tolist()
            for row in batch.sample_valid.nonzero().flatten().tolist():
                wanted = live[views[row]][ids[row]]
                assert_close(batch.features[row].float(), wanted, rounding)
                seen.add((ids[row], int(views[row])))
    assert len(seen) == 2 * dataset.num_samples("train")  # another view in the other epoch
    model.eval()
    with torch.no_grad():
        batches = epoch_of(loader(dataset, "validation", config, cached), 0)
        plain = epoch_of(loader(dataset, "validation", config, None), 0)
        for batch, other in zip(batches, plain, strict=True):
            ours, theirs = model(**batch.inputs()), model(**other.inputs())
            real = batch.tag_mask
            torch.testing.assert_close(
                ours.probability("final")[real],
                theirs.probability("final")[real],
                rtol=0,
                atol=2 * rounding,
            )


def assert_close(ours: torch.Tensor, live: torch.Tensor, rounding: float) -> None:
    """Half of the last bit that is kept, and what sums in another order may differ by."""
    noise = 1e-5 * float(live.abs().max())
    torch.testing.assert_close(ours, live, rtol=rounding, atol=max(noise, 2.0**-24))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_cached_features_are_the_live_ones_to_rounding(
    demo_shards: Path, tmp_path: Path, dtype: str
) -> None:
    config = with_(CONFIG, "data", cache_dir=str(tmp_path / "Größe 图"), feature_dtype=dtype)
    assert_cached_is_live(config, Dataset.open(str(demo_shards)))


def test_cached_features_of_a_backbone_in_bf16_are_its_live_ones(
    demo_shards: Path, tmp_path: Path
) -> None:
    config = with_(CONFIG, "data", cache_dir=str(tmp_path))
    config = with_(config, "model", frozen_precision="bf16")
    assert_cached_is_live(config, Dataset.open(str(demo_shards)))


def test_cached_features_of_pictures_that_dali_decodes_are_its_live_ones(
    demo_shards: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    dataset = Dataset.open(str(demo_shards))
    config = with_(CONFIG, "data", cache_dir=str(tmp_path))
    build(config, dataset, model_of(config, dataset))
    ours = folders_in(tmp_path)
    assert_cached_is_live(with_(config, "data", decoder="dali_cpu"), dataset)
    (folder,) = folders_in(tmp_path) - ours
    views = [(each / "train-0000.npy").read_bytes() for each in (*ours, folder)]
    assert views[0] != views[1]  # DALI resizes a bit differently: not taken for one another


@pytest.mark.slow
@pytest.mark.skipif(
    not (PHOTOS.exists() and WEIGHTS.exists()),
    reason=f"the photographs {PHOTOS} and the weights {WEIGHTS} are not both here",
)
def test_cached_features_of_photographs_are_the_live_ones_to_rounding(tmp_path: Path) -> None:
    data = tmp_path / "shards"
    run("shards.py", "build", "table", f"--table={PHOTOS}", f"--out={data}")
    config = with_(CONFIG, "data", cache_dir=str(tmp_path))
    config = with_(config, "augment", image_size=64)
    config = with_(
        config,
        "model",
        backbone="mobilenet_v2",
        backbone_stages=None,
        backbone_weights=str(WEIGHTS),
    )
    assert_cached_is_live(config, Dataset.open(str(data)))


CHANGES: dict[str, Callable[[Config], Config]] = {
    "transform": lambda c: with_(c, "augment", crop_scale_min=0.5),
    "view_seed": lambda c: with_(c, "data", feature_seed=12),
    "dtype": lambda c: with_(c, "data", feature_dtype="bf16"),
    "max_image_megapixels": lambda c: with_(c, "data", max_image_megapixels=50.0),
    "computed_in": lambda c: with_(c, "train", precision="bf16"),
    "frozen_dtype": lambda c: with_(c, "model", frozen_precision="bf16"),
    "backbone": lambda c: with_(c, "model", backbone_stages=1),
}
NO_CHANGES: dict[str, Callable[[Config], Config]] = {
    "seed": lambda c: replace(c, seed=6),
    "views": lambda c: with_(c, "data", feature_views=8),
    "batch": lambda c: with_(c, "train", global_batch_size=8),
    "objective": lambda c: with_(c, "train", objective="relevance"),
    "head": lambda c: with_(c, "model", d_ff=32),
}


def key_of(config: Config, dataset: Dataset, decoder: str = "cpu") -> tuple[str, dict[str, Any]]:
    torch.manual_seed(0)
    made_of = ingredients(config, dataset, decoder, build_backbone(config.model))
    return cache_folder(config, made_of).name, made_of


def test_the_key_changes_with_each_ingredient(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.open(str(demo_shards))
    key, made_of = key_of(CONFIG, dataset)
    changed = {name: key_of(change(CONFIG), dataset) for name, change in CHANGES.items()}
    for name, change in NO_CHANGES.items():
        assert key_of(change(CONFIG), dataset)[0] == key, name
    changed["decoder"] = key_of(CONFIG, dataset, "dali_cpu")

    backbone = build_backbone(CONFIG.model)
    torch.manual_seed(0)
    backbone = build_backbone(CONFIG.model)
    backbone.stages[0][0].weight.data[0, 0, 0, 0] += 1e-3
    other = ingredients(CONFIG, dataset, "cpu", backbone)
    changed["weights"] = cache_folder(CONFIG, other).name, other

    shards = dataset.shards("train")
    edited = {**dataset.splits, "train": (replace(shards[0], sha256="0" * 64), *shards[1:])}
    changed["data"] = key_of(CONFIG, replace(dataset, splits=edited))

    with monkeypatch.context() as patched:
        patched.setattr(feature_key, "version", lambda package: "0")
        changed["versions"] = key_of(CONFIG, dataset)
    with monkeypatch.context() as patched:
        patched.setattr(feature_key, "_SOURCES", ("batch.py",))
        changed["code"] = key_of(CONFIG, dataset)

    assert changed.keys() == made_of.keys()
    assert len({key, *(other for other, _ in changed.values())}) == len(changed) + 1
    for name, (_, other) in changed.items():
        assert other[name] != made_of[name], name
    assert key_of(CONFIG, Dataset.open(str(demo_shards)))[0] == key


def folders_in(cache: Path) -> set[Path]:
    """All folders of features."""
    return {path for path in (cache / "features").iterdir() if path.is_dir()}


def files_of(cache: Path) -> dict[str, bytes]:
    """What is in the one folder of features, but for the lock."""
    (folder,) = folders_in(cache)
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_a_signal_stops_between_chunks_and_keeps_them(demo_shards: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(str(demo_shards))
    config = with_(CONFIG, "data", cache_dir=str(tmp_path))
    model = model_of(config, dataset)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PreemptedError, match="those that are finished are kept"):
        build(config, dataset, model, stopped=lambda: True)
    (folder,) = folders_in(tmp_path)
    assert len(list(folder.glob(".*.log"))) == 1
    assert not list(folder.glob("*.npy"))
    build(config, dataset, model)
    names = [f"train-{view:04}" for view in range(VIEWS)] + ["validation"]
    assert files_of(tmp_path).keys() == {f"{n}.{end}" for n in names for end in ("npy", "json")}
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    build(config, dataset, model)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")} == before
    # Statistics of batch norms among them.
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("nodes", "sees", "fill"),
    [
        ([0, 0], [True, True], [0, 1]),
        ([0, 0, 1, 1], [True, True, False, False], [0, 1]),  # as ranks 0 and 1 see their own disk
        ([0, 0, 1, 1], [False, False, True, True], [2, 3]),  # as ranks 2 and 3 see theirs
        ([0, 0, 1, 1], [True] * 4, [0, 1]),  # shared: one machine writes
        ([0, 1, 2, 2], [False, True, True, True], [1]),
    ],
)
def test_the_ranks_of_the_first_machine_that_sees_a_folder_fill_it(
    nodes: list[int], sees: list[bool], fill: list[int]
) -> None:
    assert ranks_that_fill(nodes, sees) == fill


def test_features_too_large_for_fp16_are_refused(demo_shards: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(str(demo_shards))
    config = with_(CONFIG, "data", cache_dir=str(tmp_path))
    model = model_of(config, dataset)
    last = [m for m in model.image_stream.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    last[-1].weight.data.fill_(1e7)
    with pytest.raises(InputError, match=r"not finite numbers .*set --data.feature_dtype bf16"):
        build(config, dataset, model)
    build(with_(config, "data", feature_dtype="bf16"), dataset, model)


def test_no_room_is_said_before_the_first_picture(
    demo_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.open(str(demo_shards))
    config = with_(CONFIG, "data", cache_dir=str(tmp_path))
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(InputError, match=r"cached features .* needs 0.0\d GB in .* make room"):
        build(config, dataset, model_of(config, dataset))
    (folder,) = folders_in(tmp_path)
    assert list(folder.iterdir()) == []


def test_the_features_of_a_run_that_lives_stay_and_others_make_room(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Dataset.open(str(demo_shards))

    def features(seed: int, gb: float = 1.0) -> tuple[CachedFeatures, Path]:
        before = folders_in(tmp_path) if (tmp_path / "features").exists() else set()
        config = with_(CONFIG, "data", feature_seed=seed, feature_cache_gb=gb)
        config = with_(config, "data", cache_dir=str(tmp_path))
        made = build(config, dataset, model_of(config, dataset))
        (folder,) = folders_in(tmp_path) - before
        return made, folder

    used, first = features(11)
    assert re.search(r"cached features: 0.00\d+ GB to be written to", capsys.readouterr().out)
    second, third = features(12)[1], features(13)[1]
    for age_s, folder in ((30, first), (20, second), (10, third)):
        os.utime(folder, (0, time.time() - age_s))
    size_gb = sum(path.stat().st_size for path in first.iterdir()) / 1e9
    fourth = features(14, gb=3.5 * size_gb)[1]
    assert folders_in(tmp_path) == {first, third, fourth}
    said = capsys.readouterr().out
    assert f"removed cached features: {second}, " in said
    with pytest.raises(
        InputError, match=r"that other runs use, .* more than --data.feature_cache_"
    ):
        features(15, gb=1.5 * size_gb)
    assert {first, third, fourth} < folders_in(tmp_path)
    assert used.train.read(0, torch.tensor([0]), torch.tensor([True]))[0].any()


def test_a_folder_that_cannot_make_room_is_the_one_that_is_named(
    demo_shards: Path, tmp_path: Path
) -> None:
    dataset = Dataset.open(str(demo_shards))
    config = with_(CONFIG, "data", cache_dir=str(tmp_path))
    build(config, dataset, model_of(config, dataset))
    (idle,) = folders_in(tmp_path)
    # A file where it would be moved to before it is removed; permissions would not stop root.
    idle.with_name(f".{idle.name}.removed").touch()
    size_gb = sum(path.stat().st_size for path in idle.iterdir()) / 1e9
    other = with_(config, "data", feature_seed=12, feature_cache_gb=1.5 * size_gb)
    with pytest.raises(InputError, match=f"^{re.escape(str(idle))}: Not a directory: cached feat"):
        build(other, dataset, model_of(other, dataset))
    assert idle.is_dir()


@pytest.mark.parametrize(
    ("section", "changes", "reason"),
    [
        ("model", {"frozen_stages": 1}, "features move while the backbone is trained"),
        ("model", {"frozen_stages": 4, "backbone_stages": None}, "set that to all"),
        ("model", {"frozen_batch_norm": "drifting"}, "whose statistics move; take fixed"),
        ("model", {"kind": "tf-t"}, "which looks at no pictures"),
        ("model", {"kind": "ff"}, "which looks at no pictures"),
        ("data", {"constant_image": True}, "which reads no pictures"),
        ("data", {"stages": ("os:getcwd",)}, "which may change pictures"),
        ("data", {"feature_views": -1}, "at least 0"),
    ],
)
def test_refusals_name_the_setting(section: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=r"--data.feature_views -?\d: must be .*" + reason):
        with_(CONFIG, section, **changes)
