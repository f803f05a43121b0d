"""Batches of real shards, decoded; what is said of ranks needs no processes, only `World`s."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from magneto_dist.batch import Batch, Reject
from magneto_dist.config import (
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    TagsConfig,
    TrainConfig,
)
from magneto_dist.data.ahead import made_ahead
from magneto_dist.data.loader import Loader
from magneto_dist.data.order import BatchPlan
from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError
from magneto_dist.world import World
from small_data import NUM_SAMPLES, VOCABULARY, key_of, make_sample

SLOTS = 8
SIZE = 24
TENSORS = ("tag_ids", "tag_mask", "target", "outlier", "sample_valid", "sample_ids", "pixels")
GREY = DataConfig(num_streams=4, shuffle_window=5, num_workers=0, constant_image=True)
CONFIG = Config(
    seed=3,
    data=DataConfig(
        num_streams=4, shuffle_window=5, num_workers=0, decoder="cpu", prefetch_batches=2
    ),
    augment=AugmentConfig(image_size=SIZE),
    tags=TagsConfig(max_tags=SLOTS),
)


def loader(
    dataset: Dataset,
    config: Config = CONFIG,
    *,
    batch_size: int = 16,
    rank: int = 0,
    num_ranks: int = 1,
    max_micro: int = 128,
    group_size: int = 4,
    split: str = "train",
    training: bool = True,
    **more,
) -> Loader:
    plan = BatchPlan.derive(batch_size, num_ranks, max_micro, group_size)
    world = World(rank, num_ranks, rank, num_ranks)
    return Loader(dataset, split, config, world, plan, training=training, **more)


def with_data(config: Config = CONFIG, **changes) -> Config:
    return replace(config, data=replace(config.data, **changes))


def assert_equal(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in (*TENSORS, "tags_cut", "targets_cut"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)
        names = ("keys", "step", "micro_step", "epoch", "rejects")
        assert [getattr(a, name) for name in names] == [getattr(b, name) for name in names]


def valid_ids(batches: Iterator[Batch] | Sequence[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.sample_ids[batch.sample_valid].tolist()]


def assert_blank(batch: Batch, row: int) -> None:
    assert not batch.sample_valid[row]
    assert batch.tag_ids[row].tolist() == [len(VOCABULARY)] * SLOTS
    flags = torch.stack([batch.tag_mask, batch.target, batch.outlier])
    assert not flags[:, row].any()
    assert batch.tags_cut[row] == batch.targets_cut[row] == 0
    assert batch.pixels is None or not batch.pixels[row].any()


# What a batch is --------------------------------------------------------------------------------


def test_a_batch_holds_what_batch_py_says(small_dataset):
    batches = list(loader(small_dataset, batch_size=16, max_micro=8).batches(1, 4))
    assert [(b.step, b.micro_step, b.epoch) for b in batches] == [
        (step, micro_step, 0) for step in range(1, 5) for micro_step in range(2)
    ]
    for batch in batches:
        assert batch.pixels is not None
        assert (batch.pixels.shape, batch.pixels.dtype) == ((8, 3, SIZE, SIZE), torch.uint8)
        for name in ("tag_ids", "tag_mask", "target", "outlier"):
            assert getattr(batch, name).shape == (8, SLOTS)
        for row, sample_id in enumerate(batch.sample_ids.tolist()):
            if sample_id < 0:
                assert batch.keys[row] == ""
                assert_blank(batch, row)
                continue
            sample = make_sample(("train", sample_id))
            assert batch.keys[row] == sample.key
            own = batch.tag_mask[row] & ~batch.outlier[row]
            tags = [VOCABULARY.tags[tag] for tag in batch.tag_ids[row][own].tolist()]
            assert set(tags) <= set(sample.tags)
            important = [t for t, flag in zip(sample.tags, sample.important, strict=True) if flag]
            targets = [VOCABULARY.tags[tag] for tag in batch.tag_ids[row][batch.target[row]]]
            assert sorted(targets) == sorted(important)
            assert batch.pixels[row].float().std() > 1
    assert sum((batch.sample_ids < 0).sum() for batch in batches) == 4


def test_evaluation_scores_each_sample_once_in_order_and_unchanged(small_dataset):
    evaluation = loader(small_dataset, batch_size=4, split="validation", training=False)
    batches = list(evaluation.batches(1, evaluation.steps_per_epoch))
    assert valid_ids(batches) == list(range(15))
    assert [batch.sample_valid.tolist() for batch in batches] == [[True] * 4] * 3 + [
        [True] * 3 + [False]
    ]
    for batch in batches:
        assert not batch.outlier.any()
        for row, sample_id in enumerate(batch.sample_ids[batch.sample_valid].tolist()):
            tags = make_sample(("validation", sample_id)).tags
            assert batch.tag_ids[row][batch.tag_mask[row]].tolist() == [
                VOCABULARY.tags.index(tag) for tag in tags
            ]
    assert_equal(batches, list(evaluation.batches(1, evaluation.steps_per_epoch)))


def test_outliers_are_added_in_evaluation(small_dataset):
    evaluation = loader(
        small_dataset, batch_size=15, split="validation", training=False, outliers=2
    )
    (batch,) = evaluation.batches(1, 1)
    assert batch.outlier.sum(1)[batch.sample_valid].tolist() == [2] * 15


def test_pre_training_needs_no_labels_and_adds_irrelevant_tags(damaged):
    damaged.edit_annotation(5, lambda content: content.replace(b'"important"', b'"imp0rtant"'))
    config = replace(CONFIG, train=TrainConfig(objective="relevance"))
    (batch,) = loader(damaged.open(), config, batch_size=60).batches(1, 1)
    assert sorted(valid_ids([batch])) == list(range(60))
    assert (batch.outlier.sum(1)[batch.sample_valid] >= 1).all()
    assert torch.equal(batch.target, batch.tag_mask & ~batch.outlier)


# Which samples, and when ------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    batch_size=st.integers(1, 70),
    num_ranks=st.integers(1, 4),
    group_size=st.integers(1, 5),
    max_micro=st.integers(5, 40),
    epoch=st.integers(0, 2),
    training=st.booleans(),
)
def test_every_sample_of_an_epoch_comes_once(
    small_dataset, batch_size, num_ranks, group_size, max_micro, epoch, training
):
    config = replace(CONFIG, data=GREY)
    split = "train" if training else "validation"
    seen: Counter[int] = Counter()
    for rank in range(num_ranks):
        of_rank = loader(
            small_dataset,
            config,
            batch_size=batch_size,
            rank=rank,
            num_ranks=num_ranks,
            max_micro=max_micro,
            group_size=group_size,
            split=split,
            training=training,
        )
        steps = of_rank.steps_per_epoch
        first = 1 + epoch * steps if training else 1
        seen.update(valid_ids(of_rank.batches(first, first + steps - 1)))
    assert seen == Counter(range(NUM_SAMPLES[split]))


@pytest.mark.parametrize(("batch_size", "num_ranks"), [(24, 2), (16, 4), (10, 3)])
def test_the_rows_of_all_ranks_are_those_of_one(small_dataset, batch_size, num_ranks):
    """What a step holds, bit for bit; padding rows only lie elsewhere."""

    def rows(ranks: int, max_micro: int) -> list[list[torch.Tensor]]:
        steps: list[list[torch.Tensor]] = [[] for _ in range(7)]
        for rank in range(ranks):
            of_rank = loader(
                small_dataset,
                batch_size=batch_size,
                rank=rank,
                num_ranks=ranks,
                group_size=2,
                max_micro=max_micro,
            )
            for batch in of_rank.batches(1, 7):
                num_rows = len(batch.sample_valid)
                values = [getattr(batch, name).reshape(num_rows, -1).long() for name in TENSORS]
                steps[batch.step - 1].append(torch.cat(values, dim=1)[batch.sample_valid])
        return steps

    for one, many in zip(rows(1, 64), rows(num_ranks, 4), strict=True):
        assert torch.equal(torch.cat(one), torch.cat(many))


def test_processes_and_the_step_of_a_restart_change_nothing(small_dataset):
    states = (torch.get_rng_state(), np.random.get_state(), random.getstate())
    reference = list(loader(small_dataset, max_micro=8).batches(1, 9))
    for step in range(1, 10):
        in_process = loader(small_dataset, max_micro=8)
        assert_equal(list(in_process.batches(step, 9)), reference[2 * (step - 1) :])
    for num_workers, step in ((1, 6), (3, 1)):
        config = with_data(num_workers=num_workers)
        batches = list(loader(small_dataset, config, max_micro=8).batches(step, 9))
        assert_equal(batches, reference[2 * (step - 1) :])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == str(states[1])
    assert random.getstate() == states[2]


def test_augmentation_and_tags_differ_from_epoch_to_epoch(small_dataset):
    whole = loader(small_dataset, batch_size=60, group_size=60)
    first, second = (by_id(batch) for batch in whole.batches(1, 2))
    different = (first.pixels != second.pixels).flatten(1).any(1)
    assert different.sum() > 55
    assert (first.tag_ids != second.tag_ids).any()


def by_id(batch: Batch) -> Batch:
    order = batch.sample_ids.argsort()
    tensors = {name: getattr(batch, name)[order] for name in TENSORS}
    return replace(batch, **tensors)


# What goes wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["cpu", "dali_cpu"])
def test_a_bad_sample_is_an_invalid_row_and_named_and_the_others_are_intact(
    damaged, small_dataset, decoder
):
    if decoder == "dali_cpu":
        pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    damaged.cut_picture(4)
    damaged.replace_picture(9, b"no picture at all")
    damaged.edit_annotation(17, lambda content: b"{" * len(content))
    damaged.edit_annotation(30, lambda content: content.replace(b'"important"', b'"imp0rtant"'))
    config = with_data(decoder=decoder)
    (batch,) = loader(damaged.open(), config, batch_size=60).batches(1, 1)
    (intact,) = loader(small_dataset, config, batch_size=60).batches(1, 1)

    assert torch.equal(batch.sample_ids, intact.sample_ids)
    assert batch.keys == intact.keys
    assert {(reject.key, reject.shard) for reject in batch.rejects} == {
        (key_of(i), f"train-{i // 7:06}.tar") for i in (4, 9, 17, 30)
    }
    assert all(reject.reason for reject in batch.rejects)
    assert Reject(key_of(30), "train-000004.tar", "has no 'important' labels") in batch.rejects
    for row, sample_id in enumerate(batch.sample_ids.tolist()):
        if sample_id in (4, 9, 17, 30):
            assert_blank(batch, row)
        else:
            for name in TENSORS:
                assert torch.equal(getattr(batch, name)[row], getattr(intact, name)[row]), name


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_with_a_tag_outside_the_vocabulary_is_rejected(damaged, num_workers):
    damaged.edit_annotation(17, lambda content: content.replace(b'"tag-', b'"tog-'))
    config = with_data(num_workers=num_workers, constant_image=True)
    made = loader(damaged.open(), config)
    batches = list(made.batches(1, made.steps_per_epoch))
    (reject,) = (reject for batch in batches for reject in batch.rejects)
    num_tags = len(make_sample(("train", 17)).tags)
    assert (reject.key, reject.shard) == (key_of(17), "train-000002.tar")
    assert f"{num_tags} of {num_tags} tags are not in the vocabulary" in reject.reason
    assert "'tog-" in reject.reason
    assert sum(int(batch.sample_valid.sum()) for batch in batches) == NUM_SAMPLES["train"] - 1


def test_decoders_that_are_not_there_are_refused(small_dataset):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=r"--data.decoder dali_gpu needs"):
        loader(small_dataset, with_data(decoder="dali_gpu"))
    batches = [
        next(loader(small_dataset, with_data(decoder=decoder)).batches(1, 1))
        for decoder in ("auto", "cpu")
    ]
    assert_equal(batches[:1], batches[1:])


# Other kinds of pictures ------------------------------------------------------------------------


def test_dali_gives_the_same_batches_and_nearly_the_same_pixels(small_dataset):
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    # Operations are compared in test_decode.py.
    plain = replace(CONFIG, augment=replace(CONFIG.augment, policy="none"))
    cpu = list(loader(small_dataset, plain, batch_size=20).batches(1, 4))
    on_dali = with_data(plain, decoder="dali_cpu")
    dali = list(loader(small_dataset, on_dali, batch_size=20).batches(1, 4))
    assert_equal([replace(b, pixels=None) for b in cpu], [replace(b, pixels=None) for b in dali])
    for a, b in zip(cpu, dali, strict=True):
        assert a.pixels is not None
        assert b.pixels is not None
        error = (a.pixels.float() - b.pixels.float()).abs().flatten(1).mean(1)
        assert error.max() < 0.5


def test_closing_dali_batches_early_ends_its_thread(small_dataset):
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    batches = loader(small_dataset, with_data(decoder="dali_cpu")).batches(1, 1000)
    next(batches)
    batches.close()
    assert next(batches, None) is None


@pytest.mark.parametrize("depth", [1, 3])
def test_as_many_batches_are_decoded_ahead_as_the_queue_is_deep(small_dataset, depth):
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    config = with_data(decoder="dali_cpu", dali_queue_depth=depth)
    made = loader(small_dataset, config, batch_size=8)
    expected = list(
        loader(small_dataset, with_data(decoder="dali_cpu"), batch_size=8).batches(1, 6)
    )
    counting = Counting(expected)
    ahead = made_ahead(counting, lambda batch: batch, depth=depth)
    for taken in range(1, 4):
        next(ahead)
        wait_until(lambda taken=taken: counting.given == taken + depth)
        time.sleep(0.05)
        assert counting.given == taken + depth
    ahead.close()
    assert_equal(list(made.batches(1, 6)), expected)


def test_error_of_the_decoding_thread_arrives(small_dataset, damaged):
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")
    dataset = damaged.open()
    batches = loader(dataset, with_data(decoder="dali_cpu"), batch_size=4).batches(1, 1000)
    next(batches)
    for tar in damaged.folder.glob("*.tar"):
        tar.write_bytes(b"")
    with pytest.raises(InputError, match="cut off"):
        list(batches)


class Counting:
    """Gives what it was given, and says how much."""

    def __init__(self, items):
        self.items, self.given = iter(items), 0

    def __iter__(self):
        return self

    def __next__(self):
        self.given += 1
        return next(self.items)


def wait_until(holds):
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_grey_pictures_are_not_decoded_and_text_has_no_pixels(damaged, text_dataset):
    damaged.cut_picture(4)
    grey = loader(damaged.open(), replace(CONFIG, data=GREY), batch_size=70, group_size=7)
    (batch,) = grey.batches(1, 1)
    assert batch.pixels is not None
    assert sorted(valid_ids([batch])) == list(range(60))
    assert batch.pixels.flatten(1).unique(dim=1).squeeze(1).tolist() == [127] * 60 + [0] * 10
    text = loader(text_dataset, batch_size=70, group_size=7)
    (text_batch,) = text.batches(1, 1)
    assert text_batch.pixels is None
    assert text.empty_batch().pixels is None
    for name in ("tag_ids", "target", "sample_ids"):
        assert torch.equal(getattr(batch, name), getattr(text_batch, name))


@pytest.mark.parametrize("kind", ["tf-t", "ff"])
@pytest.mark.parametrize("data", [CONFIG.data, GREY])
def test_a_model_that_sees_no_pictures_has_none_read(damaged, small_dataset, kind, data):
    damaged.cut_picture(4)
    damaged.replace_picture(9, b"no picture at all")
    config = replace(CONFIG, data=data, model=ModelConfig(kind=kind))
    of_tags = loader(damaged.open(), config, batch_size=60)
    (batch,) = of_tags.batches(1, 1)
    assert batch.pixels is None
    assert of_tags.empty_batch().pixels is None
    assert batch.rejects == ()
    (with_pictures,) = loader(small_dataset, batch_size=60).batches(1, 1)
    assert_equal([replace(batch, pixels=None)], [replace(with_pictures, pixels=None)])


def test_trimmed_batches_say_the_same_in_fewer_slots(small_dataset):
    config = replace(CONFIG, tags=replace(CONFIG.tags, max_tags=16))
    trimming = replace(config, tags=replace(config.tags, trim_padding=True))
    compiled = replace(trimming, train=replace(trimming.train, compile=True))
    batches = [list(loader(small_dataset, c).batches(1, 4)) for c in (config, trimming, compiled)]
    for whole, trimmed, for_compiler in zip(*batches, strict=True):
        used = int(whole.tag_mask.sum(1).max())
        assert 1 <= used < 16
        for name in ("tag_ids", "tag_mask", "target", "outlier"):
            assert getattr(trimmed, name).equal(getattr(whole, name)[:, :used]), name
            assert getattr(for_compiler, name).equal(getattr(whole, name)), name
        assert trimmed.pixels.equal(whole.pixels)


def test_an_empty_batch_has_the_shapes_of_all_others(small_dataset):
    for config in (CONFIG, replace(CONFIG, data=GREY)):
        of_rank = loader(small_dataset, config, num_ranks=3, rank=2)
        empty = of_rank.empty_batch()
        batch = next(of_rank.batches(1, 1))
        for name in (*TENSORS, "tags_cut", "targets_cut"):
            left, right = getattr(empty, name), getattr(batch, name)
            assert (left.shape, left.dtype) == (right.shape, right.dtype), name
        for row in range(len(empty.sample_valid)):
            assert_blank(empty, row)


def test_stages_of_the_user_run_in_the_loader_processes(small_dataset):
    stages = (f"{__name__}:without_even_samples",)
    config = with_data(num_workers=1, constant_image=True, stages=stages)
    batches = list(loader(small_dataset, config).batches(1, 4))
    assert sorted(valid_ids(batches)) == list(range(1, 60, 2))
    assert sorted(reject.key for batch in batches for reject in batch.rejects) == [
        key_of(i) for i in range(0, 60, 2)
    ]


def without_even_samples(records):
    return (record for record in records if record.sample_id % 2)
