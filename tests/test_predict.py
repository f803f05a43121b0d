"""launchers/predict.py: what it takes, what it gives, and that a kill costs nothing."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from signal import SIGINT, SIGKILL
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from magneto_dist.data.augment import evaluation_augmentation
from magneto_dist.data.decode_cpu import CpuDecoder
from magneto_dist.data.shards import Dataset
from magneto_dist.data.stream import RawSample, SampleReader
from magneto_dist.trained_run import load_run
from processes import launch, refused, run
from warm import PATIENCE_S

NUM_ITEMS = 22  # of the validation split
TRAINING_ITEMS = ("--split", "train", "--block_items", "1", "--batch_size", "1")  # 90 parts


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def raw_items(demo_shards: Path) -> list[RawSample]:
    reader = SampleReader(Dataset.open(str(demo_shards)), "validation", with_images=True)
    return list(reader.read(torch.arange(NUM_ITEMS).numpy()))


def options(run_dir: Path, source: Path, out: Path, *more: str) -> list[str]:
    paths = ["--run", str(run_dir), "--input", str(source), "--out", str(out)]
    return [*paths, "--num_workers", "0", *more]


@pytest.fixture(scope="module")
def table(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation items as pictures and a CSV; some are not as they should be."""
    folder = tmp_path_factory.mktemp("table")
    rows = []
    for raw in raw_items(demo_shards):
        assert raw.image
        (folder / f"{raw.key}.jpg").write_bytes(raw.image)
        rows.append([f"{raw.key}.jpg", ",".join(json.loads(raw.annotation)["tags"])])
    rows[1][1] += ",été <b>"
    rows[2][1] = "nobody knows this"
    rows[3][1] = ""
    rows[4][0] = "absent.jpg"
    (folder / rows[5][0]).write_bytes(b"no picture")
    rows[6][1] = ",".join(Dataset.open(str(demo_shards)).vocabulary.tags[:15])  # 12 slots
    rows[7].append("one field too many")
    rows[8][0] = ""
    with (folder / "items.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file_name", "tags"], *rows])
    return folder / "items.csv"


def test_prediction_of_a_table(run_dir, table, tmp_path):
    out, page = tmp_path / "vorhergesagt.jsonl", tmp_path / "page.html"
    printed = run("predict.py", "--run", str(run_dir), "--input", str(table), "--out", str(out),
        "--html", str(page), "--html_items", "7", "--batch_size", "5", "--threshold", "0.4",
        "--num_workers", "1")  # fmt: skip
    assert "22 items, of which 6 failed" in printed
    assert printed.count("not scored: ") == 6
    items = lines(out)
    assert [item["row"] for item in items] == list(range(NUM_ITEMS))
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    named = [row for row in range(NUM_ITEMS) if row not in (7, 8)]
    assert [items[row]["key"] for row in named] == [rows[row]["file_name"] for row in named]
    assert items[1]["unknown_tags"] == ["été <b>"]
    assert items[2]["error"] == "no tag of it is in the run's vocabulary"
    assert items[3] == {"row": 3, "key": items[3]["key"], "error": "has no tags"}
    assert "absent.jpg" in items[4]["error"]
    assert "neither JPEG" in items[5]["error"]
    assert len(items[6]["tags"]) == 12
    assert len(items[6]["cut_tags"]) == 3
    assert items[7]["error"].startswith("3 fields, but 2 columns")
    assert items[7]["key"].endswith("items.csv, line 9")
    assert items[8]["error"] == "column 'file_name' has no path of a picture"
    for item in items:
        if "error" in item:
            continue
        scores = dict(zip(item["tags"], item["probability"], strict=True))
        expected = sorted((t for t in scores if scores[t] >= 0.4), key=lambda t: -scores[t])
        assert sorted(item["predicted"]) == sorted(expected)
        assert item["kept"] == [tag in expected for tag in item["tags"]]
        for final, image, tag, alpha in zip(
            *(item[name] for name in ("probability", "image", "tag", "alpha")), strict=True
        ):
            assert final == pytest.approx(alpha * image + (1 - alpha) * tag, abs=1e-5)
    html = page.read_text(encoding="utf-8")
    assert html.count('"key":') == 7
    assert html.count('"picture":') == 5  # one is absent, one no picture
    assert html.count('"attention":') == 3  # and two have no tags that the run knows


