from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from magneto_dist.data.build_folder import cuts
from magneto_dist.data.sample import BadSample, Sample
from magneto_dist.data.shards import Dataset, ShardIndex
from magneto_dist.data.shrink import Shrink
from magneto_dist.data.verify import verify
from magneto_dist.data.writer import WriteReport, write_dataset
from magneto_dist.errors import InputError
from magneto_dist.vocabulary import Vocabulary

VOCABULARY = Vocabulary(["sea", "sky", "dog", "été"])
SPLITS = {"train": range(50), "validation": range(50, 61)}
KINDS = ("JPEG", "PNG", "WEBP")
REPOSITORY = Path(__file__).parents[2]


def picture(row: int) -> bytes:
    noise = np.random.default_rng(row).integers(0, 256, (9 + row % 5, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, KINDS[row % 3])
    return buffer.getvalue()


def load(row: int) -> Sample:
    tags = tuple(VOCABULARY.tags[(row + k) % 4] for k in range(1 + row % 3))
    important = None if row % 4 == 0 else tuple((row + k) % 2 == 0 for k in range(len(tags)))
    return Sample(f"item-{row:03d}", picture(row), tags, important)


def load_slowly(row: int) -> Sample:
    time.sleep(0.05)
    return load(row)


def load_text(row: int) -> Sample:
    sample = load(row)
    return Sample(sample.key, None, sample.tags, sample.important)


def write(
    out: Path, load: Callable[[int], Sample] = load, num_processes: int = 1, **options
) -> WriteReport:
    options = {"splits": SPLITS, "samples_per_shard": 8, "source": {"builder": "test"}, **options}
    splits = options.pop("splits")
    return write_dataset(out, splits, load, VOCABULARY, num_processes=num_processes, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert write(folder) == (61, [])
    return folder


def test_every_row_is_where_the_index_says(undisturbed):
    dataset = Dataset.open(str(undisturbed))
    assert dataset.has_images
    assert dataset.vocabulary.tags == VOCABULARY.tags
    assert dataset.shard_sizes("train") == (8, 8, 8, 8, 8, 8, 2)
    assert dataset.shard_sizes("validation") == (8, 3)
    row = 0
    for split in SPLITS:
        for shard in dataset.shards(split):
            index = ShardIndex.read(dataset.storage, shard.name)
            for k in range(shard.num_samples):
                sample = load(row)
                offset, size = int(index.image_offset[k]), int(index.image_size[k])
                assert index.keys[k] == sample.key
                assert dataset.storage.read(shard.name, offset, size) == sample.image
                assert index.image_kind[k] == row % 3
                row += 1
        labelled = sum(load(row).important is not None for row in SPLITS[split])
        assert dataset.num_labelled(split) == labelled
    assert verify(dataset, 1) == []


def test_tar_is_plain_ustar_without_traces_of_time_and_machine(undisturbed):
    with tarfile.open(undisturbed / "train-000000.tar", "r:") as tar:
        members = tar.getmembers()
        assert not tar.pax_headers
    assert [member.name for member in members[:4]] == [
        "item-000.jpg",
        "item-000.json",
        "item-001.png",
        "item-001.json",
    ]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
    content = (undisturbed / "train-000000.tar").read_bytes()
    assert content[257:265] == b"ustar\x0000"


def test_two_processes_write_the_same_bytes_as_one(undisturbed, tmp_path):
    write(tmp_path, num_processes=2)
    assert contents(tmp_path) == contents(undisturbed)


def test_repeating_a_finished_build_changes_nothing(undisturbed, tmp_path):
    def refuse(row: int) -> Sample:
        raise AssertionError("loads again")

    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    assert write(undisturbed, refuse) == (61, [])
    assert {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before


def start_build(out: Path, num_processes: int) -> subprocess.Popen[str]:
    """Writes the same data set, slowly, in a process of its own."""
    code = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\n"
        "from test_writer import write, load_slowly\n"
        "from magneto_dist.errors import exit_with_clear_errors\n"
        f"exit_with_clear_errors(lambda: write(Path({str(out)!r}), load_slowly, {num_processes}))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.01)


def is_alive(process_group: int) -> bool:
    try:
        os.killpg(process_group, 0)
    except ProcessLookupError:
        return False
    return True


def assert_only_whole_files(out: Path, undisturbed: Path) -> None:
    """What has a final name is already what it will be, and an open data set it is not."""
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (undisturbed / path.name).read_bytes()
    with pytest.raises(InputError, match="no data set there"):
        Dataset.open(str(out))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_build_goes_on_to_the_same_bytes(num_processes, undisturbed, tmp_path):
    out = tmp_path / "out"
    process = start_build(out, num_processes)
    wait_until(lambda: len(list(out.glob(".build/*.tar.json"))) >= 2)
    with pytest.raises(InputError, match="another process is building there"):
        write(out)
    process.kill()  # this process alone: those that it started have to notice
    process.communicate()
    assert_only_whole_files(out, undisturbed)
    finished = {path.name.removesuffix(".json") for path in out.glob(".build/*.tar.json")}
    wait_until(lambda: not is_alive(process.pid), 20)
    kept = {name: (out / name).stat().st_mtime_ns for name in finished}
    write(out, num_processes=1)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == kept
    assert contents(out) == contents(undisturbed)


def test_interrupted_build_ends_cleanly_and_goes_on(undisturbed, tmp_path):
    out = tmp_path / "out"
    process = start_build(out, 2)
    wait_until(lambda: list(out.glob(".build/*.tar.json")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the command
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "start the same command again" in errors
    assert "Traceback" not in errors
    wait_until(lambda: not is_alive(process.pid), 10)
    assert not list(out.glob(".build/.*.tar.tmp"))
    assert_only_whole_files(out, undisturbed)
    write(out)
    assert contents(out) == contents(undisturbed)


def fail_at_40(row: int) -> Sample:
    if row == 40:
        raise ZeroDivisionError
    return load(row)


def test_changed_rows_replace_what_was_made_of_them(tmp_path, undisturbed):
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, fail_at_40, splits={"train": [60, *range(1, 59)]})
    kept = (tmp_path / "train-000001.tar").stat().st_mtime_ns
    assert (tmp_path / "train-000004.tar").exists()
    write(tmp_path, splits={"train": range(32)})
    assert (tmp_path / "train-000001.tar").stat().st_mtime_ns == kept
    for number in range(4):
        name = f"train-{number:06d}.tar"
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()
    assert not (tmp_path / "train-000004.tar").exists()
    assert verify(Dataset.open(str(tmp_path)), 1) == []


def test_error_in_another_process_arrives_here(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, fail_at_40, num_processes=2)


def end_process_at_40(row: int) -> Sample:
    if row == 40:
        os._exit(1)
    return load(row)


def test_killed_worker_is_a_clear_error(tmp_path):
    with pytest.raises(InputError, match="processes was killed"):
        write(tmp_path, end_process_at_40, num_processes=2)


def test_build_of_other_input_is_not_mixed_in(tmp_path, undisturbed):
    with pytest.raises(InputError, match="holds another data set"):
        write(undisturbed, source={"builder": "other"})
    with pytest.raises(InputError, match="holds another data set"):
        write(undisturbed, splits={"train": range(49)})
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, fail_at_40)
    with pytest.raises(
        InputError, match=r'unfinished build of other input \({"builder": "test"}\)'
    ):
        write(tmp_path, source={"builder": "other"})


def test_foreign_shards_are_not_touched(tmp_path):
    (tmp_path / "train-000099.tar").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"holds train-000099\.tar"):
        write(tmp_path)
    assert contents(tmp_path) == {"train-000099.tar": b"precious"}
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written to"):
        write(tmp_path / "file")


def load_some_bad(row: int) -> Sample:
    if row == 3:
        raise BadSample("file is gone", "photo-3")
    if row == 11:
        raise BadSample("cell is empty")
    sample = load(row)
    if row == 20:
        return Sample(sample.key, b"GIF89a", sample.tags, None)
    if row == 21:
        assert sample.image
        return Sample(sample.key, sample.image[:-50], sample.tags, None)
    if row == 22:
        return Sample("a.b", sample.image, sample.tags, None)
    if row == 23:
        return Sample(sample.key, sample.image, (), None)
    if row == 24:
        return Sample(sample.key, sample.image, sample.tags, (True,) * 9)
    return sample


def test_bad_rows_are_listed_in_order_and_left_out(tmp_path):
    report = write(tmp_path, load_some_bad, num_processes=2, max_skipped_fraction=0.2)
    assert report.written == 61 - 7
    reasons = dict(report.skipped)
    assert list(reasons) == [
        "photo-3",
        "train row 11",
        *(f"item-{row:03d}" if row != 22 else "a.b" for row in range(20, 25)),
    ]
    assert reasons["photo-3"] == "file is gone"
    assert "neither JPEG" in reasons["item-020"]
    assert "cut off" in reasons["item-021"]
    assert "key is not made of" in reasons["a.b"]
    dataset = Dataset.open(str(tmp_path))
    assert dataset.shard_sizes("train") == (7, 7, 4, 7, 8, 8, 2)
    assert verify(dataset, 1) == []
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == list(reasons)
    assert write(tmp_path, load_some_bad, max_skipped_fraction=0.2) == report


def test_too_many_bad_rows_end_the_build(tmp_path):
    with pytest.raises(InputError, match=r"more than the 3 allowed; the first is photo-3: file is"):
        write(tmp_path, load_some_bad)
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) > 3


def bad_below_8(row: int) -> Sample:
    if row < 8:
        raise BadSample("bad")
    return load(row)


@pytest.mark.parametrize("interrupted", [False, True])
def test_shard_without_a_good_row_is_left_out(tmp_path, interrupted):
    if interrupted:
        with pytest.raises(ZeroDivisionError):
            write(
                tmp_path, lambda row: bad_below_8(row) and fail_at_40(row), max_skipped_fraction=1
            )
    write(tmp_path, bad_below_8, max_skipped_fraction=1)
    dataset = Dataset.open(str(tmp_path))
    assert dataset.shards("train")[0].name == "train-000001.tar"
    assert not (tmp_path / "train-000000.tar").exists()
    assert verify(dataset, 1) == []


def always_bad(row: int) -> Sample:
    raise BadSample("no luck")


def test_no_good_row_at_all_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no luck"):
        write(tmp_path, always_bad, splits={"train": [1]})
    with pytest.raises(InputError, match="no rows"):
        write(tmp_path, splits={"train": [], "validation": []})


def with_unknown_tags(row: int) -> Sample:
    sample = load(row)
    tags = ("sea", "cat", "cow") if row in (5, 7) else sample.tags
    return Sample(sample.key, sample.image, tags, None)


def test_unknown_tags_are_counted_and_the_first_is_named(tmp_path):
    with pytest.raises(
        InputError, match=r"4 tags are not in the vocabulary of 4 tags.*'cat'.*-005"
    ):
        write(tmp_path, with_unknown_tags)
    assert not list(tmp_path.glob("*.tar"))


def with_key_of_row_3_at(row: int, repeated: int) -> Sample:
    sample = load(row)
    return Sample("item-003" if row == repeated else sample.key, sample.image, sample.tags, None)


def repeats_in_shard(row: int) -> Sample:
    return with_key_of_row_3_at(row, 5)


def repeats_in_other_split(row: int) -> Sample:
    return with_key_of_row_3_at(row, 55)


@pytest.mark.parametrize(
    ("load", "where"),
    [
        (repeats_in_shard, "in train-000000.tar"),
        (repeats_in_other_split, "in train-000000.tar and in validation-000000.tar"),
    ],
)
def test_key_that_occurs_twice_is_an_error(tmp_path, load, where):
    with pytest.raises(InputError, match=f"key 'item-003' occurs twice in the data set, {where}:"):
        write(tmp_path, load)


def test_text_only(tmp_path):
    write(tmp_path, load_text)
    dataset = Dataset.open(str(tmp_path))
    assert not dataset.has_images
    index = ShardIndex.read(dataset.storage, "train-000000.tar")
    assert not index.image_size.any()
    assert index.keys[7] == "item-007"
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {".json"}
    assert verify(dataset, 1) == []


@pytest.mark.parametrize("first_without", [4, 8])
def test_pictures_in_some_samples_only_are_an_error(tmp_path, first_without):
    def load_mixed(row: int) -> Sample:
        return load(row) if row < first_without else load_text(row)

    with pytest.raises(InputError, match="samples have no picture"):
        write(tmp_path, load_mixed)


def load_repeated_tags(row: int) -> Sample:
    return Sample(load(row).key, picture(row), ("sea", "sky", "sea"), (False, False, True))


def test_repeated_tags_are_written_once(tmp_path):
    write(tmp_path, load_repeated_tags, splits={"train": [0]})
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        annotation = tar.extractfile("item-000.json")
        assert annotation
        assert json.load(annotation) == {"tags": ["sea", "sky"], "important": [1, 0]}


@given(
    row_bytes=st.lists(st.integers(0, 20), max_size=40),
    samples_per_shard=st.integers(1, 8),
    max_bytes=st.integers(1, 40),
)
def test_shards_are_as_large_as_their_limits_allow(row_bytes, samples_per_shard, max_bytes):
    shards = list(cuts(row_bytes, samples_per_shard, max_bytes))
    assert [row for first, end in shards for row in range(first, end)] == [*range(len(row_bytes))]
    for first, end in shards:
        assert 1 <= end - first <= samples_per_shard
        assert end - first == 1 or sum(row_bytes[first:end]) <= max_bytes
        if end < len(row_bytes):  # the next row would be too much
            assert end - first == samples_per_shard or sum(row_bytes[first : end + 1]) > max_bytes
    by_count = [first for first, _ in cuts(row_bytes, samples_per_shard, float("inf"))]
    assert by_count == [*range(0, len(row_bytes), samples_per_shard)]


def num_bytes(row: int) -> int:
    return len(picture(row))


def test_shards_by_size_are_kept_after_an_error_too(tmp_path):
    options = {"shard_megabytes": 1500 / 1e6, "image_bytes": num_bytes, "samples_per_shard": 9}
    write(tmp_path / "at once", num_processes=2, **options)
    dataset = Dataset.open(str(tmp_path / "at once"))
    sizes = {split: list(map(num_bytes, rows)) for split, rows in SPLITS.items()}
    for split in SPLITS:
        expected = [end - first for first, end in cuts(sizes[split], 9, 1500)]
        assert list(dataset.shard_sizes(split)) == expected
        assert len(set(expected)) > 1
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "out", fail_at_40, **options)
    kept = (tmp_path / "out" / "train-000001.tar").stat().st_mtime_ns
    write(tmp_path / "out", **options)
    assert (tmp_path / "out" / "train-000001.tar").stat().st_mtime_ns == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "at once")
    with pytest.raises(InputError, match="holds another data set"):
        write(tmp_path / "out", **{**options, "shard_megabytes": 0.002})


