"""Every message of docs/troubleshooting.md is what is printed; `tests/mistakes.py` mends it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mistakes import MISTAKES, PAGE, Mistake, make_scene, printed_by, row

ALL = [mistake for mistakes in MISTAKES.values() for mistake in mistakes]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    make_scene(folder)
    return folder


def _marked(mistake: Mistake) -> object:
    marks = [pytest.mark.slow] if mistake.is_slow else []
    return pytest.param(mistake, marks=marks, id=mistake.what)


@pytest.mark.parametrize("mistake", [_marked(mistake) for mistake in ALL])
def test_the_page_shows_what_is_printed(mistake: Mistake, scene: Path) -> None:
    if mistake.needs_mounts and not _may_mount():
        pytest.skip("needs user namespaces that may mount (unshare --map-root-user --mount)")
    if mistake.without_gpu and torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    message = printed_by(mistake, scene)
    assert row(mistake, message) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_no_other_rows() -> None:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| ") and "what happened" not in line]
    assert [line.split("<br>")[0] for line in rows] == [f"| {mistake.what}" for mistake in ALL]


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    mount = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return subprocess.run(mount, capture_output=True).returncode == 0
