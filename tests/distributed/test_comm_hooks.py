"""Communication hooks of DDP on two gloo ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from warm import shared


def train(hook: str, out: Path, d_ff: int = 32) -> dict:
    worker = Path(__file__).with_name("comm_hook_worker.py")
    shared().run(str(worker), hook, str(out), str(d_ff), ranks=2)
    return json.loads(out.read_bytes())


@pytest.fixture(scope="module")
def uncompressed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train("none", tmp_path_factory.mktemp("none") / "out.json")


@pytest.mark.parametrize(
    ("hook", "tolerance"),
    [
        ("fp16", 1e-3),
        pytest.param("bf16", 1e-2, marks=pytest.mark.slow),
        ("power_sgd", 0.5),
    ],
)
def test_training_goes_on_and_ranks_keep_the_same_weights(
    uncompressed: dict, tmp_path: Path, hook: str, tolerance: float
) -> None:
    found = train(hook, tmp_path / "out.json")
    assert found["differ"] == uncompressed["differ"] == 0
    assert found["losses"][0] == pytest.approx(uncompressed["losses"][0], rel=1e-6)
    assert found["losses"][-1] < 0.8 * found["losses"][0]
    ours, theirs = torch.tensor(found["weights"]), torch.tensor(uncompressed["weights"])
    error = float((ours - theirs).norm() / theirs.norm())
    assert 1e-7 < error < tolerance  # it was at work, and did no harm


@pytest.mark.slow
def test_power_sgd_of_more_than_a_usual_bucket(tmp_path: Path) -> None:
    """DDP's buckets hold 25 MB; on gloo, several of them would mix their matrices up."""
    found = train("power_sgd", tmp_path / "out.json", d_ff=500_000)
    assert len(found["weights"]) * 4 > 60e6
    assert found["differ"] == 0
    assert found["losses"][-1] < found["losses"][0]
