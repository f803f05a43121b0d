from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magneto_dist.data.sample import Sample
from magneto_dist.data.shards import Dataset
from magneto_dist.data.verify import Damage, verify
from magneto_dist.data.writer import write_dataset
from magneto_dist.vocabulary import Vocabulary
from shard_edits import note_index_hashes

Members = list[tuple[str, bytes]]


def picture(row: int, kind: str = "JPEG") -> bytes:
    noise = np.random.default_rng(row).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def load(row: int) -> Sample:
    return Sample(f"k{row}", picture(row), ("sea", "sky"), (True, False))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(
        tmp_path,
        {"train": range(8), "validation": range(8, 10)},
        load,
        Vocabulary(["sea", "sky"]),
        samples_per_shard=4,
        num_processes=1,
        source={},
    )
    return tmp_path


def damages(folder: Path, num_processes: int = 1) -> list[Damage]:
    return verify(Dataset.open(str(folder), check_shards=False), num_processes)


def rewrite(folder: Path, edit: Callable[[Members], Members]) -> None:
    """Edits the members of train-000001.tar, and makes hash, size and index right again."""
    path = folder / "train-000001.tar"
    with tarfile.open(path) as tar:
        members = [(name, tar.extractfile(name).read()) for name in tar.getnames()]  # type: ignore[union-attr]
    index: dict[str, str] = {}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in edit(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            key, _, extension = name.partition(".")
            place = f"{extension} {tar.offset + 512} {len(content)} {name}"
            index[key] = f"{index[key]} {place}" if key in index else place
            tar.addfile(info, io.BytesIO(content))
    lines = [f"v1.2 {len(index)}", *index.values(), ""]
    path.with_suffix(".idx").write_text("\n".join(lines))
    fields = json.loads((folder / "dataset.json").read_text())
    content = path.read_bytes()
    fields["splits"]["train"][1].update(num_bytes=len(content), sha256=sha256(content).hexdigest())
    (folder / "dataset.json").write_text(json.dumps(fields))
    note_index_hashes(folder)


def with_content(name: str, content: bytes) -> Callable[[Members], Members]:
    return lambda members: [(n, content if n == name else c) for n, c in members]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_sound_data_set_has_no_damage(folder, num_processes):
    assert damages(folder, num_processes) == []
    rewrite(folder, lambda members: members)
    assert damages(folder, num_processes) == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("k5.json", b"{", "not JSON"),
        ("k5.json", b'{"tags": ["sea"], "important": [NaN]}', "NaN"),
        ("k5.json", b'{"tags": ["sea"], "important": [1, 1]}', "1 tags but 2"),
        ("k5.json", b'{"tags": ["sea", "cow"], "important": [1, 1]}', "not in the vocabulary: 'c"),
        ("k5.jpg", picture(5)[:-100], "cut off"),
        ("k5.jpg", b"", "neither JPEG"),
        ("k5.jpg", picture(5, "PNG"), "picture is png, but its member is called jpg"),
    ],
)
def test_broken_sample_is_found(folder, name, content, reason):
    rewrite(folder, with_content(name, content))
    (damage,) = damages(folder)
    assert (damage.shard, damage.key) == ("train-000001.tar", "k5")
    assert reason in damage.reason


def test_bomb_is_found_without_decoding_it(folder):
    bomb = bytearray(picture(5))
    frame = bomb.index(b"\xff\xc0")
    bomb[frame + 5 : frame + 9] = b"\xff\x00\xff\x00"
    rewrite(folder, with_content("k5.jpg", bytes(bomb)))
    (damage,) = damages(folder)
    assert "65280x65280 pixels is larger than 100 megapixels" in damage.reason


@pytest.mark.parametrize(
    ("edit", "key", "reason"),
    [
        (lambda m: [e for e in m if e[0] != "k5.json"], "k5", "has no annotation"),
        (lambda m: [e for e in m if e[0] != "k5.jpg"], "k5", "has 0 pictures instead of one"),
        (lambda m: [*m[:3], ("k5.png", picture(1, "PNG")), *m[3:]], "k5", "has 2 pictures"),
        (lambda m: [*m, m[0], m[1]], "k4", "key occurs twice in this shard"),
        (lambda m: [("k0" + name[2:] if "k5" in name else name, c) for name, c in m], "k0", "also"),
        (lambda m: [*m, ("../k9.json", b"{}")], None, "odd member '../k9.json'"),
        (lambda m: [*m, ("k4.pyd", b"")], None, "odd member 'k4.pyd'"),
        (lambda m: m[:-2], None, "has 3 samples, dataset.json says 4"),
        (with_content("k5.json", b'{"tags": ["sea"]}'), None, "has 3 labelled samples"),
    ],
)
def test_wrong_members_are_found(folder, edit, key, reason):
    rewrite(folder, edit)
    found = damages(folder)
    assert [d for d in found if d.key == key and reason in d.reason], found
    assert {damage.shard for damage in found} == {"train-000001.tar"}


def test_link_in_a_tar_is_found(folder):
    with tarfile.open(folder / "train-000001.tar", "a") as tar:
        link = tarfile.TarInfo("k9.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert any("odd member 'k9.jpg'" in damage.reason for damage in damages(folder))


def test_changed_byte_is_found_by_the_hash(folder):
    path = folder / "train-000001.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    content[last.offset_data + last.size] ^= 1  # in the padding: no sample is hurt
    path.write_bytes(content)
    assert damages(folder) == [
        Damage("train-000001.tar", None, "its SHA-256 is not the one in dataset.json")
    ]


@pytest.mark.parametrize("keep", [0, 100, 512, 1500, 4096])
def test_cut_off_tar_is_found(folder, keep):
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    found = damages(folder)
    reasons = " ".join(damage.reason for damage in found)
    assert f"has {keep} bytes, dataset.json says" in reasons
    assert "samples, dataset.json says 4" in reasons
    assert "does not match it" in reasons
    assert {damage.shard for damage in found} == {"train-000001.tar"}


def test_absent_files_are_found(folder):
    (folder / "train-000000.tar").unlink()
    (folder / "validation-000000.idx").unlink()
    assert damages(folder) == [
        Damage("train-000000.tar", None, "does not exist"),
        Damage("validation-000000.tar", None, "its index validation-000000.idx does not exist"),
    ]


def test_index_of_another_shard_is_found(folder):
    (folder / "train-000000.idx").write_bytes((folder / "train-000001.idx").read_bytes())
    (damage,) = damages(folder)
    assert "its index train-000000.idx is no good: its SHA-256" in damage.reason
    note_index_hashes(folder)
    (damage,) = damages(folder)
    assert damage.reason == "its index train-000000.idx does not match it from line 2 on"


def test_rubbish_instead_of_a_tar_is_found(folder):
    (folder / "train-000000.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    assert any("is no whole tar" in damage.reason for damage in damages(folder))
