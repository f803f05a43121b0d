from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from magneto_dist.data.shards import Dataset
from warm import shared


def shards(*words: str | Path) -> subprocess.CompletedProcess[str]:
    started = shared().start("shards.py", *map(str, words), separate_errors=True)
    return subprocess.CompletedProcess(words, started.wait(), started.output, started.errors)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "demo"
    done = shards("build", "demo", "--out", out, "--items=12", "--seed", "3", "--num-processes=1")
    assert done.returncode == 0, done.stderr
    assert f"{out}: 15 samples" in done.stdout
    assert "15/15" in done.stderr  # the progress bar
    return out


def test_built_data_set_is_sound_and_described(demo):
    assert Dataset.open(str(demo)).source["seed"] == 3
    verified = shards("verify", demo, "--num_processes", "1")
    assert (verified.returncode, verified.stdout) == (0, f"{demo}: sound (15 samples)\n")
    table = shards("stats", demo).stdout
    assert table.startswith("train\n")
    assert "\nvalidation\n" in table
    assert "most frequent tags" in table


def test_stats_as_a_picture(demo, tmp_path):
    plot = tmp_path / "größen.png"
    assert shards("stats", demo, "--plot", plot).returncode == 0
    with Image.open(plot) as image:
        assert image.width > 1000
        assert len(image.convert("L").getcolors()) > 20  # something is drawn
    refused = shards("stats", demo, "--plot", tmp_path / "x.txt")
    assert (refused.returncode, "cannot be written" in refused.stderr) == (2, True)


def test_stats_as_json(demo):
    done = shards("stats", demo, "--split", "train", "--json")
    counted = json.loads(done.stdout)
    assert list(counted) == ["train"]
    train = counted["train"]
    assert (train["items"], train["labelled"], train["bad"], train["shards"]) == (12, 12, 0, 1)
    assert train["pictures_looked_at"] == sum(train["picture_kinds"].values()) == 12
    assert 0 < train["important_fraction"] < 1
    assert train["tags_per_item"]["min"] >= 1
    assert sum(train["top_tags"].values()) <= 12 * train["tags_per_item"]["mean"] + 1e-9


def test_damage_is_listed_and_exits_with_2(demo, tmp_path):
    for path in demo.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tar = tmp_path / "train-000000.tar"
    content = tar.read_bytes()
    start = content.index(b'{"tags"')
    tar.write_bytes(content[:start] + b"x" + content[start + 1 :])
    done = shards("verify", tmp_path, "--num_processes", "1")
    assert done.returncode == 2
    assert "train-000000.tar: its SHA-256 is not the one in dataset.json\n" in done.stdout
    assert "train-000000.tar, sample train-000000: annotation is not JSON" in done.stdout
    assert "2 damages" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "/nowhere"], "error: /nowhere: no data set there"),
        (["stats", "pipe:id"], "must be a folder or a URL"),
        (["build", "demo"], "required: out"),
        (["build", "demo", "--out", "x", "--items", "many"], "items"),
        (["build", "nothing"], "nothing"),
        ([], '"verb"'),
    ],
)
def test_wrong_use_exits_with_2_and_says_why(words, message):
    done = shards(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_verbs_sources_and_options():
    text = shards("--help").stdout
    assert all(verb in text for verb in ("build", "verify", "stats"))
    text = shards("build", "--help").stdout
    assert all(source in text for source in ("demo", "table", "hf", "nus-wide"))
    text = shards("build", "demo", "--help").stdout
    assert "default: 4000" in text


def test_index_and_split(demo, tmp_path):
    out = tmp_path / "index"
    options = ("--important-field=important", "--important-as", "flags", "--image-key=jpg")
    done = shards("index", demo, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    assert f"{out}: 15 samples; 0 skipped" in done.stdout
    assert Dataset.open(str(out)).num_samples("validation") == 3
    done = shards("split", out, "--out", tmp_path / "split", "--validation-fraction=0.5")
    assert done.returncode == 0, done.stderr
    assert "sound (15 samples)" in shards("verify", tmp_path / "split").stdout
    done = shards("index", tmp_path / "absent")
    assert (done.returncode, "cannot be listed" in done.stderr) == (2, True)
