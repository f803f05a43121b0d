"""What a run goes on from, and what it leaves alone: real runs, in copies of one that is done."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_hostile_checkpoints import edit_progress
from torchvision.models import resnet18

from magneto_dist.config_io import load_config
from magneto_dist.errors import InputError
from magneto_dist.model.magneto import PRETRAINED_PARTS, build_model
from magneto_dist.training.resume import initialise_from
from magneto_dist.vocabulary import Vocabulary
from processes import TINY, launch, losses, run, status, summary, validations
from warm import PATIENCE_S

STEPS = 14


def options(data: Path, run_dir: Path, *more: str) -> list[str]:
    every = ["--checkpoint.every_steps=4", f"--max_steps={STEPS}", "--train.eval_every_epochs=9"]
    return [*TINY, *every, f"--data.path={data}", f"--output_dir={run_dir}", *more]


@pytest.fixture(scope="module")
def finished(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    run("train_ls.py", *options(demo_shards, run_dir))
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def steps_kept(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def refused(*arguments: str) -> str:
    process = launch("train_ls.py", *arguments)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    return output


def test_resume_from_an_earlier_step_sets_the_later_ones_aside(
    demo_shards: Path, finished: Path, run_dir: Path
) -> None:
    assert steps_kept(run_dir) == ["step-00000012", "step-00000014"]
    (run_dir / "checkpoints/.step-00000016.tmp").mkdir()
    mine = run_dir / "predictions.jsonl"
    mine.write_text('{"key": "a"}\n{"step": 99}\nan unfinished line')
    before = mine.read_text()
    earlier = run_dir / "checkpoints/step-00000012"
    more = [f"--resume={earlier}", "--optim.weight_decay=0.01", "--checkpoint.keep=1"]
    output = run("train_ls.py", *options(demo_shards, run_dir, *more))
    assert "set aside as aside-step-00000014" in output
    assert steps_kept(run_dir) == ["aside-step-00000014", "step-00000014"]
    assert {s: loss for s, loss in losses(run_dir).items() if s <= 12} == {
        s: loss for s, loss in losses(finished).items() if s <= 12
    }
    # The weight decay is this run's, not the one in the optimizer's saved state.
    saved = torch.load(run_dir / "checkpoints/step-00000014/optimizer.pt", weights_only=True)
    assert [group["weight_decay"] for group in saved["param_groups"]] == [0.01]
    assert mine.read_text() == before


def test_new_checkpoints_are_kept_where_the_newest_was_damaged(
    demo_shards: Path, run_dir: Path
) -> None:
    (run_dir / "checkpoints/step-00000014/model.safetensors").write_bytes(b"damaged")
    more = ["--max_steps=13", "--checkpoint.keep=1"]
    output = run("train_ls.py", *options(demo_shards, run_dir, *more))
    assert "passed over" in output
    assert steps_kept(run_dir) == ["aside-step-00000014", "step-00000013"]


def test_a_kill_while_a_checkpoint_is_replaced_loses_neither(
    demo_shards: Path, finished: Path, run_dir: Path
) -> None:
    """Between the two renames, where the evaluation of a step is saved after the step itself."""
    checkpoints = run_dir / "checkpoints"
    for folder in checkpoints.iterdir():
        if folder.name != "step-00000012":
            shutil.rmtree(folder)
    (checkpoints / "step-00000012").rename(checkpoints / ".step-00000012.old")
    shutil.copytree(checkpoints / ".step-00000012.old", checkpoints / ".step-00000012.tmp")
    output = run("train_ls.py", *options(demo_shards, run_dir, "--checkpoint.keep=1"))
    assert "12/14" in output  # went on from there
    assert losses(run_dir) == losses(finished)
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000014"]


def test_finished_run_gets_the_summary_that_a_kill_kept_from_it(
    demo_shards: Path, finished: Path, run_dir: Path
) -> None:
    (run_dir / "summary.json").unlink()
    output = run("train_ls.py", *options(demo_shards, run_dir))
    assert "gated output" in output
    assert summary(run_dir) == summary(finished)


def test_an_evaluation_that_a_kill_kept_from_its_checkpoint_is_logged_once(
    demo_shards: Path, finished: Path, run_dir: Path
) -> None:
    """The last step was saved when a signal came, its evaluation was logged by the next launch."""
    edit_progress(run_dir / f"checkpoints/step-{STEPS:08d}", evaluated=False)
    run("train_ls.py", *options(demo_shards, run_dir))
    assert validations(run_dir) == validations(finished)
    assert len(validations(run_dir)) == 1


def test_refused_launch_leaves_a_finished_run_done(demo_shards: Path, run_dir: Path) -> None:
    refused(*options(demo_shards, run_dir, "--seed=5"))
    assert status(run_dir)["state"] == "done"


def test_files_that_a_run_began_with_are_not_needed_to_go_on(
    demo_shards: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "resnet18.pth"
    torch.save(resnet18().state_dict(), weights)
    more = [f"--model.backbone_weights={weights}"]
    run("train_ls.py", *options(demo_shards, tmp_path / "run", *more, "--max_steps=2"))
    weights.unlink()
    run("train_ls.py", *options(demo_shards, tmp_path / "run", *more, "--max_steps=4"))
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4]
    assert str(weights) in refused(*options(demo_shards, tmp_path / "another", *more))


@pytest.mark.parametrize("ranks", [1, 2])
def test_full_disk_is_one_clear_line_and_leaves_nothing_half_written(
    demo_shards: Path, tmp_path: Path, ranks: int
) -> None:
    endless = options(demo_shards, tmp_path, "--max_steps=100000")
    process = launch("train_ls.py", *endless, ranks=ranks, largest_file_bytes=100_000)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    assert output.count("\nerror: ") == 1
    assert "a checkpoint cannot be written" in output
    assert "Traceback" not in output
    assert steps_kept(tmp_path) == []
    assert status(tmp_path)["state"] == "failed"
    # The thread met it while training went on, and the run ended at the next step that began.
    assert 4 <= max(losses(tmp_path)) <= 8


def test_initialisation_copies_all_tensors_or_those_that_the_paper_names(finished: Path) -> None:
    config = load_config(finished / "config.yaml")
    vocabulary = Vocabulary.from_bytes((finished / "vocabulary.txt").read_bytes())
    theirs = load_file(sorted((finished / "checkpoints").iterdir())[-1] / "model.safetensors")

    def copied(objective: str) -> set[str]:
        model = build_model(config.model, len(vocabulary), gate=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)  # what no trained tensor is full of
        of_kind = replace(config, train=replace(config.train, objective=objective))
        initialise_from(model, finished, of_kind, vocabulary)
        own = dict(model.named_parameters())
        return {name for name, parameter in own.items() if torch.equal(parameter, theirs[name])}

    names = {name for name, _ in build_model(config.model, len(vocabulary)).named_parameters()}
    assert copied("important") == names
    assert copied("relevance") == {name for name in names if name.startswith(PRETRAINED_PARTS)}


def test_initialisation_from_another_vocabulary_is_refused(finished: Path) -> None:
    config = load_config(finished / "config.yaml")
    tags = list(Vocabulary.from_bytes((finished / "vocabulary.txt").read_bytes()).tags)
    model = build_model(config.model, len(tags), gate=True)
    for others in ([tags[1], tags[0], *tags[2:]], tags[:-1]):
        with pytest.raises(InputError, match="the first difference is line"):
            initialise_from(model, finished, config, Vocabulary(others))


def test_pickles_of_another_run_are_not_read(demo_shards: Path, run_dir: Path, tmp_path: Path):
    checkpoint = run_dir / "checkpoints/step-00000012"
    (checkpoint / "deepspeed").mkdir()
    output = refused(*options(demo_shards, tmp_path / "new", f"--resume={checkpoint}"))
    assert "pickles" in output
    assert json.loads((tmp_path / "new/status.json").read_bytes())["state"] == "failed"