def test_full_disk_is_noticed_before_it_is_full(tmp_path):
    with pytest.raises(InputError, match=r"the data set needs 61000000\.00 GB in"):
        write(tmp_path, image_bytes=lambda _: 10**15)
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize("options", [{}, {"image_bytes": num_bytes, "shrink": Shrink(4)}])
def test_space_is_checked_as_it_goes_where_sizes_are_not_known(tmp_path, monkeypatch, options):
    write(tmp_path / "at once", **options)
    whole = sum(path.stat().st_size for path in (tmp_path / "at once").glob("*.tar"))
    usage, out = shutil.disk_usage(tmp_path), tmp_path / "out"

    def free(_: Path):  # a disk that fills up as shards are written
        written = sum(path.stat().st_size for path in out.glob("*.tar"))
        return usage._replace(free=disk_bytes - written)

    monkeypatch.setattr(shutil, "disk_usage", free)
    disk_bytes = whole // 2
    with pytest.raises(InputError, match=r"the rest of the data set, .* needs .* GB in .* make ro"):
        write(out, **options)
    assert [path.name for path in out.glob("*.tar")] == ["train-000000.tar"]
    disk_bytes = whole * 5 // 4  # shards are not quite equal
    write(out, **options)
    assert contents(out) == contents(tmp_path / "at once")


def test_disk_that_is_full_is_one_line_and_finished_shards_are_kept(tmp_path):
    out = tmp_path / "out"

    def load_while_it_fills_up(row: int) -> Sample:
        if row == 15:  # the third shard will be written to a full device
            (out / ".build" / ".train-000002.tar.tmp").symlink_to("/dev/full")
        return load(row)

    with pytest.raises(InputError, match=r"out: the disk is full: make room and start the same"):
        write(out, load_while_it_fills_up)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert sorted(path.name for path in kept) == ["train-000000.tar", "train-000001.tar"]
    write(out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    write(tmp_path / "at once")
    assert contents(out) == contents(tmp_path / "at once")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": {"test": [1]}}, "may be train and validation only"),
        ({"samples_per_shard": 0}, "samples_per_shard 0"),
        ({"num_processes": 0}, "num_processes 0"),
        ({"shard_megabytes": 0}, "shard_megabytes 0: must be above 0"),
        ({"shard_megabytes": 1}, "this source: sizes of pictures are not known .* samples_per_sh"),
    ],
)
def test_wrong_arguments(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        write(tmp_path, **options)
