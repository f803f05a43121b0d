"""Stages of the user through the real commands, started in the folder where their module lies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from magneto_dist.config_io import load_config
from magneto_dist.data.shards import Dataset
from magneto_dist.data.stream import SampleReader
from magneto_dist.errors import InputError
from magneto_dist.training.resume import checkpoint_to_resume
from processes import TINY, launch, run, status, summary
from warm import PATIENCE_S

MODULE = '''
"""Stages of a user."""
from dataclasses import replace

def three_longest_tags(records):
    for record in records:
        sample = record.sample
        pairs = sorted(zip(sample.tags, sample.important), key=lambda pair: -len(pair[0]))[:3]
        tags, important = zip(*pairs)
        yield replace(record, sample=replace(sample, tags=tags, important=important))

def without_every_third(records):
    return (record for record in records if record.sample_id % 3)

def failing(records):
    for record in records:
        if record.sample_id == 5:
            raise ValueError("no such colour")
        yield record
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_stages").mkdir()
    (tmp_path / "my_stages" / "of_tags.py").write_text(MODULE)
    return tmp_path


def keys(data: Path, split: str) -> list[str]:
    dataset = Dataset.open(str(data))
    reader = SampleReader(dataset, split, with_images=False)
    ids = range(dataset.num_samples(split))
    return [raw.key for raw in reader.read(list(ids))]  # type: ignore[arg-type]


def test_stages_act_on_training_validation_and_evaluation(folder: Path, demo_shards: Path) -> None:
    names = ["my_stages.of_tags:three_longest_tags", "my_stages.of_tags:without_every_third"]
    options = [*TINY, f"--data.path={demo_shards}", "--output_dir=run", "--train.epochs=1"]
    output = run(
        "train_ls.py",
        *options,
        f"--data.stages=[{','.join(names)}]",
        "--data.ledger=true",
        "--data.num_workers=1",
        cwd=folder,
    )
    trained = [
        json.loads(line)["key"]
        for line in (folder / "run/ledger/rank-00000.jsonl").read_text().splitlines()
    ]
    wanted = [key for i, key in enumerate(keys(demo_shards, "train")) if i % 3]
    assert sorted(trained) == sorted(wanted), output
    assert (folder / "run/quarantine/rank-00000.jsonl").read_text() == ""  # nothing is bad
    num_validated = len([i for i in range(len(keys(demo_shards, "validation"))) if i % 3])
    assert summary(folder / "run")["validation"]["items"] == num_validated
    assert list(load_config(folder / "run/config.yaml").data.stages) == names

    run("evaluate.py", "--run=run", "--out=scores.json", cwd=folder)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["validation"] == summary(folder / "run")["validation"]
    # A run does not go on with other stages, but may be scored without them.
    config = replace(load_config(folder / "run/config.yaml"), output_dir=str(folder / "run"))
    other = replace(config, data=replace(config.data, stages=tuple(names[:1])))
    dataset = Dataset.open(str(demo_shards))
    assert checkpoint_to_resume(config, dataset)
    with pytest.raises(InputError, match=r"was trained with --data\.stages .*without_every_third"):
        checkpoint_to_resume(other, dataset)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stage_that_fails_ends_the_run_on_all_ranks(
    folder: Path, demo_shards: Path, ranks: int
) -> None:
    process = launch(
        "train_ls.py",
        *TINY,
        f"--data.path={demo_shards}",
        "--output_dir=run",
        "--data.stages=[my_stages.of_tags:failing]",
        "--data.num_workers=1",
        ranks=ranks,
        cwd=folder,
    )
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    assert "error: --data.stages my_stages.of_tags:failing: failed with ValueError: no su" in output
    assert "of_tags.py, line 18" in output
    assert status(folder / "run")["state"] == "failed"
