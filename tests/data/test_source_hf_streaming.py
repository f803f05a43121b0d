from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from magneto_dist.data.sample import BadSample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.sources import hf
from magneto_dist.data.sources.hf import HfColumns
from magneto_dist.data.sources.hf_cells import Cells, Place, read_named
from magneto_dist.data.sources.hf_split import HfSplit, own_urls
from magneto_dist.data.verify import verify
from magneto_dist.errors import InputError
from tar_samples import tar_samples
from test_source_hf import picture, table
from test_writer import contents, wait_until

REPOSITORY = Path(__file__).parents[2]
NUM_PARTS, ROWS_PER_PART = 3, 10


pytestmark = pytest.mark.usefixtures("datasets_offline")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Parquet files with row groups of three rows."""
    folder = tmp_path_factory.mktemp("parts")
    for number in range(NUM_PARTS):
        table(ROWS_PER_PART).to_parquet(folder / f"part-{number}.parquet", batch_size=3)
    return folder


def build(out: Path, parts: Path, **options: Any) -> hf.WriteReport:
    files = str(parts / "part-*.parquet")
    options = {"streaming": True, "validation_fraction": 0.3, "samples_per_shard": 4, **options}
    return hf.build(out, "parquet", data_files=files, **options)


def shards(folder: Path) -> dict[str, bytes]:
    """All but dataset.json, which says how the rows were found."""
    return {name: bytes for name, bytes in contents(folder).items() if name != "dataset.json"}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_stream_gives_the_shards_that_a_copy_gives(
    tmp_path: Path, parts: Path, num_processes: int
) -> None:
    report = build(tmp_path / "out", parts, num_processes=num_processes)
    assert report == (NUM_PARTS * ROWS_PER_PART, [])
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    build(tmp_path / "copied", parts, streaming=False)
    assert list((tmp_path / "cache").rglob("*.arrow"))
    assert shards(tmp_path / "out") == shards(tmp_path / "copied")
    assert Dataset.open(str(tmp_path / "out")).num_samples("validation") > 4  # several shards
    assert verify(Dataset.open(str(tmp_path / "out")), 1) == []


def test_rows_of_an_unknown_number_are_counted_as_they_come(
    tmp_path: Path, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "out", parts)
    progress = capsys.readouterr().err
    assert "reading tags of train: 30item" in progress
    assert "30/30" in progress.split("writing out")[-1]


def test_the_first_pass_reads_tags_alone(tmp_path: Path, parts: Path) -> None:
    content = (parts / "part-0.parquet").read_bytes()
    place = content.index(picture(2)[:40])
    (tmp_path / "part-0.parquet").write_bytes(content[:4] + bytes(place) + content[place + 4 :])
    files = str(tmp_path / "part-0.parquet")
    source = HfSplit("parquet", "train", data_files=files, streaming=True)
    assert len(hf._rows(source, HfColumns())) == ROWS_PER_PART
    with pytest.raises(InputError, match=r"split 'train': cannot be read: .* goes on where it"):
        build(tmp_path / "out", tmp_path)


def test_only_a_few_rows_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows, num_bytes = 400, 500_000  # the library asks for 32 MiB at a time
    path = tmp_path / "part-0.parquet"
    schema = pyarrow.schema({"image": pyarrow.binary(), "tags": pyarrow.list_(pyarrow.string())})
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none") as file:
        for number in range(num_rows):
            content = number.to_bytes(2, "little") * (num_bytes // 2)
            row = pyarrow.table({"image": [content], "tags": [["a"]]}, schema)
            file.write_table(row)
    before, most = pyarrow.total_allocated_bytes(), 0
    read = Cells.__getitem__

    def spy(cells: Cells, place: Place) -> Any:
        nonlocal most
        cell = read(cells, place)
        most = max(most, pyarrow.total_allocated_bytes() - before)
        return cell

    monkeypatch.setattr(Cells, "__getitem__", spy)
    with pytest.raises(InputError, match="no good row"):
        build(
            tmp_path / "out",
            tmp_path,
            columns=HfColumns(important=None),
            max_skipped_fraction=1,
        )
    path.unlink()
    assert 0 < most < num_rows * num_bytes / 2


def test_killed_build_goes_on_from_the_finished_shards(
    tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    code = (
        f"import sys, time; sys.path[:0] = [{str(REPOSITORY)!r}, {str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\n"
        "from test_source_hf_streaming import Cells, build\n"
        "read = Cells.__getitem__\n"
        "Cells.__getitem__ = lambda *arguments: time.sleep(0.05) or read(*arguments)\n"
        f"build(Path({str(out)!r}), Path({str(parts)!r}))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    wait_until(lambda: len(list(out.glob(".build/train-*.tar.json"))) >= 4)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path.name.removesuffix(".json") for path in out.glob(".build/*.tar.json")}
    assert "train-000003.tar" in finished
    assert not (out / "dataset.json").exists()
    kept = {name: (out / name).stat().st_mtime_ns for name in finished}
    places = []
    read = Cells.__getitem__
    monkeypatch.setattr(
        Cells, "__getitem__", lambda cells, place: places.append(place) or read(cells, place)
    )
    build(out, parts)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == kept
    assert len(places) == NUM_PARTS * ROWS_PER_PART - 4 * len(finished)
    build(tmp_path / "undisturbed", parts)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_group_is_opened_once_for_rows_in_order(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    files = str(parts / "part-*.parquet")
    data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    data = data.cast_column("image", datasets.Image(decode=False))
    cells = Cells(data, "image", "here", True)
    opened = []
    skip = datasets.IterableDataset.skip
    monkeypatch.setattr(
        datasets.IterableDataset,
        "skip",
        lambda data, count: opened.append(count) or skip(data, count),
    )
    for file, group, number in [(1, 0, 1), (1, 0, 2), (1, 2, 0), (2, 0, 0), (2, 0, 2), (2, 0, 1)]:
        assert cells[Place(file, group, number)]["bytes"] == picture(3 * group + number)
    assert opened == [1, 0, 0, 1]
    with pytest.raises(InputError, match="here: has fewer rows than it had"):
        cells[Place(2, 0, 3)]


def test_files_without_rows_are_passed_over(tmp_path: Path, parts: Path) -> None:
    content = pyarrow.parquet.read_table(parts / "part-0.parquet")
    for number in (0, 2, 3):
        with pyarrow.parquet.ParquetWriter(
            tmp_path / f"part-{number}.parquet", content.schema
        ) as file:
            if number:
                file.write_table(content.slice(0, number))
    assert build(tmp_path / "out", tmp_path).written == 5


def test_a_share_of_bad_rows_is_allowed_on_request(tmp_path: Path) -> None:
    data = table(8)
    rows = [row if n > 2 else {**row, "image": None} for n, row in enumerate(data.to_list())]
    type(data).from_list(rows, data.features).to_parquet(tmp_path / "part-0.parquet")
    with pytest.raises(InputError, match=r"[23] rows are bad"):
        build(tmp_path / "out", tmp_path)
    written, skipped = build(tmp_path / "out", tmp_path, max_skipped_fraction=0.4)
    assert (written, len(skipped)) == (5, 3)


# Pictures that are named -------------------------------------------------------------------------

BUILDS = pytest.mark.parametrize("streaming", [False, True])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set's folder with a picture, and one beside it that nobody may have."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(1))
    (tmp_path / "secret.png").write_bytes(picture(3))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    return folder


@BUILDS
@pytest.mark.parametrize("way", ["../secret.png", "{}/secret.png", "link.png", "file://{}/x.png"])
@pytest.mark.parametrize("kind", ["text", "image type"])
def test_no_path_leads_out_of_the_data_set(
    tmp_path: Path, folder: Path, streaming: bool, way: str, kind: str
) -> None:
    import datasets

    names = ["a.png", way.format(tmp_path)]
    data = datasets.Dataset.from_dict({"image": names, "tags": [["x"], ["x"]]})
    if kind == "text":
        data.to_json(folder / "rows.jsonl")
        builder, file = "json", folder / "rows.jsonl"
    else:
        features = datasets.Features({**data.features, "image": datasets.Image()})
        cells = [{"bytes": None, "path": name} for name in names]
        schema = features.arrow_schema
        rows = pyarrow.table({"image": cells, "tags": [["x"], ["x"]]}, schema=schema)
        pyarrow.parquet.write_table(rows, folder / "rows.parquet")
        builder, file = "parquet", folder / "rows.parquet"
    report = hf.build(
        tmp_path / "out",
        builder,
        data_files=str(file),
        streaming=streaming,
        columns=HfColumns(important=None),
        validation_fraction=0,
    )
    assert report.written == 1
    [(key, reason)] = report.skipped
    assert (key, "lies outside" in reason) == ("train-00000001", True)
    assert tar_samples(tmp_path / "out", "train")["train-00000000"].image == picture(1)


@BUILDS
def test_pictures_elsewhere_need_their_folder_named(tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(picture(1))
    (tmp_path / "rows" / "t.jsonl").write_text(json.dumps({"image": "a.png", "tags": ["x"]}) + "\n")
    options: dict[str, Any] = {
        "data_files": str(tmp_path / "rows" / "*.jsonl"),
        "streaming": streaming,
        "columns": HfColumns(important=None),
        "validation_fraction": 0,
    }
    with pytest.raises(InputError, match=r"'a.png' cannot be read"):
        hf.build(tmp_path / "out", "json", **options)
    report = hf.build(tmp_path / "out", "json", images=tmp_path / "photos", **options)
    assert report == (1, [])


@BUILDS
@pytest.mark.parametrize("is_zipped", [False, True])
def test_pictures_of_a_folder_or_an_archive(
    tmp_path: Path, streaming: bool, is_zipped: bool
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = [json.dumps({"file_name": f"{n}.png", "tags": ["a"]}) + "\n" for n in (1, 3)]
    files = {"metadata.jsonl": "".join(lines).encode(), "1.png": picture(1), "3.png": picture(3)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    place: dict[str, Any] = {"data_dir": str(folder)}
    if is_zipped:
        place = {"data_files": str(tmp_path / "pictures.zip")}
        with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    report = hf.build(
        tmp_path / "out",
        "imagefolder",
        **place,
        streaming=streaming,
        columns=HfColumns(important=None),
        validation_fraction=0,
    )
    assert report == (2, [])
    samples = tar_samples(tmp_path / "out", "train").values()
    assert [sample.image for sample in samples] == [picture(1), picture(3)]


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "hf://datasets/someone/private@main/a.png",
        "zip://a.png::file:///secret.zip",
        "file:///etc/passwd::hf://datasets/me/photos@main/a.zip",
        "hf://datasets/me/photos@main/../../other/a.png",
        "https://internal/a.png",
    ],
)
def test_no_url_leads_out_of_the_data_set(url: str) -> None:
    source = HfSplit("me/photos", "train", streaming=True)
    with pytest.raises(BadSample, match=r"lies outside|lies in something else"):
        read_named(url, [], own_urls(source), "key")


def test_saved_data_sets_are_read_where_they_lie(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "saved")
    report = hf.build(
        tmp_path / "out", str(tmp_path / "saved"), streaming=True, validation_fraction=0
    )
    assert report == (8, [])


# Sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image type", "bytes", "text"])
def test_shards_of_limited_size(tmp_path: Path, kind: str) -> None:
    import datasets

    folder = tmp_path / "data"
    folder.mkdir()
    images: list[Any] = []
    for number, num_bytes in enumerate((900, 5_000, 900, 900, 900, 700, 900)):
        content = picture(number).ljust(num_bytes, b"\0")
        path = folder / f"{number}.png"
        path.write_bytes(content)
        is_inside = number % 2 == 0  # of the row, or in a file
        cell = {"bytes": content if is_inside else None, "path": None if is_inside else str(path)}
        images.append({"image type": cell, "bytes": content, "text": path.name}[kind])
    images += [None, "absent.png" if kind == "text" else None]
    data = datasets.Dataset.from_dict({"image": images, "tags": [["x"]] * len(images)})
    if kind == "image type":
        data = data.cast_column("image", datasets.Image())
    data.save_to_disk(str(folder / "saved"))
    options: dict[str, Any] = {
        "images": folder,
        "columns": HfColumns(important=None),
        "validation_fraction": 0,
        "shard_megabytes": 0.0018,
        "max_skipped_fraction": 0.5,
    }
    report = hf.build(tmp_path / "out", str(folder / "saved"), **options)
    assert report.written == 7
    assert Dataset.open(str(tmp_path / "out")).shard_sizes("train") == (1, 1, 2, 2, 1)
    assert hf.build(tmp_path / "out", str(folder / "saved"), **options) == report


def test_sizes_of_streamed_pictures_are_not_known(tmp_path: Path, parts: Path) -> None:
    with pytest.raises(InputError, match=r"streamed: sizes .* use samples_per_shard instead"):
        build(tmp_path / "out", parts, shard_megabytes=1)
