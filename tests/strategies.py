"""Every way of training as a launcher is started for it, and the losses that it is known for.

    python tests/strategies.py    # writes tests/assets/losses/ anew; say why they moved

A file of losses holds 50 steps of a small run and the fingerprint of what computed them. The same
software on the same kind of processor gives the same bits; elsewhere sums are rounded in another
order, and a loss may differ by `ELSEWHERE`, relative.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from processes import REPOSITORY, TINY, losses, run

STEPS = 50
ELSEWHERE = 1e-4
STRATEGIES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
GOLDEN = ("single", "ddp", "zero2")
_LOSSES = Path(__file__).parent / "assets" / "losses"
# 90 items make 5 full batches and one of 10 rows: on two ranks with two micro-batches of 4 rows
# each, the last micro-batch is empty and the one before holds two rows.
_SETTINGS = [
    *TINY,
    "--model.dropout=0",  # drawn per rank, so that it alone may differ
    "--optim.schedule=constant",
    # Without the kinks of ReLU, rounding that differs does not grow: where a flat area of a demo
    # picture comes to lie on a kink, all of its positions cross it at once.
    "--model.backbone=efficientnet_b0",
    "--optim.lr=0.02",
    "--train.epochs=10",
    "--checkpoint.every_steps=5",
    "--checkpoint.keep=20",
]


def train(strategy: str, data: Path, run_dir: Path, *more: str, steps: int = STEPS) -> str:
    """Trains in one process, or in two that accumulate two micro-batches; returns what it printed.

    Args:
        strategy: one of `STRATEGIES`.
        data: the demo with 90 items.
        run_dir: does not exist yet.
        more: options of the launcher.
        steps: after which it stops.
    """
    options = [*_SETTINGS, f"--data.path={data}", f"--output_dir={run_dir}", f"--max_steps={steps}"]
    if strategy != "single":
        options.append("--train.max_micro_batch_size=4")
    through = []
    if strategy.startswith(("zero", "fsdp")):
        config = REPOSITORY / "configs" / "accelerate" / f"{strategy}_cpu_2.yaml"
        through = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    ranks = 2 if strategy == "ddp" else 1
    return run("train_ls.py", *options, *more, ranks=ranks, through=through)


def fingerprint() -> dict[str, object]:
    """What the bits of a loss depend on, besides the code: processor, threads and libraries."""
    packages = ("torch", "deepspeed", "numpy", "pillow", "simplejpeg")
    return {
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,  # of each process; `run` sees to it
        **{name: version(name) for name in packages},
    }


def known_losses(strategy: str) -> tuple[list[float], bool]:
    """The losses of steps 1 to 50, and whether exactly these have to come out here."""
    known = json.loads((_LOSSES / f"{strategy}.json").read_bytes())
    return known["losses"], known["fingerprint"] == fingerprint()


def assert_losses_have_not_moved(ours: list[float], known: list[float], *, exact: bool) -> None:
    """Fails at the first loss that is another one."""
    assert len(ours) == len(known)
    for step, (our, expected) in enumerate(zip(ours, known, strict=True), start=1):
        wanted = expected if exact else pytest.approx(expected, rel=ELSEWHERE)
        assert our == wanted, f"step {step}; if it should move: python tests/strategies.py"


def _cpu() -> str:
    """Libraries choose their kernels by the processor, not by what it is capable of alone."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    wanted = ("vendor_id", "cpu family", "model", "stepping")
    found = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    return " ".join(v.strip() for k, v in sorted(found.items()) if k.strip() in wanted)


def _regenerate() -> None:
    from magneto_dist.data.sources import demo

    _LOSSES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        demo.build(Path(folder, "demo"), items=90, num_processes=1)
        for strategy in GOLDEN:
            train(strategy, Path(folder, "demo"), Path(folder, strategy))
            content = {
                "fingerprint": fingerprint(),
                "losses": list(losses(Path(folder, strategy)).values()),
            }
            (_LOSSES / f"{strategy}.json").write_text(json.dumps(content, indent=1) + "\n")
            print(f"{strategy}: {content['losses'][0]:.6f} to {content['losses'][-1]:.6f}")


if __name__ == "__main__":
    _regenerate()
