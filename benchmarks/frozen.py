"""What does 16-bit arithmetic save in the frozen stages of a backbone, and what does it cost?

python benchmarks/frozen.py --backbone mobilenet_v2 --backbone_weights PATH --backbone_stages 7

1. A forward pass of the ResNet-18 of `configs/nuswide.yaml` (32 pictures of 112 px, one thread of a
   CPU; random weights, the work is the same): as torchvision has it, folded, in 16 bits.
2. Trainings of `configs/demo.yaml`, but for the given backbone, frozen whole, through the recipe on
   the live pipeline with each precision over a few seeds: F1 of the gated output after the last
   epoch. Same seed, same order, augmentation and dropout: what differs is the precision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from command_line import at_least, parser
from features import demo_config, f1_after_training
from harness import Timing, compare, save
from magneto_dist.config import Precision
from magneto_dist.config_io import load_config
from magneto_dist.data.sources import demo
from magneto_dist.errors import exit_with_clear_errors
from magneto_dist.model.backbone import build_backbone

PRECISIONS: tuple[Precision, ...] = ("no", "bf16")
PICTURES = 32


def main() -> None:
    """Command line -> tables, and a file with --out."""
    options = parser(__doc__)
    options.add_argument(
        "--items", type=at_least(4), default=400, help="for training (default: 400)"
    )
    options.add_argument(
        "--seeds", type=at_least(1), default=3, help="runs of each kind (default: 3)"
    )
    options.add_argument("--epochs", type=at_least(1), default=12, help="of each run (default: 12)")
    options.add_argument("--backbone", default="resnet18")
    options.add_argument("--backbone_weights", default="none")
    options.add_argument("--backbone_stages", type=at_least(1), default=3)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = demo_config(
            "demo.yaml",
            Path(folder),
            given.epochs,
            backbone=given.backbone,
            backbone_weights=given.backbone_weights,
            backbone_stages=given.backbone_stages,
        )
        build_backbone(config.model)  # shows what is wrong with it
        timings = _forward(given.rounds)
        _print_timings(timings)
        demo.build(Path(folder, "demo"), given.items)
        f1: dict[str, list[float]] = {}
        for precision in PRECISIONS:
            model = replace(config.model, frozen_precision=precision)
            run = replace(config, model=model, output_dir=f"{config.output_dir}/{precision}")
            f1[precision] = [f1_after_training(run, seed) for seed in range(given.seeds)]
    _print_f1(f1)
    if given.out:
        settings = {"items": given.items, "epochs": given.epochs, "model": asdict(config.model)}
        if given.backbone_weights not in ("none", "imagenet"):
            settings["model"]["backbone_weights"] = Path(given.backbone_weights).name
        measured = {"forward": [asdict(t) for t in timings], "f1_by_precision_and_seed": f1}
        save(given.out, {**measured, "settings": settings})


@torch.no_grad()
def _forward(rounds: int) -> list[Timing]:
    torch.set_num_threads(1)
    config = load_config(Path(__file__).parent.parent / "configs" / "nuswide.yaml")
    size = config.augment.image_size
    pixels = torch.randint(256, (PICTURES, 3, size, size), dtype=torch.uint8)

    def backbone(precision: Precision, memory_format: torch.memory_format) -> nn.Module:
        settings = replace(config.model, backbone_weights="none", frozen_precision=precision)
        return build_backbone(settings).to(memory_format=memory_format)  # type: ignore[call-overload]

    plain = backbone("no", torch.contiguous_format)

    def unfolded() -> Tensor:
        return plain.stages(pixels * plain.scale + plain.shift)  # type: ignore[operator]

    ways: dict[str, Callable[[], object]] = {"float32, not folded": unfolded}
    for precision, name in zip(PRECISIONS, ("float32", "bf16"), strict=True):
        ways[f"{name}, folded"] = partial(backbone(precision, torch.contiguous_format), pixels)
        ways[f"{name}, folded, channels last"] = partial(
            backbone(precision, torch.channels_last), pixels
        )
    return compare(ways, PICTURES, rounds)


def _print_timings(timings: list[Timing]) -> None:
    for timing in timings:
        print(f"{timing.name:<30} {timing.per_s:5.0f} pictures/s, ratio {timing.ratio:.2f}")


def _print_f1(f1: dict[str, list[float]]) -> None:
    for precision, each in f1.items():
        gain = [ours - plain for ours, plain in zip(each, f1["no"], strict=True)]
        spread = f" +- {stdev(gain):.2%}" if len(gain) > 1 else ""
        values = ", ".join(f"{value:.1%}" for value in each)
        print(f"{precision:<5} F1 {values}; against no {mean(gain):+.2%}{spread}")


if __name__ == "__main__":
    exit_with_clear_errors(main)
