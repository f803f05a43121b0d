"""The parts of `gpu.py`: which commands, with which limits, and what is read from what they leave.

`plan` lists them, for a GPU or for a dry run; `gpu_runs.py` starts them.
"""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from harness import provenance
from magneto_dist.data.shards import Dataset

ROOT = Path(__file__).parent.parent
LARGEST_DIFFERENCE = 2.0  # of 255, between decoders, before the policy
SMALL = {
    "augment.image_size": 32,
    "tags.max_tags": 12,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.d_ff": 32,
    "model.image_layers": 1,
    "model.tag_layers": 1,
    "model.backbone": "resnet18",
    "model.backbone_stages": 2,
    "model.frozen_stages": 1,
    "model.batch_norm_group_size": 4,
    "train.global_batch_size": 16,
    "data.num_workers": 0,
    "data.num_streams": 4,
}


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    question: str
    command: tuple[str, ...]
    """After `python`."""
    limit_s: float
    leaves: Path
    """File or folder that `read` reads; what is there is removed before the part begins."""
    read: Callable[[Path], dict]
    """What the part has left, also where it did not come to its end."""
    keeps: bool = False
    """`leaves` is not removed: the part does nothing where it is there."""
    pictures: tuple[Path, ...] = ()

    def shown(self, work: Path) -> str:
        """The command without this machine's folders."""
        command = " ".join(("python", *self.command))
        command = command.replace(f"{work}/", "WORK/").replace(str(work), "WORK")
        command = command.replace(f"{ROOT}/", "")
        return re.sub(r"--photos \S+", "--photos FOLDER", command)


def plan(photos: Path, work: Path, items: int, num_tags: int, dry_run: bool) -> list[Part]:
    """All parts, the most wanted first."""
    shards = Part(
        "shards",
        "a data set made of photographs",
        (f"{ROOT}/benchmarks/gpu.py", "--make_shards", *_options(photos=photos, work=work),
         *_options(items=items, num_tags=num_tags)),
        180,
        work / "shards" / "dataset.json",
        read_dataset,
        keeps=True,
    )  # fmt: skip
    if dry_run:
        runs = [("no", "cpu", 6), ("bf16", "dali_cpu", 6)]
    else:
        runs = [
            ("fp16", "dali_gpu", 200),
            ("bf16", "dali_gpu", 200),
            ("fp16", "cpu", 200),
            ("fp16", "dali_cpu", 100),
            ("tf32", "dali_gpu", 60),
            ("no", "dali_gpu", 40),
        ]
    trains = [_train(work, *run, dry_run) for run in runs]
    others = {
        "decoders": _decoders(photos, work, dry_run),
        "memory": _memory(work, dry_run),
        "tests": _tests(work, dry_run),
    }
    loaders = [_loader(photos, work, policy, dry_run) for policy in (False, True)]
    first, *rest = trains
    return [shards, first, *others.values(), *rest, *(loaders[:1] if dry_run else loaders)]


