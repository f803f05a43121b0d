"""Every command of README.md runs, from top to bottom, in a folder that it fills step by step."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from processes import TINY
from tensorboard_pages import served
from warm import PATIENCE_S, REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("python", "accelerate", "torchrun", "tensorboard", "bash", "pip", "sbatch")
SHORT = [*TINY, "--max_steps=2"]


@dataclass(frozen=True)
class Variant:
    """How a command is made short enough for a test; it is run as it stands otherwise."""

    more: tuple[str, ...] = ()
    """Options appended."""
    before: Callable[[Path], None] = lambda folder: None
    """Puts the files there that the reader would have."""
    leaves: tuple[str, ...] = ()
    """Files or folders that must be there afterwards."""


def commands(text: str) -> list[str]:
    """The commands of a page, in order: in indented blocks, and between backticks in the text."""
    text = re.sub(r" \\\n\s+", " ", text)
    found = re.findall(r"^ {4}(.*)$|`([^`\n]+)`", text, re.M)
    parts = [part.strip() for block, inline in found for part in (block or inline).split(" && ")]
    return [part for part in parts if part.split(" ")[0] in PROGRAMS and " " in part]


def _photos(folder: Path) -> None:
    """The reader's own pictures: those of `photos.csv`, in the README's columns."""
    from magneto_dist.data.sources import demo

    demo.build(folder / "generated", items=60, num_processes=1)
    rows = re.findall(r"^ {4}(file_name,.*)$", README, re.M)
    with tarfile.open(folder / "generated/train-000000.tar") as tar:
        members = {Path(m.name).suffix + Path(m.name).stem: m for m in tar}
        for name, member in members.items():
            if name.startswith(".jpg"):
                key = name.removeprefix(".jpg")
                (folder / f"{key}.jpg").write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
                item = json.load(tar.extractfile(members[f".json{key}"]))  # type: ignore[arg-type]
                flags = zip(item["tags"], item["important"], strict=True)
                main = [tag for tag, flag in flags if flag]
                rows.append(f'{key}.jpg,"{",".join(item["tags"])}","{",".join(main)}"')
    (folder / "photos.csv").write_text("\n".join(rows) + "\n")


def _tars(folder: Path) -> None:
    """Tars that the reader has already, with names of their own for the same things."""
    (folder / "tars").mkdir()
    shutil.rmtree(folder / "shards")
    with (
        tarfile.open(folder / "generated/train-000000.tar") as old,
        tarfile.open(folder / "tars/a.tar", "w", format=tarfile.USTAR_FORMAT) as new,
    ):
        for member in old:
            content = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".json"):
                item = json.loads(content)
                flags = zip(item["tags"], item["important"], strict=True)
                main = [tag for tag, flag in flags if flag]
                content = json.dumps({"tags": item["tags"], "main_tags": main}).encode()
            entry = tarfile.TarInfo(member.name)
            entry.size = len(content)
            path = folder / "member"
            path.write_bytes(content)
            with path.open("rb") as file:
                new.addfile(entry, file)


def _split_is_the_data_set(folder: Path) -> None:
    shutil.rmtree(folder / "shards")
    shutil.copytree(folder / "shards-split", folder / "shards")


def _stages(folder: Path) -> None:
    (block,) = re.findall(r"^    from dataclasses .*?(?=^    accelerate)", README, re.M | re.S)
    code = "\n".join(line.removeprefix("    ") for line in block.splitlines())
    (folder / "my_stages.py").write_text(code + "\n")


DRY = Variant(("--dry-run", "--no-deps", "--no-build-isolation"))  # `.ci/run` does it in earnest
VARIANTS = {
    "python -m pip install -e .": DRY,
    "accelerate launch launchers/train_ls.py": Variant(
        (*SHORT, "--log.tensorboard=true"), leaves=("runs/demo/summary.json",)
    ),
    "tensorboard --logdir runs": Variant(),  # see `served`
    "python -m magneto_dist.doctor": Variant(("--timeout_s=300",)),
    "python -m pip install -e '.[test]'": Variant(
        ("--dry-run", "--no-deps", "--no-build-isolation")
    ),
    "python -m pytest": Variant(("-n", "0", "-q", "tests/test_vocabulary.py")),
    "python launchers/shards.py build table --table photos.csv --out shards": Variant(
        before=_photos, leaves=("shards/dataset.json",)
    ),
    "python launchers/shards.py verify shards": Variant(),
    "python launchers/shards.py stats shards --plot stats.png": Variant(leaves=("stats.png",)),
    "python launchers/shards.py index tars --tags-field tags --important-field main_tags"
    " --out shards": Variant(before=_tars, leaves=("shards/dataset.json",)),
    "python launchers/shards.py split shards --out shards-split --validation_fraction 0.1": Variant(
        leaves=("shards-split/dataset.json",)
    ),
    "accelerate launch --config_file configs/accelerate/gpu_1.yaml launchers/train_ls.py"
    " --config configs/ls.yaml --data.path shards --output_dir runs/mine": Variant(
        (*SHORT, "--model.backbone_weights=none"),
        _split_is_the_data_set,
        ("runs/mine/summary.json",),
    ),
    "python launchers/train_ls.py --help": Variant(),
    "python benchmarks/throughput.py --config FILE --data DIR": Variant(("--help",)),
    "accelerate launch launchers/train_ls.py --data.path shards"
    " --data.stages '[my_stages:three_tags]'": Variant(
        (*SHORT, "--output_dir=runs/staged"), _stages, ("runs/staged/summary.json",)
    ),
    "accelerate launch launchers/evaluate.py --run runs/mine --out scores.json": Variant(
        leaves=("scores.json",)
    ),
    "python launchers/predict.py --run runs/mine --input photos.csv --out tags.jsonl"
    " --html tags.html": Variant(leaves=("tags.jsonl", "tags.html")),
    "python launchers/export.py --run runs/mine --out exported --onnx --pt2": Variant(
        leaves=("exported/model.onnx",)
    ),
}


def test_every_command_of_the_readme_has_a_test() -> None:
    found = dict.fromkeys(commands(README))
    assert len(found) > 12
    untested = [command for command in found if command not in VARIANTS]
    assert not untested, f"add to VARIANTS how to run: {untested}"
    gone = [command for command in VARIANTS if command not in found]
    assert not gone, f"no longer in the README: {gone}"


def test_commands_are_found_wherever_they_stand() -> None:
    page = "Use `python a.py --x` or `a.py`.\n\n    torchrun b.py \\\n        --y 1 && bash c d\n"
    assert commands(page) == ["python a.py --x", "torchrun b.py --y 1", "bash c d"]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_readme_from_top_to_bottom(tmp_path: Path) -> None:
    for name in (
        "launchers", "configs", "magneto_dist", "benchmarks", "tests", "pyproject.toml",
        "README.md", "LICENSE",
    ):  # fmt: skip
        (tmp_path / name).symlink_to(REPOSITORY / name)
    for command in dict.fromkeys(commands(README)):
        variant = VARIANTS[command]
        variant.before(tmp_path)
        if command.startswith("tensorboard"):
            with served(shlex.split(command), tmp_path):  # until it shows a run
                continue
        ended = subprocess.run(
            ["bash", "-c", shlex.join([*shlex.split(command), *variant.more])],
            cwd=tmp_path,
            env=_environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE_S,
        )
        assert ended.returncode == 0, f"{command}\n{ended.stdout}"
        for name in variant.leaves:
            assert (tmp_path / name).exists(), f"{command} left no {name}\n{ended.stdout}"


def _environment() -> dict[str, str]:
    scripts = str(Path(sys.executable).parent)
    paths = {"PYTHONPATH": str(REPOSITORY), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    return {**os.environ, **paths, "OMP_NUM_THREADS": "1"}
