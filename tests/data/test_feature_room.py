"""Folders of cached features make room in the order of their last use; none goes in vain."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from magneto_dist.data.cache_room import locked
from magneto_dist.data.feature_room import InUse, room_for
from magneto_dist.errors import InputError

MB = 1 << 20
OURS = "f" * 16


def make(root: Path, number: int, megabytes: int = 1) -> Path:
    """A folder of features; the one with the lowest number was used first."""
    folder = root / f"{number:016x}"
    folder.mkdir(parents=True)
    (folder / "train-0000.npy").write_bytes(b"x" * (megabytes * MB))
    os.utime(folder, (0, time.time() - 1000 + number))
    return folder


def ask(root: Path, megabytes: float, bound: float) -> list[str]:
    """Asks for room for the features of a run; which other folders are left."""
    ours = InUse(root / OURS)
    with room_for(root / OURS, int(megabytes * MB), bound * MB / 1e9):
        pass
    del ours
    return sorted(path.name[-1] for path in root.iterdir() if path.is_dir() and path.name != OURS)


def free_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, megabytes: float) -> None:
    usage = shutil.disk_usage(folder)._replace(free=int(megabytes * MB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three folders of 1 MB."""
    for number in (2, 1, 3):
        make(tmp_path / "Größe", number)
    return tmp_path / "Größe"


@pytest.mark.parametrize(
    ("bound", "left"), [(9, "123"), (4.5, "123"), (3.5, "23"), (2.5, "3"), (1.5, "")]
)
def test_as_many_go_as_the_bound_asks_for(root: Path, bound: float, left: str) -> None:
    assert ask(root, 1, bound) == [*left]


def test_what_is_used_stays_whenever_that_was(root: Path) -> None:
    used = InUse(root / f"{1:016x}")
    os.utime(root / f"{1:016x}", (0, 0))
    assert ask(root, 1, 3.5) == ["1", "3"]
    with pytest.raises(InputError, match=r"of 0.00105 GB .* beside 0.00105 GB that other runs use"):
        ask(root, 1, 1.5)
    assert {"1", "3"} == {path.name[-1] for path in root.glob("0*")}  # none has gone in vain
    del used
    assert ask(root, 1, 1.5) == []


def test_a_run_that_is_larger_than_the_bound_is_refused(root: Path) -> None:
    with pytest.raises(InputError, match=r"are more than --data.feature_cache_gb 0.0\d+: raise"):
        ask(root, 2, 1.5)
    assert len([*root.glob("0*")]) == 3


def test_a_disk_that_is_short_has_others_go_too(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_disk(monkeypatch, root, 0.5)
    with pytest.raises(InputError, match=r"needs 0.00 GB in .*, where 0.00 GB are free: make room"):
        ask(root, 4, 1000)
    assert ask(root, 2, 1000) == ["3"]


def test_what_a_run_has_yet_to_fill_is_not_given_twice(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = root / f"{1:016x}"
    with (folder / ".train-0001.part").open("wb") as file:
        file.truncate(8 * MB)
    os.utime(folder, (0, 0))
    free_disk(monkeypatch, root, 9)
    used = InUse(folder)
    with pytest.raises(InputError, match="make room or choose another folder"):
        ask(root, 4, 1000)
    assert ask(root, 2, 1000) == ["1", "3"]
    del used  # as after a kill: nobody fills it any more
    assert ask(root, 9, 1000) == ["1", "3"]


def test_no_bound_is_a_bound_too(root: Path) -> None:
    assert ask(root, 1, float("inf")) == ["1", "2", "3"]


def test_a_removal_that_was_killed_leaves_nothing_that_looks_whole(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        next(folder.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(root, 1, 3.5)
    assert [path.name[-1] for path in sorted(root.glob("0*"))] == ["2", "3"]
    assert len([*root.glob(".*.removed")]) == 1
    assert ask(root, 1, 3.5) == ["2", "3"]
    assert not [*root.glob(".*.removed")]


def test_what_is_not_ours_is_left_alone(root: Path) -> None:
    (root / "photographs").mkdir()
    (root / "photographs" / "a.jpg").write_bytes(b"x" * MB)
    (root / "notes.txt").write_text("mine")
    (root / f"{9:016x}").symlink_to(root / "photographs")
    assert ask(root, 1, 1.1) == ["9", "s"]
    assert (root / "photographs" / "a.jpg").exists()
    assert (root / "notes.txt").exists()


def test_the_lock_of_a_process_that_is_killed_is_free(root: Path) -> None:
    code = (
        "import sys, time, pathlib; from magneto_dist.data.feature_room import InUse\n"
        "held = InUse(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(root / f"{1:016x}")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    os.utime(root / f"{1:016x}", (0, 0))
    assert ask(root, 1, 3.5) == ["1", "3"]
    process.kill()
    process.communicate()
    assert ask(root, 1, 2.5) == ["3"]


def test_who_comes_while_a_folder_is_removed_finds_it_empty(root: Path) -> None:
    folder, found = root / f"{1:016x}", []

    def come() -> None:
        used = InUse(folder)
        found.append([*folder.iterdir()])
        del used

    with locked(root / f".{folder.name}.lock"):
        thread = threading.Thread(target=come)
        thread.start()
        shutil.rmtree(folder)
        time.sleep(0.05)
        assert not found
        assert not folder.exists()
    thread.join(10)
    assert found == [[]]