def test_prediction_of_shards_is_that_of_the_model(run_dir, demo_shards, tmp_path):
    out = tmp_path / "items.jsonl"
    run("predict.py", *options(run_dir, demo_shards, out))
    trained = load_run(run_dir)
    decode = CpuDecoder(trained.config.augment.image_size, 100.0)
    whole = evaluation_augmentation(trained.config.augment)
    for raw, item in zip(raw_items(demo_shards), lines(out), strict=True):
        tags = json.loads(raw.annotation)["tags"]
        assert (item["key"], item["tags"]) == (raw.key, tags)
        assert raw.image
        ids = torch.tensor([trained.vocabulary.ids(tags)])
        pixels = decode.decode(raw.image, whole)[None]
        with torch.no_grad():
            alone = trained.model(ids, torch.ones_like(ids, dtype=torch.bool), pixels)
        for name, values in (("probability", alone.probability("final")), ("alpha", alone.alpha)):
            assert item[name] == pytest.approx(values[0].tolist(), abs=1e-5)


def test_prediction_of_a_folder_with_tags_beside_its_pictures(run_dir, demo_shards, tmp_path):
    """As of the shards: text, JSON, or a table metadata.csv; pictures without tags are told."""
    shards, out = tmp_path / "shards.jsonl", tmp_path / "out.jsonl"
    run("predict.py", *options(run_dir, demo_shards, shards))
    expected = {item["key"]: item for item in lines(shards)}
    folder = tmp_path / "bilder"
    rows = [["file_name", "tags"]]
    for number, raw in enumerate(raw_items(demo_shards)[:6]):
        name = folder / f"ordner {number % 2}" / f"{raw.key}.jpg"
        name.parent.mkdir(parents=True, exist_ok=True)
        assert raw.image
        name.write_bytes(raw.image)
        tags = json.loads(raw.annotation)["tags"]
        rows.append([str(name.relative_to(folder)), ",".join(tags)])
        if number == 0:
            name.with_suffix(".json").write_bytes(raw.annotation)
        elif number < 5:
            text = "\n".join(tags) + "\n" if number % 2 else ", ".join(tags)
            name.with_suffix(".txt").write_text(text, encoding="utf-8")
    (folder / "secret.jpg").symlink_to("/etc/hostname")
    (folder / "notes.md").write_text("no picture")
    run("predict.py", *options(run_dir, folder, out))
    items = lines(out)
    assert [item["key"] for item in items] == sorted(row[0] for row in rows[1:])
    last = items[-1]
    assert (
        last["error"]
        == "has no tags: neither validation-000005.txt nor validation-000005.json lies beside it"
    )
    for item in items[:-1]:
        assert item["probability"] == pytest.approx(
            expected[Path(item["key"]).stem]["probability"], abs=1e-5
        )
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    run("predict.py", *options(run_dir, folder, tmp_path / "by table.jsonl"))
    by_table = {item["key"]: item for item in lines(tmp_path / "by table.jsonl")}
    assert len(by_table) == 6
    for item in items[:-1]:
        assert by_table[item["key"]]["probability"] == pytest.approx(item["probability"], abs=1e-5)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_other_formats_hold_the_same(run_dir, table, tmp_path, suffix):
    whole, out = tmp_path / "a.jsonl", tmp_path / f"a.{suffix}"
    for path in (whole, out):
        run("predict.py", *options(run_dir, table, path, "--block_items", "5"))
    expected = lines(whole)
    for item, read in zip(expected, READERS[suffix](out), strict=True):
        given = {name: value for name, value in read.items() if value is not None}
        assert given.keys() == item.keys()
        for name, value in item.items():
            is_numbers = isinstance(value, list) and value and isinstance(value[0], float)
            assert given[name] == (pytest.approx(value, abs=1e-6) if is_numbers else value)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = ("key", "error")
    return [
        {n: None if v == "" else v if n in texts else json.loads(v) for n, v in row.items()}
        for row in rows
    ]


READERS = {"csv": _read_csv, "parquet": lambda path: pq.read_table(path).to_pylist()}


# Kills ------------------------------------------------------------------------------------------


