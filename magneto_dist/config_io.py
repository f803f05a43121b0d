"""Command line and YAML -> Config, and Config -> YAML."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import jsonargparse
import yaml

from magneto_dist.config import Config
from magneto_dist.errors import InputError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse_command_line(
    description: str, default_config: Path, argv: Sequence[str] | None = None
) -> Config:
    """The settings of a launcher: defaults < YAML file < `--section.field value`.

    Args:
        description: what the launcher does, for `--help`.
        default_config: YAML file that holds where the user names none with `--config`.
        argv: arguments without the program's name; None: those of this process.

    Raises:
        InputError: an unknown key or a value of the wrong type or range; names the key, what was
            given and what is allowed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    names_config = any(arg == "--config" or arg.startswith("--config=") for arg in arguments)
    parser = _parser(description, None if names_config else default_config)
    return _parse(parser, lambda: parser.parse_args(arguments))


def load_config(path: Path) -> Config:
    """Reads a YAML file of settings, e.g. `configs/ls.yaml` or a run's `config.yaml`.

    Raises:
        InputError: the file is missing, or as for `parse_command_line`.
    """
    if not path.is_file():
        raise InputError(f"no configuration file {path}")
    parser = _parser("", None)
    return _parse(parser, lambda: parser.parse_path(path))


def config_to_yaml(config: Config) -> str:
    """All settings, defaults included; `load_config` gives back an equal Config."""
    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def _parser(description: str, default_config: Path | None) -> jsonargparse.ArgumentParser:
    files: list[str | os.PathLike] = [default_config] if default_config else []
    parser = jsonargparse.ArgumentParser(
        description=description,
        exit_on_error=False,
        default_config_files=files,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings.")
    parser.add_class_arguments(Config, as_group=True)
    return parser


def _parse(
    parser: jsonargparse.ArgumentParser, parse: Callable[[], jsonargparse.Namespace]
) -> Config:
    with clear_parser_errors("configuration"):
        namespace = parse()
        namespace.pop("config", None)
        return Config(**vars(parser.instantiate(namespace)))


@contextmanager
def clear_parser_errors(what: str) -> Iterator[None]:
    """Turns an error of a parser with `exit_on_error=False` into an InputError of one line."""
    try:
        yield
    except jsonargparse.ArgumentError as error:
        raise InputError(f"{what}: {_explain(' '.join(error.message.split()))}") from None


def _explain(message: str) -> str:
    """A parser's message in the user's words: keys as typed, types as allowed values."""
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    if group:
        message = message.replace(f"option '{group[2]}'", f"option '{group[1]}.{group[2]}'")
    unknown = re.search(r"unrecognized arguments: --?([\w.]+)", message) or re.search(
        r"does not accept option '([\w.]+)'", message
    )
    if unknown:
        key = unknown[1]
        near = difflib.get_close_matches(key, list(_keys(Config())), n=3, cutoff=0.4)
        hint = f"did you mean --{' or --'.join(near)}?" if near else "--help lists all keys"
        return f"unknown key {key!r} ({message}); {hint}"
    message = message.replace("Problems parsing config:", "the file of --config is no YAML:")
    message = message.replace('in "<unicode string>", ', "in ")
    message = re.sub(r"a <class '(\w+)'>", r"\1", message).replace("typing.", "")
    message = message.replace("a Literal[", "one of [")
    message = re.sub(r"(required: )(?:[\w-]+\.)*(\w+)$", r"\1\2; see --help", message)
    return re.sub(r'Parser key "([\w.]+)"', r"--\1", message)


def _keys(section: object, prefix: str = "") -> Iterator[str]:
    for field in fields(section):  # type: ignore[arg-type]
        value = getattr(section, field.name)
        if is_dataclass(value):
            yield from _keys(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name
