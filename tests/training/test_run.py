"""A run from end to end, killed, stopped, resumed, refused: with real processes."""

from __future__ import annotations

import json
import shutil
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from processes import TINY, damage_picture, launch, losses, run, status, summary, wait_for_step
from warm import PATIENCE_S

STEPS = 14


@pytest.fixture(scope="module")
def undisturbed(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 14 steps (6 an epoch) that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "ungestört"
    output = run("train_ls.py", *options(demo_shards, run_dir))
    assert "gated output" in output
    return run_dir


def options(data: Path, run_dir: Path, *more: str) -> list[str]:
    every = ["--checkpoint.every_steps=4", "--data.ledger=true", f"--max_steps={STEPS}"]
    return [*TINY, *every, f"--data.path={data}", f"--output_dir={run_dir}", *more]


def ledger(run_dir: Path) -> list[dict]:
    lines = (run_dir / "ledger" / "rank-00000.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Bit-equal losses, weights, metrics; the same samples, each once."""
    assert losses(run_dir) == losses(other)
    assert summary(run_dir)["validation"] == summary(other)["validation"]
    assert ledger(run_dir) == ledger(other)
    name = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    ours, theirs = load_file(run_dir / name), load_file(other / name)
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)


def test_run_folder(undisturbed: Path) -> None:
    assert list(losses(undisturbed)) == list(range(1, STEPS + 1))
    result = summary(undisturbed)
    assert (result["step"], result["epoch"], result["world_size"]) == (STEPS, 2, 1)
    assert 0 <= result["data_wait_fraction"] <= 1
    assert result["images_per_second"] > 0
    assert result["skipped_steps"] == 0  # fp16 alone skips
    for head in ("final", "image", "tag"):
        for protocol in ("paper", "strict"):
            for metric in ("precision", "recall", "f1"):
                assert 0 <= result["validation"][head][protocol][metric] <= 1
    assert status(undisturbed) == {"state": "done", "step": STEPS, "reason": ""}
    assert (undisturbed / "config.yaml").is_file()
    lines = map(json.loads, (undisturbed / "metrics.jsonl").read_text().splitlines())
    stalls = {
        line["step"]: line["checkpoint_stall_s"] for line in lines if line["split"] == "train"
    }
    assert {step for step, stall_s in stalls.items() if stall_s > 0} == {5, 7, 9, 13}


def test_ledger_holds_every_sample_of_an_epoch_once(undisturbed: Path) -> None:
    for epoch in (0, 1):
        keys = [line["key"] for line in ledger(undisturbed) if line["epoch"] == epoch]
        assert len(keys) == len(set(keys)) == 90


def test_finished_run_says_so(demo_shards: Path, undisturbed: Path) -> None:
    before = summary(undisturbed)
    assert "finished" in run("train_ls.py", *options(demo_shards, undisturbed))
    assert summary(undisturbed) == before


def test_killed_run_goes_on_where_it_was(
    demo_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    process = launch("train_ls.py", *options(demo_shards, tmp_path))
    wait_for_step(process, tmp_path, 7)
    process.kill()
    process.communicate()
    run("train_ls.py", *options(demo_shards, tmp_path))
    assert_same_run(tmp_path, undisturbed)


def test_run_killed_while_it_writes_a_checkpoint_goes_on_from_a_whole_one(
    demo_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    process = launch("train_ls.py", *options(demo_shards, tmp_path))
    half_written = tmp_path / "checkpoints/.step-00000008.tmp"
    while not half_written.exists() and process.poll() is None:
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    run("train_ls.py", *options(demo_shards, tmp_path))
    assert not half_written.exists()
    assert_same_run(tmp_path, undisturbed)


def test_sigterm_saves_exits_75_and_goes_on(
    demo_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    process = launch("train_ls.py", *options(demo_shards, tmp_path))
    wait_for_step(process, tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 75, output
    stopped = status(tmp_path)
    assert stopped["state"] == "preempted"
    assert (tmp_path / f"checkpoints/step-{stopped['step']:08d}/COMPLETE").is_file()
    run("train_ls.py", *options(demo_shards, tmp_path))
    assert_same_run(tmp_path, undisturbed)


def test_second_writer_is_refused_and_named(demo_shards: Path, tmp_path: Path) -> None:
    first = launch("train_ls.py", *options(demo_shards, tmp_path, "--max_steps=100000"))
    wait_for_step(first, tmp_path, 1)
    first.send_signal(signal.SIGSTOP)  # holds the lock, uses no core
    try:
        second = launch("train_ls.py", *options(demo_shards, tmp_path))
        output, _ = second.communicate(timeout=PATIENCE_S)
    finally:
        first.kill()
        first.communicate()
    assert second.returncode == 2
    assert f"process {first.pid}" in output


def test_damaged_checkpoint_is_passed_over(
    demo_shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    newest = run_dir / f"checkpoints/step-{STEPS:08d}/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    output = run("train_ls.py", *options(demo_shards, run_dir))
    assert "passed over" in output
    assert "model.safetensors" in output
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--model.d_model=32", "model.d_model"),
        ("--train.global_batch_size=8", "train.global_batch_size"),
        ("--seed=1", "seed"),
        ("--resume=never", "--resume never"),
        ("--data.path=/nowhere/at/all", "/nowhere/at/all"),
        ("--train.precision=fp16", "fp16"),
        ("--train.nonsense=1", "train.nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    demo_shards: Path, undisturbed: Path, change: str, named: str
) -> None:
    before = summary(undisturbed)
    assert named in refusal(*options(demo_shards, undisturbed, change))
    assert summary(undisturbed) == before


def refusal(*options: str) -> str:
    """The one line with which a training run on bad input ends."""
    process = launch("train_ls.py", *options)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return error


def remove_shard(data: Path) -> None:
    (data / "validation-000000.tar").unlink()


def lengthen_shard(data: Path) -> None:
    with (data / "train-000000.tar").open("ab") as file:
        file.write(bytes(512))


def change_vocabulary(data: Path) -> None:
    path = data / "vocabulary.txt"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([f"{first}s", *others, ""]))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (remove_shard, ("validation-000000.tar", "does not exist")),
        (lengthen_shard, ("train-000000.tar", "bytes, dataset.json says")),
        (shutil.rmtree, ("data: no data set there",)),
        (change_vocabulary, ("vocabulary.txt", "is not the vocabulary")),
    ],
)
def test_a_spoilt_data_set_is_refused_before_anything_is_written(
    demo_shards: Path, tmp_path: Path, spoil: Callable[[Path], None], named: tuple[str, ...]
) -> None:
    data, run_dir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(demo_shards, data)
    spoil(data)
    error = refusal(*options(data, run_dir))
    assert str(data) in error
    assert all(words in error for words in named), error
    assert status(run_dir)["state"] == "failed"
    assert status(run_dir)["reason"] in error
    assert sorted(path.name for path in run_dir.iterdir()) == [".lock", "status.json"]


def test_bad_validation_samples_are_quarantined_and_too_many_stop_the_run(
    demo_shards: Path, tmp_path: Path
) -> None:
    data, run_dir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(demo_shards, data)
    keys = [damage_picture(data, "validation-000000", row) for row in (3, 8)]
    allowed = ["--data.max_bad_fraction=0.1", "--max_steps=12"]  # two evaluations
    run("train_ls.py", *options(data, run_dir, *allowed))
    lines = (run_dir / "quarantine" / "rank-00000.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [(e["key"], e["split"], e["step"]) for e in entries] == [
        (key, "validation", 6) for key in keys
    ]
    assert summary(run_dir)["validation"]["items"] == 20

    process = launch("train_ls.py", *options(data, tmp_path / "refused"))
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert "2 bad samples of 'validation'" in output
    assert keys[1] in output


def test_tags_and_targets_without_a_slot_are_counted(demo_shards: Path, tmp_path: Path) -> None:
    no_change = ["--tags.beta_add=0", "--tags.beta_drop=0", "--max_steps=6"]  # one epoch
    run("train_ls.py", *options(demo_shards, tmp_path, *no_change, "--tags.max_tags=2"))
    labels = []
    for path in sorted(demo_shards.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            members = [m for m in tar if m.name.endswith(".json")]
            labels += [json.load(tar.extractfile(m))["important"] for m in members]  # type: ignore[arg-type]
    result = summary(tmp_path)
    assert result["tags_cut"] == sum(max(0, len(important) - 2) for important in labels)
    assert 0 < result["targets_cut"] <= min(result["tags_cut"], sum(map(sum, labels)))


@pytest.mark.parametrize(
    ("log_every_steps", "save_every_steps", "ranks"), [(1, 1000, 1), (1000, 3, 1), (1, 3, 2)]
)
def test_a_run_that_diverges_stops_and_keeps_what_was_good(
    demo_shards: Path, tmp_path: Path, log_every_steps: int, save_every_steps: int, ranks: int
) -> None:
    run("train_ls.py", *options(demo_shards, tmp_path, "--max_steps=1"))
    good = load_file(tmp_path / "checkpoints/step-00000001/model.safetensors")
    more = [
        "--optim.lr=1e30",
        f"--log.every_steps={log_every_steps}",
        f"--checkpoint.every_steps={save_every_steps}",
    ]
    process = launch("train_ls.py", *options(demo_shards, tmp_path, *more), ranks=ranks)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "step" in error
    assert "loss" in error
    assert "--optim.lr" in error
    assert status(tmp_path) == {"state": "failed", "step": 1, "reason": error[len("error: ") :]}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    kept = load_file(tmp_path / "checkpoints/step-00000001/model.safetensors")
    assert all(kept[name].equal(good[name]) for name in good)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
