"""launchers/evaluate.py as a real process: figures, files, refusals; and predict.py after it."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magneto_dist.data.shards import Dataset
from magneto_dist.data.stream import SampleReader
from processes import TINY, launch, run
from warm import PATIENCE_S

NUM_ITEMS = 22  # of the validation split
MAX_TAGS = 12  # of TINY
TWO_RANKS = {"rel": 1e-6, "abs": 1e-9}


@pytest.fixture(scope="module")
def run_dir(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "geübt"
    options = [*TINY, f"--data.path={demo_shards}", f"--output_dir={folder}", "--max_steps=4"]
    run("train_ls.py", *options)
    return folder


def evaluate(run_dir: Path, folder: Path, *options: str, ranks: int = 1) -> tuple[dict, str]:
    out = folder / "scores.json"
    printed = run("evaluate.py", "--run", str(run_dir), "--out", str(out), *options, ranks=ranks)
    return json.loads(out.read_text()), printed


def refused(launcher: str, *options: str) -> str:
    """The one line with which bad input ends."""
    process = launch(launcher, *options)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return error


def annotations(data: Path, split: str) -> dict[str, dict[str, bool]]:
    """Tags of every item and whether they are important, without what finds no slot."""
    dataset = Dataset.open(str(data))
    reader = SampleReader(dataset, split, with_images=False)
    items = {}
    for raw in reader.read(np.arange(dataset.num_samples(split))):
        content = json.loads(raw.annotation)
        pairs = zip(content["tags"], map(bool, content["important"]), strict=True)
        items[raw.key] = dict(list(pairs)[:MAX_TAGS])
    return items


def assert_same(got: object, expected: object, where: str = "") -> None:
    if isinstance(expected, dict):
        assert isinstance(got, dict)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(got[name], value, f"{where}/{name}")
    elif isinstance(expected, list):
        assert isinstance(got, list)
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same(one, other, where)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, **TWO_RANKS), where
    else:
        assert got == expected, where


OPTIONS = ("--threshold", "best", "--calibrate", "true")


@pytest.mark.parametrize("half", [(), ("--choose_on", "half")])
def test_two_processes_give_the_figures_of_one(
    run_dir: Path, tmp_path: Path, half: tuple[str, ...]
) -> None:
    one, _ = evaluate(run_dir, tmp_path, *OPTIONS, *half, "--batch_size", "4")
    two, _ = evaluate(run_dir, tmp_path, *OPTIONS, *half, "--batch_size", "4", ranks=2)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    for scores in (one, two):
        assert scores["items_not_scored"] == 0
        for name in ("world_size", "items_per_second"):
            del scores[name]
    assert_same(two, one)
    if half:
        assert 0 < one["items"] < NUM_ITEMS
        assert "other half" in one["decision"]["chosen_on"]
        assert one["decision"]["chosen"] == ["threshold", "temperature"]
    else:
        assert one["items"] == NUM_ITEMS
        sweep = one["thresholds"]["sweep"]
        best = max(row["f1"] for row in sweep)
        assert one["validation"]["final"]["paper"]["f1"] == pytest.approx(best)
        assert one["thresholds"]["best_on_these_items"]["threshold"] == one["threshold"]


def test_the_halves_are_disjoint_and_the_figures_those_of_one(
    run_dir: Path, demo_shards: Path, tmp_path: Path
) -> None:
    from magneto_dist.data.randomness import seed_for

    scores, _ = evaluate(run_dir, tmp_path, *OPTIONS, "--choose_on", "half")
    items = annotations(demo_shards, "validation")
    scored = {key for key in items if seed_for(0, "half", key) % 2}
    assert scores["items"] == len(scored)
    share = [sum(items[key].values()) / len(items[key]) for key in scored]  # has no cut tags
    assert scores["baselines"]["keep_all"]["paper"]["precision"] == pytest.approx(np.mean(share))


def test_baselines_are_those_of_plain_loops(
    run_dir: Path, demo_shards: Path, tmp_path: Path
) -> None:
    scores, printed = evaluate(run_dir, tmp_path)
    train, validation = (annotations(demo_shards, s) for s in ("train", "validation"))
    frequency = Counter(tag for tags in train.values() for tag in tags)
    important = Counter(tag for tags in train.values() for tag in tags if tags[tag])
    share = important.total() / frequency.total()
    prior = {t: (important[t] + share) / (frequency[t] + 1) for i in validation.values() for t in i}
    k = max(1, round(important.total() / len(train)))
    assert set(scores["baselines"]) == {"keep_all", f"top_{k}", "tag_prior"}
    chosen_by = {
        "keep_all": lambda tags: list(tags),
        f"top_{k}": lambda tags: sorted(tags, key=lambda tag: -frequency[tag])[:k],
        "tag_prior": lambda tags: [tag for tag in tags if prior[tag] >= 0.5],
    }
    for name, choose in chosen_by.items():
        f1s, precisions = [], []
        for tags in validation.values():
            chosen = choose(tags)
            hits, targets = sum(tags[tag] for tag in chosen), sum(tags.values())
            f1s.append(2 * hits / (len(chosen) + targets))
            precisions.append(hits / max(len(chosen), 1))
        got = scores["baselines"][name]
        assert got["paper"]["f1"] == pytest.approx(np.mean(f1s)), name
        assert got["strict"]["precision"] == pytest.approx(np.mean(precisions)), name
        assert name.replace("_", " ") in printed
    assert scores["comparison"]["keep_all"]["intervals"]["f1"][0] < np.mean(f1s)


def test_the_report_can_be_looked_at(run_dir: Path, demo_shards: Path, tmp_path: Path) -> None:
    report = tmp_path / "Übersicht"
    _, printed = evaluate(run_dir, tmp_path, *OPTIONS, "--report", str(report))
    plots = {path.stem: path for path in report.glob("*.png")}
    assert set(plots) == {"precision_recall", "thresholds", "calibration", "concepts"}
    text = (report / "report.md").read_text(encoding="utf-8")
    for name, path in plots.items():
        assert f"({name}.png)" in text
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, "an empty plot"
        assert (pixels != 255).any(2).mean() > 0.01
    assert "| gated output |" in text
    with (report / "concepts.csv").open(newline="", encoding="utf-8") as file:
        concepts = list(csv.DictReader(file))
    items = Counter(t for tags in annotations(demo_shards, "validation").values() for t in tags)
    assert {row["tag"]: int(row["items"]) for row in concepts} == items
    assert [int(row["items"]) for row in concepts] == sorted(items.values(), reverse=True)
    assert json.loads((report / "scores.json").read_text())["items"] == NUM_ITEMS
    assert "at temperature" in printed
    assert "95 % of F1" in printed


@pytest.mark.parametrize(
    ("launcher", "model", "shown"),
    [("train_ls.py", "tf-t", "output"), ("pretrain.py", "magneto", "image head")],
)
def test_models_without_a_gate_have_a_report(
    demo_shards: Path, tmp_path: Path, launcher: str, model: str, shown: str
) -> None:
    folder, report = tmp_path / "run", tmp_path / "report"
    run(launcher, *TINY, f"--data.path={demo_shards}", f"--output_dir={folder}", "--max_steps=2",
        f"--model.kind={model}", "--model.backbone_weights=none")  # fmt: skip
    scores, printed = evaluate(folder, tmp_path, *OPTIONS, "--report", str(report))
    assert shown in printed
    assert f"| {shown} |" in (report / "report.md").read_text()
    assert len(list(report.glob("*.png"))) == 4
    assert ("no baselines" in printed) == (launcher == "pretrain.py")
    assert scores["validation"]["alpha"] is None


def test_outliers_and_nothing_beside(run_dir: Path, tmp_path: Path) -> None:
    scores, printed = evaluate(
        run_dir, tmp_path, "--outliers", "2", "--baselines", "false", "--resamples", "0",
        "--threshold", "0.333",
    )  # fmt: skip
    assert scores["threshold"] == 0.333
    assert 0 <= scores["validation"]["outlier_rate"] <= 1
    assert (scores["baselines"], scores["comparison"]["final"]["intervals"]) == ({}, None)
    assert "foreign tag" in printed
    assert "95 %" not in printed


def test_prediction_uses_what_evaluation_has_chosen(
    run_dir: Path, demo_shards: Path, tmp_path: Path
) -> None:
    scores, _ = evaluate(run_dir, tmp_path, *OPTIONS)
    decision = scores["decision"]
    again, _ = evaluate(run_dir, tmp_path, "--out", str(tmp_path / "again.json"),
                        "--threshold", str(tmp_path / "scores.json"))  # fmt: skip
    assert again == scores  # the later --out counts: the first file is as it was
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["decision"] == {**decision, "chosen": [], "chosen_on": None}
    assert again["calibration"] == scores["calibration"]

    def predicted(threshold: str) -> list[dict]:
        out = tmp_path / "items.jsonl"
        run("predict.py", "--run", str(run_dir), "--input", str(demo_shards), "--out", str(out),
            "--num_workers", "0", "--threshold", threshold)  # fmt: skip
        return [json.loads(line) for line in out.read_text().splitlines()]

    plain = predicted(str(decision["threshold"]))
    calibrated = predicted(str(tmp_path / "scores.json"))
    temperature = decision["temperature"]
    assert temperature != 1
    for before, after in zip(plain, calibrated, strict=True):
        assert sorted(before["predicted"]) == sorted(after["predicted"])
        odds = [np.log(p / (1 - p)) for p in before["probability"]]
        expected = [1 / (1 + np.exp(-o / temperature)) for o in odds]
        assert after["probability"] == pytest.approx(expected, abs=1e-4)
        assert after["alpha"] == before["alpha"]


def test_a_decision_for_another_checkpoint_is_warned_of_once(
    run_dir: Path, demo_shards: Path, tmp_path: Path
) -> None:
    chosen = tmp_path / "größe.json"
    decision = {"threshold": 0.4, "temperature": None, "checkpoint_sha256": "another"}
    chosen.write_text(json.dumps({"decision": decision}))
    given = ("--threshold", str(chosen))
    scores, printed = evaluate(
        run_dir, tmp_path, *given, "--resamples", "0", "--baselines", "false", ranks=2
    )
    assert (scores["threshold"], printed.count("another checkpoint")) == (0.4, 1)
    printed = run("predict.py", "--run", str(run_dir), "--input", str(demo_shards), *given,
                  "--out", str(tmp_path / "tags.jsonl"), "--num_workers", "0", ranks=2)  # fmt: skip
    assert printed.count("another checkpoint") == 1


def test_what_cannot_be_scored_is_refused_in_one_line(
    run_dir: Path, demo_shards: Path, tmp_path: Path
) -> None:
    ours = ("--run", str(run_dir))
    absent, out = str(tmp_path / "absent.json"), str(tmp_path / "tags.jsonl")
    assert "No such file" in refused("evaluate.py", *ours, "--threshold", absent)
    assert "No such file" in refused(
        "predict.py", *ours, "--input", str(demo_shards), "--out", out, "--threshold", absent
    )
    assert "between 0 and 1" in refused("evaluate.py", *ours, "--threshold", "1.5")
    assert "nothing is chosen" in refused("evaluate.py", *ours, "--choose_on", "half")
    occupied = tmp_path / "occupied"
    occupied.write_text("")
    assert "--report" in refused("evaluate.py", *ours, "--report", str(occupied))


@pytest.mark.parametrize("damage", ["unlabelled", "empty"])
def test_splits_without_labels_or_items_are_refused(
    run_dir: Path, demo_shards: Path, tmp_path: Path, damage: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo_shards, data)
    content = json.loads((data / "dataset.json").read_text())
    for shard in content["splits"]["validation"]:
        shard["num_labelled"] = 0
    if damage == "empty":
        content["splits"]["validation"] = []
    (data / "dataset.json").write_text(json.dumps(content))
    error = refused("evaluate.py", "--run", str(run_dir), "--data.path", str(data))
    assert ("labels" if damage == "unlabelled" else "no items") in error


def test_nothing_to_score_is_said_in_one_line(run_dir: Path, tmp_path: Path) -> None:
    """A stage may leave out whatever it wants."""
    (tmp_path / "leave_out.py").write_text("def everything(records):\n    yield from ()\n")
    process = launch("evaluate.py", "--run", str(run_dir), "--baselines", "false",
                     "--data.stages", "[leave_out:everything]", cwd=tmp_path)  # fmt: skip
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    assert "0 of 22 items" in output
    assert "Traceback" not in output


def test_without_a_labelled_training_split_the_baselines_are_left_out(
    run_dir: Path, demo_shards: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(demo_shards, data)
    content = json.loads((data / "dataset.json").read_text())
    content["splits"]["train"] = []
    (data / "dataset.json").write_text(json.dumps(content))
    scores, printed = evaluate(run_dir, tmp_path, "--data.path", str(data))
    assert scores["baselines"] == {}
    assert "no baselines: " in printed
    wanted = ("--data.path", str(data), "--baselines", "true")
    assert "labelled" in refused("evaluate.py", "--run", str(run_dir), *wanted)
