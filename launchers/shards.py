"""Makes data sets and looks into them.

python launchers/shards.py build demo --out DIR
python launchers/shards.py build table --help      # also: hf, nus-wide
python launchers/shards.py index DIR_OR_URL --image-key jpg --tags-field tags   # existing tars
python launchers/shards.py split DIR --out DIR2 --validation_fraction 0.1
python launchers/shards.py verify DIR
python launchers/shards.py stats DIR
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from json import dumps
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from magneto_dist.config_io import clear_parser_errors
from magneto_dist.data.image_bytes import DEFAULT_MAX_MEGAPIXELS
from magneto_dist.data.indexing import index_tars
from magneto_dist.data.inspect import count, format_stats, stats
from magneto_dist.data.shards import Dataset
from magneto_dist.data.splitting import split_dataset
from magneto_dist.data.verify import verify
from magneto_dist.data.writer import WriteReport
from magneto_dist.errors import InputError, exit_with_clear_errors

SOURCES = {
    "demo": "Synthetic pictures and tags, made on the spot.",
    "table": "A CSV, TSV, JSON-lines or Parquet file that names pictures and their tags.",
    "hf": "A data set of the Hugging Face `datasets` library.",
    "nus-wide": "NUS-WIDE as distributed, prepared as in the paper (section 4.1).",
}


def main() -> None:
    """Does what the command line says."""
    words = list(map(_with_underscores, sys.argv[1:]))
    parser = _parser(source_asked_for=words[1] if len(words) > 1 else "")
    with clear_parser_errors("shards.py"):
        arguments = parser.instantiate(parser.parse_args(words))
    options = arguments[arguments.verb]
    if arguments.verb == "build":
        made = options[options.source].as_dict()
        _tell(made["out"], _builder(options.source)(**made))
    elif arguments.verb in ("index", "split"):
        made = options.as_dict()
        report = (index_tars if arguments.verb == "index" else split_dataset)(**made)
        _tell(made["out"] or made["tars"], report)
    else:
        {"verify": _verify, "stats": _stats}[arguments.verb](**options.as_dict())


def _parser(source_asked_for: str) -> ArgumentParser:
    parser = _verb_parser(prog="shards.py", description="Makes data sets and looks into them.")
    verbs = parser.add_subcommands(dest="verb")
    build = _verb_parser(description="Writes a data set; goes on after an interruption.")
    verbs.add_subcommand("build", build, help="write a data set")
    sources = build.add_subcommands(dest="source")
    for name, summary in SOURCES.items():
        source = _verb_parser(description=summary)
        if name == source_asked_for:  # only its module is imported: some take seconds
            source.add_function_arguments(_builder(name))
        sources.add_subcommand(name, source, help=summary)

    index = _verb_parser(description="Makes a data set of WebDataset tars; copies nothing.")
    index.add_function_arguments(index_tars, as_positional=True)
    verbs.add_subcommand("index", index, help="use tars that are there already")

    split = _verb_parser(description="Cuts a data set anew; copies nothing.")
    split.add_argument("data_set", help="folder or URL with dataset.json")
    split.add_function_arguments(split_dataset, skip={"data_set"})
    verbs.add_subcommand("split", split, help="choose samples to validate on")

    check = _verb_parser(description="Reads and decodes everything; exit code 2 on damage.")
    check.add_argument("data_set", help="folder or URL with dataset.json")
    check.add_argument("--num_processes", type=int, default=os.cpu_count() or 1, help="to use")
    check.add_argument(
        "--max_megapixels", type=float, default=DEFAULT_MAX_MEGAPIXELS, help="of a picture"
    )
    verbs.add_subcommand("verify", check, help="find damage")

    describe = _verb_parser(description="Counts items, tags and sizes of pictures.")
    describe.add_argument("data_set", help="folder or URL with dataset.json")
    describe.add_argument("--split", help="train or validation; default: both")
    describe.add_argument("--json", action="store_true", help="print JSON instead of a table")
    describe.add_argument("--plot", type=Path, help="also draw to this .png, .svg or .pdf")
    verbs.add_subcommand("stats", describe, help="describe a data set")
    return parser


def _verb_parser(**options: Any) -> ArgumentParser:
    return ArgumentParser(exit_on_error=False, **options)


def _tell(out: object, report: WriteReport) -> None:
    print(f"{out}: {report.written:,} samples; {len(report.skipped):,} skipped, see skipped.jsonl")


def _verify(data_set: str, num_processes: int, max_megapixels: float) -> None:
    dataset = Dataset.open(data_set, check_shards=False)
    damages = verify(dataset, num_processes, max_megapixels)
    for damage in damages:
        print(damage)
    if damages:
        raise InputError(f"{data_set}: {len(damages)} damages; build or copy the data set again")
    print(f"{data_set}: sound ({sum(map(dataset.num_samples, dataset.splits)):,} samples)")


def _stats(data_set: str, split: str | None, json: bool, plot: Path | None) -> None:
    dataset = Dataset.open(data_set)
    counts = [count(dataset, name) for name in ([split] if split else dataset.splits)]
    numbers = {counted.split: stats(counted) for counted in counts}
    print(dumps(numbers, indent=1) if json else "\n\n".join(map(format_stats, numbers.values())))
    if plot is not None:
        from magneto_dist.report import plot_stats  # imports torch, which takes time

        plot_stats(counts, plot)


def _builder(source: str) -> Any:
    return import_module(f"magneto_dist.data.sources.{source.replace('-', '_')}").build


def _with_underscores(word: str) -> str:
    """`--image-column=x-y` as `--image_column=x-y`: both spellings of an option are allowed."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name[:2] == "--" else word


if __name__ == "__main__":
    exit_with_clear_errors(main)
