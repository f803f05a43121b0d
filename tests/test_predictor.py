"""Magneto and Predictor: a trained model in Python, and as a folder of the Hub."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from loopback_hub import loopback_hub
from magneto_dist import Magneto, Predictor
from magneto_dist.data.shards import Dataset
from magneto_dist.data.stream import SampleReader
from magneto_dist.decision import Decision
from magneto_dist.errors import InputError
from processes import TINY, run
from warm import REPOSITORY

NUM_ITEMS = 22  # of the validation split


@pytest.fixture(scope="module")
def run_dir(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run in bf16, with a threshold of its own."""
    folder = tmp_path_factory.mktemp("runs") / "geübt"
    run("train_ls.py", *TINY, f"--data.path={demo_shards}", f"--output_dir={folder}",
        "--max_steps=4", "--train.precision=bf16", "--train.threshold=0.45")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def pictures(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Those of the validation items."""
    folder = tmp_path_factory.mktemp("Bilder für alle")
    reader = SampleReader(Dataset.open(str(demo_shards)), "validation", with_images=True)
    paths = []
    for raw in reader.read(np.arange(NUM_ITEMS)):
        assert raw.image
        paths.append(folder / f"{raw.key}.jpg")
        paths[-1].write_bytes(raw.image)
        paths[-1].with_suffix(".json").write_bytes(raw.annotation)
    return paths


@pytest.fixture(scope="module")
def tags(pictures: list[Path]) -> list[list[str]]:
    return [json.loads(path.with_suffix(".json").read_bytes())["tags"] for path in pictures]


@pytest.fixture(scope="module")
def predictor(run_dir: Path) -> Predictor:
    return Predictor.from_pretrained(run_dir, device="cpu")


@pytest.fixture(scope="module")
def folder(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as `save_pretrained` writes it."""
    out = tmp_path_factory.mktemp("saved") / "für alle"
    Magneto.from_pretrained(run_dir).save_pretrained(out)
    return out


def without_keys(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "key"} for line in lines]


# Predictor --------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import magneto_dist, sys; print({'torch', 'numpy', 'PIL'} & {*sys.modules})"
    code += "; print(dir(magneto_dist)); from magneto_dist import Predictor; print(Predictor)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    ).stdout.splitlines()
    assert output[0] == "set()"
    assert "Magneto" in output[1]
    assert output[2] == "<class 'magneto_dist.predictor.Predictor'>"
    with pytest.raises(ImportError, match="Predicter"):
        exec("from magneto_dist import Predicter")


def test_predictions_are_those_of_the_launcher(
    predictor: Predictor, run_dir: Path, demo_shards: Path, folder: Path,
    pictures: list[Path], tags: list[list[str]], tmp_path: Path,
) -> None:  # fmt: skip
    out = tmp_path / "items.jsonl"
    run("predict.py", "--run", str(run_dir), "--input", str(demo_shards), "--out", str(out),
        "--num_workers", "0", "--batch_size", "8")  # fmt: skip
    expected = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    ours = predictor.predict(pictures, tags, batch_size=8)
    assert [item["key"] for item in ours] == [str(path) for path in pictures]
    # What only the launcher writes is the place of an item in its input.
    for line in expected:
        line.pop("row", None)
    assert without_keys(ours) == without_keys(expected)
    assert any(0 < len(item["predicted"]) < len(item["tags"]) for item in ours)
    exported = Predictor.from_pretrained(folder, device="cpu")
    assert exported.predict(pictures, tags, batch_size=8) == ours


def test_bytes_pictures_and_arrays_are_as_good_as_paths(
    predictor: Predictor, pictures: list[Path], tags: list[list[str]]
) -> None:
    pictures, tags = pictures[:4], tags[:4]
    expected = without_keys(predictor.predict(pictures, tags))
    opened = [Image.open(path) for path in pictures]
    arrays = [np.array(image) for image in opened]
    for given in ([p.read_bytes() for p in pictures], list(map(str, pictures)), opened, arrays):
        assert without_keys(predictor.predict(given, tags)) == expected
        (alone,) = without_keys([predictor.predict(given[0], tags[0])])
        assert alone["predicted"] == expected[0]["predicted"]
        assert alone["probability"] == pytest.approx(expected[0]["probability"], abs=0.01)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "CMYK", "1"])
def test_pictures_of_any_mode_are_taken(predictor: Predictor, mode: str, tags: list[list[str]]):
    image = Image.new("RGB", (40, 30), (200, 30, 90))
    image = Image.fromarray(np.full((30, 40), 40_000, np.uint16)) if mode == "I;16" else image
    assert "error" not in predictor.predict(image.convert(mode), tags[0])


def test_a_picture_is_turned_upright(predictor: Predictor, tags: list[list[str]]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, quality=95)
    as_file = predictor.predict(file.getvalue(), tags[0])
    as_picture = predictor.predict(Image.open(file), tags[0])
    assert as_file == as_picture
    turned = Image.open(file).rotate(180, expand=True)
    assert predictor.predict(turned, tags[0]) != as_picture


