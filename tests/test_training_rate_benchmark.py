"""The paper's way beside ours: both train, and their stages are what the whole is made of."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from magneto_dist.data.shards import Dataset
from magneto_dist.errors import InputError
from processes import REPOSITORY
from training_rate import LIVE, PAPER, _paper
from training_rate_data import Case
from training_rate_paper import (
    Items,
    batches_of_paper,
    forward_backward_of_paper,
    frozen_part,
    network_of_paper,
)
from training_rate_split import (
    ADDED,
    STAGES,
    attainable,
    split_of_ours,
    split_of_paper,
    with_framework,
)

TINY = ["--augment.image_size=32", "--model.backbone=resnet18", "--model.d_model=16",
        "--model.num_heads=2", "--model.d_ff=32", "--model.image_layers=1", "--model.tag_layers=1",
        "--model.batch_norm_group_size=2", "--train.global_batch_size=4", "--data.num_streams=4",
        "--data.decoder=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(3):
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((520, 390), Image.Resampling.BICUBIC)
        picture.save(folder / f"{seed}.jpg", quality=90)
    return folder


@pytest.fixture(scope="module", params=["nuswide", "ls"])
def case(request, photos, tmp_path_factory) -> Case:
    made = Case.of(request.param, tmp_path_factory.mktemp("bilder"), 16, TINY)
    made.make(photos)
    return made


def test_a_set_up_is_the_papers(tmp_path):
    ls = Case.of("ls", tmp_path, None, [])
    assert ls.config.augment.image_size == 224
    assert (ls.config.model.backbone, ls.config.model.frozen_stages) == ("resnet50", 4)
    assert (ls.config.tags.max_tags, ls.set_up.num_tags) == (64, 24_056)
    rng = np.random.default_rng(0)
    numbers = [ls.set_up.draw_number(rng) for _ in range(4000)]
    assert np.mean(numbers) == pytest.approx(43, abs=0.5)
    nus_wide = Case.of("nuswide", tmp_path, None, [])
    assert (nus_wide.batch, nus_wide.config.augment.image_size) == (32, 112)
    with pytest.raises(InputError, match="at least 4 batches of 16"):
        Case.of("ls", tmp_path, 63, [])


def test_both_ways_have_the_same_items(case):
    dataset = Dataset.open(case.shards)
    assert dataset.num_samples("train") == case.steps * case.batch == 16
    files = Items(case)
    assert len(files) == 16
    assert len(dataset.vocabulary) == files.num_tags == case.set_up.num_tags


def test_tags_are_added_and_dropped_as_section_5_1_says(case):
    items = Items(case)
    tags = [(tag, tag % 5 == 0) for tag in range(30)]  # 24 unimportant ones
    most = int(case.config.tags.beta_add * 24)
    random.seed(0)
    dropped, added = set(), set()
    for _ in range(400):
        found = items._added_and_dropped(tags)
        ids = [tag for tag, _ in found]
        assert len(ids) == len(set(ids))
        assert {tag for tag in tags if tag[1]} <= set(found)
        dropped.add(30 - sum(tag < 30 for tag in ids))
        added.add(sum(tag >= 30 for tag in ids))
        assert all(not important for tag, important in found if tag >= 30)
    assert dropped == added == set(range(most + 1))


def test_the_papers_network_freezes_what_ours_does_but_lets_statistics_drift(case):
    network = network_of_paper(case)
    backbone = network.image_stream.backbone
    pixels, ids, targets = next(iter(batches_of_paper(case, 0, 1)))
    assert ids.shape == targets.shape == (4, case.config.tags.max_tags)
    forward_backward_of_paper(network, case, [pixels, ids, targets])
    frozen = frozen_part(backbone, case.config.model)
    assert len(frozen) == {"nuswide": 8, "ls": 7}[case.name]  # of the stem four
    assert all(weight.grad is None for weight in frozen.parameters())
    rest = list(backbone[len(frozen) :].parameters())
    assert all(weight.grad is not None for weight in rest)
    assert bool(rest) == (case.name == "ls")
    assert backbone[1].running_mean.abs().max() > 0
    assert network.tag_embedding.vectors.weight.grad is not None


def test_stages_of_both_ways_are_found(case, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("training_rate_split._LOADED_IMAGES", 64)
    paper, ours = split_of_paper(case), split_of_ours(case, cached=False)
    for split in (paper, ours):
        difference = "trained forward, backward"  # below 0 now and then: two short times
        measured = {name for name in STAGES if split[name] > 0} | {difference}
        assert measured == {*STAGES} - {"all-reduce"}
    whole = _paper(case, 0, 1)
    assert 0 < whole["core_s"] < 3 * sum(paper[name] for name in STAGES)


def test_the_share_is_of_the_stages_alone():
    stages = dict.fromkeys(STAGES, 0.01) | {"in the training process": 0.002}
    split = with_framework(stages | {"to the training process": 0.003}, training_s=0.05)
    assert [*split] == [*STAGES, *ADDED]
    assert split["framework"] == pytest.approx(0.05 - 0.002 - 4 * 0.01)
    twice = {stage: 2 * taken_s for stage, taken_s in split.items()}  # the machine is slower
    found = attainable([(split, 30.0), (twice, 16.0), (split, 34.0)], cores=2)
    assert found["attainable, images/s"] == pytest.approx(2 / 0.05)
    assert found["reached, images/s"] == 30.0
    assert found["share"] == pytest.approx(0.8)
    assert (found["lowest share"], found["highest share"]) == pytest.approx((0.75, 0.85))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["ls", "nuswide"])
def test_one_record_has_the_rates_and_shares_of_one_rank_and_of_two(name, photos, tmp_path):
    out = tmp_path / "größe"
    script = str(REPOSITORY / "benchmarks" / "training_rate.py")
    words = ["--setting", name, "--photos", str(photos), "--items", "24", "--rounds", "1", *TINY]
    done = subprocess.run(
        [sys.executable, script, *words, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(out.with_suffix(".json").read_text())
    columns = [PAPER, LIVE, f"{LIVE}, 2 ranks"]
    if name == "nuswide":
        columns += ["cached features", "cached features, 2 ranks"]
    assert [*said["attainable"]] == [*said["core_s_an_image"]] == columns
    for column, found in said["attainable"].items():
        assert found["reached, images/s"] > 0
        assert 0 < found["lowest share"] <= found["share"] <= found["highest share"] < 2
        assert column in done.stdout
    assert said["core_s_an_image"][f"{LIVE}, 2 ranks"]["all-reduce"] > 0
    assert said["attainable"][PAPER]["times the paper's way"] == 1
    assert str(tmp_path) not in said["command"]
