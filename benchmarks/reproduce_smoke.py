"""What the smoke grid needs: demo data, and a backbone that has learned on other demo data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save

from magneto_dist.files import write_atomically
from magneto_dist.trained_run import load_run
from reproduce_runs import Job, Setup, as_options, run_all

ITEMS, BACKBONE_EPOCHS = 1000, 8


def prepare_smoke(
    setup: Setup, num_items: int, run: Callable[[Job, Path], int], made_by: dict
) -> Setup:
    """Makes demo data and a trained backbone; the setup with both.

    Args:
        setup: its work is where both are made.
        num_items: training items of the grid, and 8/5 as many others of the backbone.
        run: as for `run_all`.
        made_by: provenance.
    """
    data, own_data, backbone = (
        setup.work / f"{name}-{num_items}" for name in ("data", "backbone-data", "backbone")
    )
    weights = backbone.with_suffix(".safetensors")
    shared = ("data.num_workers", "log.every_steps", "log.tensorboard")
    settings = {
        **{name: setup.study.smoke[name] for name in shared},
        "data.path": own_data,
        "output_dir": backbone,
        "train.epochs": BACKBONE_EPOCHS,
    }
    given = (word for word in setup.extra if not word.startswith("--model."))
    options = (*as_options(settings), *given)
    jobs = [
        _demo_job("data of the backbone", own_data, num_items * 8 // 5, seed=1),
        Job("backbone", "train_ls.py", options, backbone / "summary.json"),
        _demo_job("data", data, num_items, seed=0),
    ]
    run_all(jobs, run, setup.work, made_by)
    if not weights.exists():
        write_backbone(backbone, weights)
    settings = {**setup.study.smoke, "model.backbone_weights": weights}
    return replace(setup, data=data, settings=settings)


def _demo_job(name: str, out: Path, items: int, seed: int) -> Job:
    options = ("build", "demo", *as_options({"out": out, "items": items, "seed": seed}))
    return Job(name, "shards.py", options, out / "dataset.json")


def write_backbone(run_dir: Path, out: Path) -> None:
    """The stages of a run's backbone as a state_dict of the whole torchvision network.

    Stages that the run has cut off are zero: what reads them must cut them off, too.
    """
    run = load_run(run_dir)
    network = torchvision.models.get_model(run.config.model.backbone, weights=None)
    state = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    backbone = run.model.image_stream.backbone  # type: ignore[union-attr]
    for name, value in backbone.stages.state_dict().items():  # type: ignore[union-attr]
        plain = name.removeprefix("stem.")
        assert plain in state, name
        state[plain] = value.contiguous()
    write_atomically(out, save(state))