def test_what_cannot_be_scored_is_said_and_keeps_no_other_back(
    predictor: Predictor, pictures: list[Path], tags: list[list[str]], tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    vocabulary = list(predictor.run.vocabulary.tags)
    given = [
        (pictures[0], [*tags[0], "été", "été"]),
        (tmp_path / "absent.jpg", tags[1]),
        (tmp_path / "broken.jpg", tags[2]),
        (pictures[3], ["nobody knows this"]),
        (pictures[4], []),
        (pictures[5], vocabulary[:15]),
        (pictures[6], tags[6]),
    ]
    items = predictor.predict([image for image, _ in given], [own for _, own in given])
    assert items[0]["unknown_tags"] == ["été"]
    assert items[0]["tags"] == tags[0]
    assert "No such file" in items[1]["error"]
    assert "neither JPEG" in items[2]["error"]
    assert items[3]["error"] == "no tag of it is in the run's vocabulary"
    assert items[4]["error"] == "has no tags"
    assert items[5]["cut_tags"] == vocabulary[12:15]
    assert "error" not in items[6]
    assert predictor.predict([], []) == []


def test_what_makes_no_sense_is_refused(predictor: Predictor, pictures: list[Path]) -> None:
    path = pictures[0]
    for images, own, words in (
        (path, "sea", "list of strings"),
        (path, [1], "no list of strings"),
        ([path], ["sea"], "no list of strings"),
        ([path, path], [["sea"]], "2 pictures and 1 lists"),
        (7, [["sea"]], "neither a picture nor a list"),
        ([7], [["sea"]], "int is no path"),
        (np.zeros((4, 4, 3)), ["sea"], r"float64 \[4, 4, 3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), ["sea"], "several of them as a list"),
        (None, ["sea"], "looks at pictures"),
    ):
        with pytest.raises(InputError, match=words):
            predictor.predict(images, own)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="between 0 and 1"):
        Predictor(predictor.run, 50)
    with pytest.raises(InputError, match="above 0"):
        Predictor(predictor.run, temperature=0)


def test_the_threshold_can_be_another(predictor: Predictor, pictures: list[Path]) -> None:
    assert predictor.decision == Decision(0.45)
    own = list(predictor.run.vocabulary.tags[:12])
    assert Predictor(predictor.run, 1.0).predict(pictures[0], own)["predicted"] == []
    assert len(Predictor(predictor.run, 0.0).predict(pictures[0], own)["predicted"]) == 12


def test_what_was_chosen_goes_with_the_exported_model(
    predictor: Predictor, run_dir: Path, demo_shards: Path,
    pictures: list[Path], tags: list[list[str]], tmp_path: Path,
) -> None:  # fmt: skip
    def by_launcher(name: str, threshold: str) -> list[dict]:
        run("predict.py", "--run", str(run_dir), "--input", str(demo_shards), "--num_workers", "0",
            "--out", str(tmp_path / name), "--threshold", threshold)  # fmt: skip
        lines = [json.loads(line) for line in (tmp_path / name).read_text("utf-8").splitlines()]
        return [{key: line[key] for key in line if key not in ("key", "row")} for line in lines]

    def predicted(items: list[dict]) -> list[set[str]]:
        return [{*item["predicted"]} for item in items]

    of_the_run = predictor.predict(pictures, tags)
    said = sorted({p for item in of_the_run for p in item["probability"]})
    lower = said[len(said) // 4 : len(said) // 2]
    _, below, above = max((b - a, a, b) for a, b in pairwise(lower))  # rounding decides nothing
    decision = Decision((below + above) / 2, 1.7)
    chosen, out = tmp_path / "größe.json", tmp_path / "exported"
    checkpoint = {"checkpoint_sha256": predictor.run.checkpoint_sha256}
    chosen.write_text(json.dumps({"decision": {**checkpoint, **decision.as_json()}}))
    run("export.py", "--run", str(run_dir), "--out", str(out), "--threshold", str(chosen))

    expected = by_launcher("chosen.jsonl", str(chosen))
    exported = Predictor.from_pretrained(out, device="cpu")
    assert exported.decision == decision
    assert without_keys(exported.predict(pictures, tags)) == expected
    plain = by_launcher("plain.jsonl", str(decision.threshold))
    assert predicted(plain) == predicted(expected)
    assert plain[0]["probability"] != expected[0]["probability"]
    assert predicted(of_the_run) != predicted(expected)

    card = (out / "README.md").read_text("utf-8")
    assert f"from probability {decision.threshold:g} on" in card
    assert "a temperature of 1.7" in card
    assert "at the threshold 0.45 of its training" in card
    again = Predictor.from_pretrained(out, device="cpu", threshold=0.45, temperature=1)
    as_trained = again.predict(pictures, tags)
    assert predicted(as_trained) == predicted(of_the_run)
    assert as_trained[0]["probability"] == pytest.approx(of_the_run[0]["probability"], abs=1e-5)


def test_a_model_that_was_exported_without_a_decision_has_its_threshold_of_training(
    folder: Path, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    content = json.loads((folder / "config.json").read_bytes())
    for decision in ({"threshold": 7, "temperature": None}, {"threshold": 0.5}, []):
        (older / "config.json").write_text(json.dumps({**content, "decision": decision}))
        with pytest.raises(InputError, match=r"config\.json: is damaged"):
            Predictor.from_pretrained(older)
    del content["decision"]
    (older / "config.json").write_text(json.dumps(content))
    assert Predictor.from_pretrained(older).decision == Decision(0.45)


def test_a_model_of_tags_alone_needs_no_picture(demo_shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run("train_ls.py", *TINY, f"--data.path={demo_shards}", f"--output_dir={run_dir}",
        "--max_steps=2", "--model.kind=tf-t")  # fmt: skip
    predictor = Predictor.from_pretrained(run_dir)
    own = list(predictor.run.vocabulary.tags[:3])
    one = predictor.predict(None, own)
    assert one["tags"] == own
    assert predictor.predict(None, [own, own]) == [one, {**one, "key": "1"}]
    assert predictor.predict("absent.jpg", own) == {**one, "key": "absent.jpg"}


# The example in the README ------------------------------------------------------------------------


def test_the_example_in_the_readme_runs(
    run_dir: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    text = (REPOSITORY / "README.md").read_text("utf-8")
    section = text.partition("### In Python\n")[2].partition("\n#")[0]
    lines = [line[4:] for line in section.splitlines() if line.startswith("    ")]
    assert 0 < len(lines) <= 8
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run_dir)
    for name, picture in zip(("a.jpg", "b.jpg"), pictures, strict=False):
        shutil.copy(picture, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(lines), "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2


# The folder -------------------------------------------------------------------------------------


def test_a_saved_model_has_all_that_it_needs(folder: Path, run_dir: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "vocabulary.txt",
    ]  # fmt: skip
    config = json.loads((folder / "config.json").read_bytes())
    assert (config["train"]["precision"], config["train"]["threshold"]) == ("bf16", 0.45)
    card = (folder / "README.md").read_text("utf-8")
    assert re.search(r"gated output +\d+\.\d", card)
    assert "## Limits" in card
    assert card.startswith("---\nlibrary_name: magneto-dist\n")
    assert str(run_dir.parent) not in card + (folder / "config.json").read_text("utf-8")


def test_a_saved_model_computes_in_the_same_precision(folder: Path, run_dir: Path) -> None:
    ids = torch.arange(10).reshape(2, 5)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        ours, theirs = (
            Magneto.from_pretrained(path)(ids, ids < 8, pixels) for path in (folder, run_dir)
        )
    for left, right in zip(ours, theirs, strict=True):
        assert left.dtype == torch.bfloat16
        assert torch.equal(left, right)


def test_saving_again_keeps_the_card(folder: Path, tmp_path: Path) -> None:
    Magneto.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for file in folder.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "README.md").unlink()
    Magneto.from_pretrained(bare).save_pretrained(tmp_path / "bare again")
    assert "Trained on: not known" in (tmp_path / "bare again" / "README.md").read_text("utf-8")


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run and no exported model"):
        Predictor.from_pretrained(tmp_path)
    for name in (tmp_path / "absent", "a/b/c", "nobody/has this"):
        with pytest.raises(InputError, match="no such folder here"):
            Predictor.from_pretrained(name)


ROUND_TRIP = """
import sys
from magneto_dist import Magneto, Predictor
from magneto_dist.errors import InputError

print(Magneto.from_pretrained(sys.argv[1]).push_to_hub("user/tags", token="secret"))
there = Predictor.from_pretrained("user/tags", device="cpu")
here = Predictor.from_pretrained(sys.argv[1], device="cpu")
tags = list(there.run.vocabulary.tags[:5])
print(there.predict(sys.argv[2], tags) == here.predict(sys.argv[2], tags))
try:
    Predictor.from_pretrained("user/nothing")
except InputError as error:
    print(error)
"""
OFFLINE = """
from magneto_dist import Predictor
from magneto_dist.errors import InputError

print(len(Predictor.from_pretrained("user/tags").run.vocabulary))
try:
    Predictor.from_pretrained("user/nothing")
except InputError as error:
    print(error)
"""


def test_a_pushed_model_is_the_one_that_comes_back(
    run_dir: Path, folder: Path, pictures: list[Path], tmp_path: Path
) -> None:
    def python(code: str, *options: object, **environment: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, options)],
            capture_output=True, text=True, check=False, cwd=tmp_path,
            env={**os.environ, "HF_HOME": str(tmp_path / "hf"), **environment,
                 "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    with loopback_hub() as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        pushed, same, unknown = python(ROUND_TRIP, run_dir, pictures[0], **online)
        assert pushed == f"{hub.endpoint}/user/tags/commit/{hub.sha('user/tags')}"
        assert same == "True"
        assert unknown.startswith("user/nothing: no such folder here, and the Hub does not give")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert hub.models["user/tags"] == files
    num_tags, unknown = python(OFFLINE, HF_HUB_OFFLINE="1")
    assert int(num_tags) > 0
    assert unknown.startswith("user/nothing: no such folder here")
