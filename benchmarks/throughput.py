"""How fast does this machine train, how fast could it, what holds it back, what to try?

python benchmarks/throughput.py                                   # configs/demo.yaml, demo data
python benchmarks/throughput.py --config configs/ls.yaml --data DIR --out NAME
python benchmarks/throughput.py --config configs/ls.yaml --data synthetic --num_tags 24056
torchrun --nproc_per_node 2 -- benchmarks/throughput.py           # GPUs: or accelerate launch
python benchmarks/throughput.py --scaling 1,2,4,8                 # each world its own torchrun

Every stage of training alone (read, decode, augment, copy to the device, forward and backward on
data already there, optimizer, all-reduce) and all together through the real loop, in turn, in one
run. Prints a card; the last line of stdout is JSON. Settings of the configuration follow as
`--section.field value`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from command_line import above_zero, at_least, folder_to_fill, parser
from harness import RESULTS, provenance, save
from magneto_dist.config import Config
from magneto_dist.config_io import parse_command_line
from magneto_dist.errors import exit_with_clear_errors

REPOSITORY = Path(__file__).parent.parent


def main() -> None:
    """Command line -> card, and three files with --out."""
    given, overrides = _parse()
    if given.scaling:
        from scaling import run_series

        run_series(given, overrides)
        return
    config = _config(given, overrides)
    # Here and not above: loader processes import this file, and need no model.
    from magneto_dist.parts import open_data
    from magneto_dist.training.process import die_with_launcher
    from magneto_dist.training.session import Session
    from throughput_measure import measure

    die_with_launcher()
    session = Session(config.train, config.optim.clip_norm)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(session.from_main(lambda: temporary))  # all must have the same
        made = (given.folder or work) / _synthetic_name(given, config)
        path = {"demo": config.data.path, "synthetic": str(made)}.get(given.data, given.data)
        config = replace(config, data=replace(config.data, path=path))
        if given.data == "synthetic":
            session.from_main(lambda: _make(made, config, given))
        dataset = session.on_all(lambda: open_data(config))
        found = measure(
            config,
            session,
            dataset,
            work / "run",
            rounds=given.rounds,
            round_s=given.round_s,
            only=tuple(given.only or ()),
        )
        session.barrier()
    if session.is_main:
        _tell(found, given)
    session.close()


def _parse() -> tuple[argparse.Namespace, list[str]]:
    options = parser(__doc__, rounds=5)
    options.add_argument(
        "--config", type=Path, default=REPOSITORY / "configs" / "demo.yaml", help="YAML file"
    )
    options.add_argument(
        "--data", default="demo", help="data set, `demo` or `synthetic` (default: demo)"
    )
    options.add_argument(
        "--round_s", type=above_zero, default=2.0, help="s a call takes (default: 2)"
    )
    options.add_argument(
        "--items", type=at_least(1), default=512, help="synthetic: items (default: 512)"
    )
    options.add_argument(
        "--picture",
        type=_size,
        default="500x375",
        help="synthetic: width x height, pixels (default: 500x375)",
    )
    options.add_argument(
        "--num_tags", type=at_least(1), default=1000, help="synthetic: vocabulary (default: 1000)"
    )
    options.add_argument(
        "--tags_per_item",
        type=at_least(1),
        help="synthetic: in the mean (default: half of tags.max_tags)",
    )
    options.add_argument(
        "--folder", type=folder_to_fill, help="keeps synthetic data (default: does not)"
    )
    options.add_argument("--only", nargs="+", help="stages wanted; no card without all of them")
    options.add_argument("--scaling", help="numbers of processes, e.g. 1,2,4,8")
    options.add_argument(
        "--passes", type=at_least(1), default=1, help="scaling: of the whole series (default: 1)"
    )
    return options.parse_known_args()


def _size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT; argparse tells of a ValueError in one line."""
    width, height = map(at_least(1), text.split("x"))
    return width, height


def _config(given: argparse.Namespace, overrides: list[str]) -> Config:
    from training_rounds import endless

    argv = ["--config", str(given.config), *overrides]
    config = endless(parse_command_line(str(__doc__), given.config, argv))
    if config.model.backbone_weights == "imagenet":  # the same work without a download
        config = replace(config, model=replace(config.model, backbone_weights="none"))
    return config


def _synthetic_name(given: argparse.Namespace, config: Config) -> str:
    """What is kept in `--folder` is used again for the same alone."""
    width, height = given.picture
    per_item = _per_item(given, config)
    return f"synthetic-{given.items}-{width}x{height}-{given.num_tags}-{per_item}"


def _per_item(given: argparse.Namespace, config: Config) -> int:
    return given.tags_per_item or max(1, config.tags.max_tags // 2)


def _make(folder: Path, config: Config, given: argparse.Namespace) -> None:
    from synthetic import make_synthetic

    make_synthetic(folder, given.items, given.picture, given.num_tags, _per_item(given, config))


def _tell(found: dict[str, Any], given: argparse.Namespace) -> None:
    from throughput_card import card, markdown, plot, summary
    from throughput_rules import Measured

    cores = len(os.sched_getaffinity(0))
    title = f"Throughput of {given.config.stem}, data {Path(given.data).name}"
    result = {"question": title, "cores": cores, **found}
    if not given.only:
        measured = Measured(found, cores)
        said = summary(measured)
        result["card"] = said
        print(f"\n{card(measured, said, title)}\n")
        if given.out:
            page = RESULTS / f"{given.out}.md"
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(markdown(measured, said, title, f"{page.stem}.png"))
            plot(measured, said, page.with_suffix(".png"))
    if given.out:
        save(given.out, result)
    print(json.dumps({**provenance(), **result}))
    sys.stdout.flush()


if __name__ == "__main__":
    exit_with_clear_errors(main)
