"""Imports point one way, and a heavy package enters in one file (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "magneto_dist"

LEAVES = {"batch", "config", "config_checks", "decision", "errors", "files", "precision",
          "vocabulary", "world"}  # fmt: skip
MAY_IMPORT = {
    **dict.fromkeys(LEAVES, LEAVES),
    "config_io": LEAVES,
    "data": LEAVES,
    "model": LEAVES,
    "loss": LEAVES,
    "metrics": LEAVES,
    "training": LEAVES | {"binning", "config_io", "data", "model", "loss", "metrics"},
    "binning": LEAVES,
    "evaluation": LEAVES | {"binning", "data", "model", "loss", "metrics"},
    "report": LEAVES | {"data", "model", "loss", "metrics", "evaluation", "training"},
    "parts": LEAVES | {"data", "model", "training"},
    "trained_run": LEAVES | {"config_io", "model", "training"},
    "inference": LEAVES | {"data", "trained_run"},
    "prediction_file": LEAVES | {"inference"},
    "gallery": LEAVES | {"data", "inference"},
    "prediction_run": LEAVES | {"data", "inference", "gallery", "prediction_file", "trained_run"},
    "model_card": LEAVES | {"report", "trained_run", "training"},
    "hub": LEAVES | {"model_card", "trained_run"},
    "predictor": LEAVES | {"data", "hub", "inference", "trained_run"},
}
MAY_IMPORT["scoring"] = set(MAY_IMPORT)
MAY_IMPORT["export"] = set(MAY_IMPORT)
MAY_IMPORT["recipe"] = set(MAY_IMPORT)
MAY_IMPORT["doctor"] = LEAVES | {"data", "training"}
ONLY_IN = {
    "accelerate": {"training/session.py"},
    "deepspeed": {"training/zero.py", "doctor/trials.py"},
    "nvidia": {"data/dali_pipeline.py", "data/decode_dali.py"},
    "matplotlib": {"report.py", "scoring/plots.py"},
    "jsonargparse": {"config_io.py"},
    "webdataset": {"data/shard_writer.py"},
    "datasets": {"data/sources/hf_split.py"},
    "onnxruntime": {"export.py"},
    "onnx": {"export.py"},
    "huggingface_hub": {"hub.py", "data/sources/hf_split.py"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            assert node.module
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return  # gives the public names; nobody inside imports it
    allowed = MAY_IMPORT[room] | {room}
    for module in imported_modules(path):
        parts = module.split(".")
        if parts[0] == "magneto_dist" and len(parts) > 1:
            assert parts[1] in allowed, f"{room} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_heavy_packages_enter_in_one_file(path: Path) -> None:
    relative = str(path.relative_to(PACKAGE))
    for module in imported_modules(path):
        top = module.split(".")[0]
        assert relative in ONLY_IN.get(top, {relative}), f"{relative} imports {module}"


def test_every_room_has_a_rule() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} <= set(MAY_IMPORT)
