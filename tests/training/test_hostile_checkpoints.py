"""Checkpoints that somebody has altered, hashes too: refused in one line, and nothing is run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from magneto_dist.errors import InputError
from magneto_dist.trained_run import load_run
from magneto_dist.training.checkpoint import find_damage, newest_complete
from magneto_dist.training.pickles import require_no_code
from processes import TINY
from warm import Warm

NEWEST, BEFORE = "step-00000004", "step-00000002"


def options(data: Path, run_dir: Path, *more: str) -> list[str]:
    steps = ["--checkpoint.every_steps=2", "--train.eval_every_epochs=9", "--max_steps=4"]
    return [*TINY, *steps, f"--data.path={data}", f"--output_dir={run_dir}", *more]


@pytest.fixture(scope="module")
def finished(warm: Warm, demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    warm.run("train_ls.py", *options(demo_shards, run_dir))
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def edit_marker(checkpoint: Path, edit: Callable[[dict[str, str]], object]) -> None:
    marker = json.loads((checkpoint / "COMPLETE").read_bytes())
    edit(marker["sha256"])
    (checkpoint / "COMPLETE").write_text(json.dumps(marker))


def hash_anew(checkpoint: Path, name: str) -> None:
    """As somebody would who wants an altered file to be taken for sound."""
    digest = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    edit_marker(checkpoint, lambda hashes: hashes.update({name: digest}))


def edit_progress(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    hash_anew(checkpoint, "progress.json")


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize(
    "edit",
    [
        lambda hashes: hashes.clear(),
        lambda hashes: hashes.pop("model.safetensors"),
        lambda hashes: hashes.update({"../step-00000002/progress.json": "0"}),
        lambda hashes: hashes.update({"/dev/zero": "0"}),
    ],
    ids=["nothing named", "no weights", "outside", "absolute"],
)
def test_a_marker_that_vouches_for_too_little_or_too_much(
    run_dir: Path, edit: Callable[[dict[str, str]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    edit_marker(run_dir / "checkpoints" / NEWEST, edit)
    newest = newest_complete(run_dir)
    assert newest is not None
    assert newest.name == BEFORE
    assert f"{NEWEST} is passed over: COMPLETE is damaged" in capsys.readouterr().err


def test_files_that_are_no_files_and_pickles_that_were_added(run_dir: Path) -> None:
    checkpoint = run_dir / "checkpoints" / NEWEST
    (checkpoint / ".DS_Store").write_bytes(b"a file browser was here")
    assert find_damage(checkpoint) is None
    (checkpoint / "deepspeed").mkdir()
    torch.save(Code(run_dir / "witness"), checkpoint / "deepspeed/mp_rank_00_model_states.pt")
    assert find_damage(checkpoint) == "deepspeed/mp_rank_00_model_states.pt was added"
    shutil.rmtree(checkpoint / "deepspeed")
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "ema.safetensors")
    assert find_damage(checkpoint) == "ema.safetensors was added"
    (checkpoint / "ema.safetensors").unlink()
    (checkpoint / "optimizer.pt").unlink()
    os.mkfifo(checkpoint / "optimizer.pt")  # reading it would wait for ever
    assert find_damage(checkpoint) == "optimizer.pt is missing"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"step": "4"}, "step is '4'"),
        ({"best_f1": None}, "best_f1 is None"),
        ({"schedule": []}, "schedule is []"),
        ({"made_up": 1}, "made_up"),
    ],
)
def test_progress_of_the_wrong_shape(
    warm: Warm, demo_shards: Path, run_dir: Path, changes: dict[str, Any], named: str
) -> None:
    edit_progress(run_dir / "checkpoints" / NEWEST, **changes)
    assert named in refusal(warm, demo_shards, run_dir)


@pytest.mark.parametrize("kind", ["code", "no archive", "another model"])
def test_an_optimizer_state_that_is_none(
    warm: Warm, demo_shards: Path, run_dir: Path, kind: str
) -> None:
    checkpoint = run_dir / "checkpoints" / NEWEST
    if kind == "code":
        torch.save(Code(run_dir / "witness"), checkpoint / "optimizer.pt")
    elif kind == "no archive":
        (checkpoint / "optimizer.pt").write_bytes(b"no archive")
    else:
        layer = torch.nn.Linear(2, 2)
        torch.save(torch.optim.SGD(layer.parameters()).state_dict(), checkpoint / "optimizer.pt")
    hash_anew(checkpoint, "optimizer.pt")
    more = ["--max_steps=6"]
    assert "not the optimizer's state of this model" in refusal(warm, demo_shards, run_dir, *more)
    assert not (run_dir / "witness").exists()


def test_code_among_deepspeeds_pickles_is_found_and_not_run(tmp_path: Path) -> None:
    torch.save({"module": {"weight": torch.zeros(2)}, "steps": 3}, tmp_path / "sound.pt")
    require_no_code(tmp_path)
    torch.save({"weight": torch.zeros(2), "x": Code(tmp_path / "witness")}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match=r"bad\.pt would call posix\.mkdir"):
        require_no_code(tmp_path)
    archive = (tmp_path / "sound.pt").read_bytes()
    for damaged in (b"cut off", archive[: len(archive) // 2]):
        (tmp_path / "bad.pt").write_bytes(damaged)
        with pytest.raises(InputError, match=r"bad\.pt: cannot be read"):
            require_no_code(tmp_path)
    assert not (tmp_path / "witness").exists()


def test_another_vocabulary_beside_a_run_is_refused(run_dir: Path) -> None:
    assert load_run(run_dir).checkpoint.name == NEWEST
    path = run_dir / "vocabulary.txt"
    path.write_bytes(b"\n".join(reversed(path.read_bytes().split())) + b"\n")
    with pytest.raises(InputError, match="not the vocabulary that"):
        load_run(run_dir)


def refusal(warm: Warm, data: Path, run_dir: Path, *more: str) -> str:
    launched = warm.start("train_ls.py", *options(data, run_dir, *more))
    assert warm.wait(launched) == 2, launched.output
    assert "Traceback" not in launched.output
    assert launched.output.count("error: ") == 1, launched.output
    return launched.output
