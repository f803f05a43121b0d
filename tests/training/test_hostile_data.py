"""A tenth of a data set is broken in every way there is: through the real command."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from magneto_dist.data.shard_index import ShardIndex
from magneto_dist.data.sources import demo
from processes import TINY, launch, run, summary
from shard_edits import note_index_hashes
from warm import PATIENCE_S

ITEMS = 80


def half(content: bytes) -> bytes:
    return content[: len(content) // 2].ljust(len(content), b"\0")


def bomb(content: bytes) -> bytes:
    """A JPEG that claims 65,535 x 65,535 pixels."""
    size = content.index(b"\xff\xc0") + 5
    return content[:size] + b"\xff" * 4 + content[size + 4 :]


def same(other: bytes) -> Callable[[bytes], bytes]:
    return lambda content: other.ljust(len(content))


# By sample: which member, what becomes of it, and what the quarantine says.
BROKEN_PICTURES = {
    4: (same(b"no picture"), "neither JPEG, PNG nor WebP"),
    13: (half, "cut off"),
    40: (bomb, "65535x65535 pixels is larger than 100 megapixels"),
}
BROKEN_ANNOTATIONS = {
    22: (same(b'{"tags": 3, "important": [1]}'), "no list of non-empty strings under 'tags'"),
    31: (same(b'["tags"]'), "no JSON object"),
    59: (same(b'{"tags": ["red"], "important": [1, 0]}'), "1 tags but 2 'important' flags"),
    77: (half, "not JSON in UTF-8"),
}
WITHOUT_PICTURE = {68: "has no picture"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 items to train on, a tenth of them bad."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    demo.build(folder, items=ITEMS, num_processes=1)
    for row, (damage, _) in BROKEN_PICTURES.items():
        rewrite(folder, row, 0, damage)
    for row, (damage, _) in BROKEN_ANNOTATIONS.items():
        rewrite(folder, row, -1, damage)
    lines = (folder / "train-000000.idx").read_text().splitlines()
    for row in WITHOUT_PICTURE:  # as an index says it where only some samples have a picture
        words = lines[row + 1].split()
        lines[row + 1] = " ".join([words[0], "0", "0", *words[3:]])
    (folder / "train-000000.idx").write_text("\n".join([*lines, ""]))
    note_index_hashes(folder)
    return folder


def rewrite(folder: Path, row: int, member: int, damage: Callable[[bytes], bytes]) -> None:
    _, offset, size, _ = index(folder).members(row)[member]
    with (folder / "train-000000.tar").open("r+b") as file:
        file.seek(offset)
        content = damage(file.read(size))
        assert len(content) == size
        file.seek(offset)
        file.write(content)


def index(folder: Path) -> ShardIndex:
    return ShardIndex.from_bytes((folder / "train-000000.idx").read_bytes())


def entries(folder: Path) -> list[dict]:
    (path,) = folder.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "more", [[], ["--data.feature_views=2", "--model.frozen_stages=all"]], ids=["live", "cached"]
)
def test_a_run_goes_on_without_its_bad_samples_and_names_each_once(
    data: Path, tmp_path: Path, more: list[str]
) -> None:
    options = ["--train.epochs=2", "--data.ledger=true", "--data.max_bad_fraction=0.2", *more]
    options.append(f"--data.cache_dir={tmp_path / 'cache'}")
    run("train_ls.py", *TINY, *options, f"--data.path={data}", f"--output_dir={tmp_path}")
    keys = index(data).keys
    reasons = {
        keys[row]: reason for row, (_, reason) in (BROKEN_PICTURES | BROKEN_ANNOTATIONS).items()
    } | {keys[row]: reason for row, reason in WITHOUT_PICTURE.items()}
    quarantine = entries(tmp_path / "quarantine")
    assert Counter(entry["key"] for entry in quarantine) == Counter(reasons.keys())
    for entry in quarantine:
        assert reasons[entry["key"]] in entry["reason"]
        assert entry["shard"] == "train-000000.tar"
    ledger = entries(tmp_path / "ledger")
    for epoch in range(2):
        trained = Counter(entry["key"] for entry in ledger if entry["epoch"] == epoch)
        assert trained == Counter(set(keys) - reasons.keys())
    assert summary(tmp_path)["step"] == 2 * ITEMS // 16


def test_so_many_bad_samples_stop_a_run_that_does_not_allow_for_them(
    data: Path, tmp_path: Path
) -> None:
    process = launch("train_ls.py", *TINY, f"--data.path={data}", f"--output_dir={tmp_path}")
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert (
        "bad samples of 'train' on this rank, more than --data.max_bad_fraction 0.01 allows"
        in error
    )
    assert str(tmp_path / "quarantine") in error