def wait_for_parts(parts: Path, count: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while len(list(parts.glob("part-*"))) < count:
        assert time.monotonic() < deadline_s, "the parts never came"
        time.sleep(0.01)


@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 1, 3)], ids=["alone", "2, 1 and 3 ranks"])
def test_killed_runs_go_on_and_give_the_bytes_of_one_that_was_not(
    run_dir, demo_shards, tmp_path, ranks: Sequence[int]
):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    more = TRAINING_ITEMS
    run("predict.py", *options(run_dir, demo_shards, whole, *more))
    parts = tmp_path / "out.jsonl.parts"
    # A kill, and Ctrl-C.
    for count, num_ranks, stop in zip((3, 9), ranks[:2], (SIGKILL, SIGINT), strict=True):
        started = launch("predict.py", *options(run_dir, demo_shards, out, *more), ranks=num_ranks)
        wait_for_parts(parts, count)
        for rank in started.ranks:
            if rank.poll() is None:
                rank.send_signal(stop)
        output, _ = started.communicate(timeout=PATIENCE_S)
        assert (started.returncode == 130) == (stop == SIGINT), output
        assert not out.exists()
    num_kept = len(list(parts.glob("part-*")))
    (parts / ".part-00000099.jsonl.1.tmp").write_text("half a li")
    started = launch("predict.py", *options(run_dir, demo_shards, out, *more), ranks=ranks[2])
    output, _ = started.communicate(timeout=PATIENCE_S)
    assert started.returncode == 0, output
    assert output.count("90 items, of which 0 failed") == 1
    if ranks[2] == 1:  # nothing is scored twice
        assert f" 0/{90 - num_kept} [" in output
    assert out.read_bytes() == whole.read_bytes()
    assert not parts.exists()
    again = run("predict.py", *options(run_dir, demo_shards, out, *more), ranks=ranks[2])
    assert again.count("was done before, 90 items, of which 0 failed") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.jsonl", "out.jsonl.summary.json", "whole.jsonl", "whole.jsonl.summary.json",
    ]  # fmt: skip


def test_more_ranks_than_blocks_leave_one_file(run_dir, demo_shards, tmp_path):
    out = tmp_path / "out.jsonl"
    printed = run("predict.py", *options(run_dir, demo_shards, out), ranks=3)
    assert "22 items, of which 0 failed" in printed
    assert [item["row"] for item in lines(out)] == list(range(NUM_ITEMS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.summary.json"]


def test_what_was_begun_goes_on_with_nothing_else(run_dir, demo_shards, table, tmp_path):
    out = tmp_path / "out.jsonl"
    more = TRAINING_ITEMS
    started = launch("predict.py", *options(run_dir, demo_shards, out, *more))
    wait_for_parts(tmp_path / "out.jsonl.parts", 2)
    started.ranks[0].send_signal(SIGKILL)
    started.communicate(timeout=PATIENCE_S)
    error = refused("predict.py", *options(run_dir, table, out))
    assert "another input and items and block_items" in error
    error = refused("predict.py", *options(run_dir, demo_shards, out, *more, "--threshold", "0.1"))
    assert "another threshold" in error
    part = next((tmp_path / "out.jsonl.parts").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-9])
    error = refused("predict.py", *options(run_dir, demo_shards, out, *more))
    assert f"{part}: is damaged" in error
    part.unlink()
    run("predict.py", *options(run_dir, demo_shards, out, *more))
    assert [item["row"] for item in lines(out)] == list(range(90))


def test_prediction_leaves_nothing_behind_when_it_cannot_begin(run_dir, tmp_path, demo_shards):
    out = tmp_path / "out.jsonl"
    out.write_text("from before")
    empty = tmp_path / "leer.csv"
    empty.write_text("file_name,tags\n")
    before = sorted(tmp_path.iterdir())
    for source, reason in (
        ("/nowhere/table.csv", "/nowhere"),
        (tmp_path, "no data set there"),
        (empty, "holds no items"),
    ):
        assert reason in refused("predict.py", *options(run_dir, Path(source), out))
    assert sorted(tmp_path.iterdir()) == before
    assert out.read_text() == "from before"
    for path, reason in (("absent/out.jsonl", "make it first"), ("out.xlsx", "must be one of")):
        error = refused("predict.py", *options(run_dir, demo_shards, tmp_path / path))
        assert reason in error
    error = refused("predict.py", *options(run_dir, demo_shards, out, "--html_items", "1001"))
    assert "1000" in error


def test_other_pictures_of_the_same_names_are_scored_anew(run_dir, demo_shards, tmp_path):
    table, out = tmp_path / "tags.csv", tmp_path / "out.jsonl"
    tags = (demo_shards / "vocabulary.txt").read_text().splitlines()
    table.write_text(f"file_name,tags\na.png,{tags[0]}\n")
    for folder, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 40), colour).save(tmp_path / folder / "a.png")
    said = []
    for folder in ("red", "blue", "blue"):
        more = ("--images", str(tmp_path / folder))
        printed = run("predict.py", *options(run_dir, table, out, *more))
        said.append((lines(out)[0]["probability"], "was done before" in printed))
    assert said[0][0] != said[1][0]
    assert said[1][0] == said[2][0]
    assert [done for _, done in said] == [False, False, True]


def test_a_second_prediction_that_was_killed_hides_no_clear_line(run_dir, demo_shards, tmp_path):
    out = tmp_path / "out.jsonl"
    run("predict.py", *options(run_dir, demo_shards, out))
    parts = tmp_path / "out.jsonl.parts"
    parts.mkdir()
    (parts / "plan.json").write_text('{"items": 3}')
    assert "/nowhere" in refused("predict.py", *options(run_dir, Path("/nowhere/a.csv"), out))
