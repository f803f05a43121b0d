"""Real photographs end to end: a table becomes shards, and a head learns on a frozen backbone."""

from __future__ import annotations

from pathlib import Path

import pytest

from processes import TINY, losses, run, summary

SHARED = Path(__file__).parents[3] / "shared"
PHOTOS = SHARED / "data" / "photos" / "photos.csv"
WEIGHTS = SHARED / "weights" / "mobilenet_v2_imagenet_dequantised.pth"
STEPS = 12
# The whole split is one batch and tags stay as they are: the loss falls without noise.
QUIET = [
    "--train.global_batch_size=36",
    "--model.dropout=0",
    "--tags.beta_add=0",
    "--tags.beta_drop=0",
]


@pytest.mark.skipif(
    not (PHOTOS.exists() and WEIGHTS.exists()),
    reason=f"the photographs {PHOTOS} and the weights {WEIGHTS} are not both here",
)
def test_photographs_become_shards_and_train(tmp_path: Path) -> None:
    data, run_dir = tmp_path / "shards", tmp_path / "run"
    printed = run("shards.py", "build", "table", f"--table={PHOTOS}", f"--out={data}")
    assert "44 samples; 0 skipped" in printed
    run(
        "train_ls.py",
        *TINY,
        *QUIET,
        f"--data.path={data}",
        f"--output_dir={run_dir}",
        f"--max_steps={STEPS}",
        f"--train.epochs={STEPS}",
        f"--train.eval_every_epochs={STEPS}",
        "--optim.lr=0.2",
        "--augment.image_size=64",
        "--model.d_model=64",
        "--model.backbone=mobilenet_v2",
        "--model.backbone_stages=null",
        "--model.frozen_stages=all",
        f"--model.backbone_weights={WEIGHTS}",
    )
    result = summary(run_dir)
    assert (result["trained_items"], result["validation"]["items"]) == (36 * STEPS, 8)
    loss = list(losses(run_dir).values())
    assert len(loss) == STEPS
    assert loss[-1] < 0.8 * loss[0], loss
    assert max(loss[6:]) < min(loss[:3]), loss
