"""A whole split scored: the same however it is cut into batches and over ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from magneto_dist.batch import Batch
from magneto_dist.config import AugmentConfig, Config, DataConfig, LossConfig, ModelConfig
from magneto_dist.config import TagsConfig as Tags
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources.demo import VOCABULARY
from magneto_dist.evaluation import Example, evaluate_model
from magneto_dist.loss import count_for_loss, ets_loss
from magneto_dist.model.magneto import build_model
from magneto_dist.world import World

CPU = torch.device("cpu")
NUM_ITEMS = 22
MODEL = ModelConfig(
    d_model=16, num_heads=2, d_ff=32, tag_layers=2, backbone="resnet18", backbone_stages=2
)
CONFIG = Config(
    model=MODEL,
    augment=AugmentConfig(image_size=32),
    tags=Tags(max_tags=4),  # fewer than most items have: some targets find no slot
    data=DataConfig(num_workers=0, decoder="cpu"),
)


@pytest.fixture(scope="module")
def dataset(demo_shards: Path) -> Dataset:
    return Dataset.open(str(demo_shards))


@pytest.fixture(scope="module")
def model(dataset: Dataset) -> nn.Module:
    """In float64, so that sums in another order stay equal; not trained, but no constant."""
    torch.manual_seed(0)
    model = build_model(MODEL, len(dataset.vocabulary)).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(("image_head", "tag_head", "gate")):
                weight.mul_(4)
    return model


def batches(dataset: Dataset, batch_size: int, rank: int = 0, num_ranks: int = 1) -> list[Batch]:
    world = World(rank, num_ranks, rank, num_ranks)
    plan = BatchPlan.derive(batch_size * num_ranks, num_ranks, batch_size, group_size=1)
    loader = Loader(dataset, "validation", CONFIG, world, plan, training=False)
    return list(loader.batches(1, loader.steps_per_epoch))


def score(
    model: nn.Module,
    of_rank: list[Batch],
    config: Config = CONFIG,
    num_examples: int = 0,
    **options,
) -> tuple[dict, list[Example]]:
    options = {"reduce": lambda packed: packed, "num_tags": len(VOCABULARY), **options}
    metrics, _, examples = evaluate_model(
        model, of_rank, device=CPU, config=config, num_examples=num_examples, **options
    )
    return metrics, examples


def assert_equal(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_equal(got[name], value)
        else:
            assert got[name] == (value if value is None else pytest.approx(value, rel=1e-9)), name


@pytest.fixture(scope="module")
def whole(dataset: Dataset, model: nn.Module) -> dict:
    return score(model, batches(dataset, NUM_ITEMS))[0]


def test_metrics_do_not_depend_on_the_batch_size(
    dataset: Dataset, model: nn.Module, whole: dict
) -> None:
    assert whole["items"] == NUM_ITEMS
    assert whole["targets_cut"] > 0
    assert 0 < whole["final"]["paper"]["f1"] < 1
    for batch_size in (3, 16, 50):  # the last batch is short, or most of it padding
        assert_equal(score(model, batches(dataset, batch_size))[0], whole)


def test_metrics_do_not_depend_on_the_number_of_ranks(
    dataset: Dataset, model: nn.Module, whole: dict
) -> None:
    sums_of_ranks: list[Tensor] = []

    def reduce(packed: Tensor) -> Tensor:
        sums_of_ranks.append(packed)
        return torch.stack(sums_of_ranks).sum(0)

    for rank in range(3):  # the last rank's evaluation sees the sums of all
        metrics, _ = score(model, batches(dataset, 3, rank, num_ranks=3), reduce=reduce)
    assert len(sums_of_ranks) == 3
    assert_equal(metrics, whole)


@pytest.mark.parametrize("kind", ["bce", "bce-dice"])
@pytest.mark.parametrize("normalisation", ["slots", "tags"])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_loss_is_that_of_the_whole_split_at_once(
    dataset: Dataset, model: nn.Module, kind: str, normalisation: str, auxiliary: bool
) -> None:
    config = LossConfig(kind=kind, auxiliary=auxiliary, normalisation=normalisation)  # type: ignore[arg-type]
    (whole,) = batches(dataset, NUM_ITEMS)
    with torch.no_grad():
        prediction = model(**whole.inputs())
    expected = ets_loss(prediction, whole, count_for_loss(whole), config).total.item()
    got, _ = score(model, batches(dataset, 5), replace(CONFIG, loss=config))
    assert got["loss"] == pytest.approx(expected, rel=1e-9)


def test_threshold_is_the_configured_one(dataset: Dataset, model: nn.Module) -> None:
    low = replace(CONFIG, train=replace(CONFIG.train, threshold=0.0))
    got, _ = score(model, batches(dataset, 16), low)
    for head in ("final", "image", "tag"):  # every tag is predicted
        assert got[head]["paper"]["precision"] == got[head]["strict"]["precision"] < 1
    full_recall = [
        replace(batch, targets_cut=batch.targets_cut * 0) for batch in batches(dataset, 16)
    ]
    assert score(model, full_recall, low)[0]["final"]["paper"]["recall"] == 1


def test_model_comes_back_in_the_mode_it_was_in(dataset: Dataset, model: nn.Module) -> None:
    of_rank = batches(dataset, 16)
    for is_training in (True, False):
        model.train(is_training)
        first, _ = score(model, of_rank)
        assert model.training is is_training
        assert_equal(score(model, of_rank)[0], first)  # no dropout, no statistics moved
    broken = nn.Module().train()
    with pytest.raises(TypeError, match="tag_ids"):
        score(broken, of_rank)
    assert broken.training


def test_examples_are_the_first_items_with_their_real_tags(
    dataset: Dataset, model: nn.Module
) -> None:
    _, examples = score(model, batches(dataset, 3), num_examples=7)
    (whole,) = batches(dataset, NUM_ITEMS)
    with torch.no_grad():
        prediction = model(**whole.inputs())
    assert [example.key for example in examples] == list(whole.keys[:7])
    alpha = prediction.alpha
    for row, example in enumerate(examples):
        real = whole.tag_mask[row]
        assert 1 <= len(example.tag_ids) == int(real.sum())
        assert torch.equal(example.tag_ids, whole.tag_ids[row, real])
        assert torch.equal(example.target, whole.target[row, real])
        torch.testing.assert_close(
            example.probability, prediction.probability("final")[row, real].float()
        )
        assert alpha is not None
        assert example.alpha is not None
        torch.testing.assert_close(example.alpha, alpha[row, real].float())
        assert example.pixels is not None
        assert whole.pixels is not None
        assert torch.equal(example.pixels, whole.pixels[row])


def test_rows_of_padding_are_no_examples(dataset: Dataset, model: nn.Module) -> None:
    _, examples = score(model, batches(dataset, 50), num_examples=50)
    assert len(examples) == NUM_ITEMS