def _options(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _train(work: Path, precision: str, decoder: str, steps: int, dry_run: bool) -> Part:
    name = f"train_{precision}_{decoder}"
    run_dir = work / "runs" / name
    options = _options(config=ROOT / "configs" / "ls.yaml", output_dir=run_dir, resume="never")
    settings = {
        "data.path": work / "shards",
        "data.decoder": decoder,
        "train.precision": "no" if precision == "tf32" else precision,
        "train.tf32": str(precision == "tf32").lower(),
        "model.backbone_weights": "none",  # the same work without a download
        "train.epochs": 100_000,
        "train.eval_every_epochs": 100_000,  # at the end alone
        "max_steps": steps,
        "checkpoint.every_steps": max(1, steps // 4),
        "log.every_steps": max(1, steps // 20),
        "log.pictures": 0,
        **(SMALL if dry_run else {}),
    }
    return Part(
        name,
        f"LS training, {precision}, decoder {decoder}, {steps} steps",
        (f"{ROOT}/launchers/train_ls.py", *options, *_options(**settings)),
        120,
        run_dir,
        read_run,
    )


def _decoders(photos: Path, work: Path, dry_run: bool) -> Part:
    out = work / "decoders"
    small = ("--size", "32") if dry_run else ()
    return Part(
        "decoders",
        "decoders: pictures/s, and how far their pixels differ",
        (f"{ROOT}/benchmarks/decode.py", "--question", "decoders", *_options(photos=photos),
         *_options(rounds=1 if dry_run else 5, out=out), *small),
        90,
        out.with_suffix(".json"),
        read_decoders,
    )  # fmt: skip


def _memory(work: Path, dry_run: bool) -> Part:
    out = work / "memory"
    chosen = ["--measured", "--limit", "--quick", "--precisions", "fp16"]
    if dry_run:
        chosen = [*_options(config="configs/demo.yaml", num_tags=50), "--quick"]
        chosen += ["--precisions", "no", "--micro_batches", "16", "--checkpointing", "no"]
    return Part(
        "memory",
        "memory of a training step",
        (f"{ROOT}/benchmarks/memory.py", *_options(out=out), *chosen),
        180,
        out.with_suffix(".json"),
        read_benchmark,
        pictures=(out.with_suffix(".png"),),
    )


def _loader(photos: Path, work: Path, policy: bool, dry_run: bool) -> Part:
    name = "loader_autoaugment" if policy else "loader_plain"
    out = work / name
    chosen = ["--only", "dali_cpu" if dry_run else "magneto_dist, dali_gpu", "--rounds", "1"]
    chosen += ["--size", "32", "--batch_size", "8"] if dry_run else ["--workers", "8"]
    return Part(
        name,
        "loader alone",
        (f"{ROOT}/benchmarks/loader.py", *_options(photos=photos, folder=work, out=out),
         *chosen, *["--policy"] * policy),
        150,
        out.with_suffix(".json"),
        read_benchmark,
    )  # fmt: skip


def _tests(work: Path, dry_run: bool) -> Part:
    report = work / "tests.xml"
    chosen = ["tests", "-m", "gpu"]
    if dry_run:
        chosen = ["tests/data/test_decode.py", "-m", "not gpu", "-k", "whole_picture"]
    return Part(
        "tests",
        "tests that need a GPU",
        ("-m", "pytest", *chosen, "-n", "0", "-q", f"--junitxml={report}"),
        120,
        report,
        read_tests,
    )


# What they leave --------------------------------------------------------------------------------


def read_dataset(path: Path) -> dict:
    """How many items a data set has."""
    dataset = Dataset.open(str(path.parent))
    sizes = {f"{split}_items": dataset.num_samples(split) for split in sorted(dataset.splits)}
    return {**sizes, "num_tags": len(dataset.vocabulary)}


def read_run(run_dir: Path) -> dict:
    """Speed, waiting, checkpoints and loss of a run folder; speed is the median line's.

    The first tenth of the lines is left out of speed and waiting: it holds the start.
    """
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == "train"]
    steady = lines[max(1, len(lines) // 10) :]
    losses = [line["loss"] for line in lines]
    return {
        "steps": lines[-1]["step"],
        "images_per_second": median(line["images_per_second"] for line in steady),
        "data_wait_fraction": median(line["data_wait_fraction"] for line in steady),
        "checkpoint_stall_s": sum(line["checkpoint_stall_s"] for line in lines),
        "first_loss": losses[0],
        "final_loss": losses[-1],
        "loss_is_finite": all(math.isfinite(loss) for loss in losses),
        "skipped_steps": lines[-1]["skipped_steps"],
    }


def read_benchmark(path: Path) -> dict:
    """What another benchmark has saved, without its provenance."""
    known = provenance()
    return {name: v for name, v in json.loads(path.read_text()).items() if name not in known}


def read_decoders(path: Path) -> dict:
    """Also whether every decoder's pixels are close enough to the cpu decoder's.

    Raises:
        ValueError: a decoder's note does not say how far it is off.
    """
    result = read_benchmark(path)
    differences = {}
    for timing in result["timings"]:
        if timing["name"].startswith("dali"):
            found = re.search(r"differs from cpu by ([\d.]+) of 255", timing["note"])
            if found is None:
                raise ValueError(f"{timing['name']}: {timing['note']!r}")
            differences[timing["name"]] = float(found[1])
    plain = [value for name, value in differences.items() if "AutoAugment" not in name]
    is_close = bool(plain) and max(plain) < LARGEST_DIFFERENCE
    return {**result, "differences": differences, "decoders_agree": is_close}


def read_tests(path: Path) -> dict:
    """Counts, and the names of those that failed."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    failed = [
        f"{case.get('classname')}.{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return {**counts, "failed": failed}
