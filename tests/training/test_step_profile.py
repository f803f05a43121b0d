"""Steps that are recorded on demand: a trace that opens, and a run that is the same."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from magneto_dist.config import LogConfig
from magneto_dist.errors import InputError
from processes import TINY, losses, run, summary


def options(data: Path, run_dir: Path, *more: str) -> list[str]:
    constant = "--optim.schedule=constant"  # whatever the last step is
    return [*TINY, constant, f"--data.path={data}", f"--output_dir={run_dir}", *more]


def names_in(path: Path) -> list[str]:
    with gzip.open(path) as file:
        return [event.get("name", "") for event in json.load(file)["traceEvents"]]


def test_profiled_steps_are_on_file_and_change_nothing(demo_shards: Path, tmp_path: Path) -> None:
    plain, profiled = tmp_path / "plain", tmp_path / "profilé"
    run("train_ls.py", *options(demo_shards, plain, "--max_steps=6"))
    assert not (plain / "profile").exists()
    on = ["--log.profile_steps=2", "--log.profile_after_steps=1"]
    printed = run("train_ls.py", *options(demo_shards, profiled, *on, "--max_steps=4"))
    (trace,) = (profiled / "profile").iterdir()
    assert trace.name == "steps-00000002-00000003.json.gz"
    assert f"profile: {trace}" in printed
    names = names_in(trace)
    assert {name for name in names if name.startswith("ProfilerStep")} == {
        "ProfilerStep#1",
        "ProfilerStep#2",
    }
    assert names.count("waiting for data") == 2
    assert any(re.fullmatch(r"aten::.*conv.*", name) for name in names)
    assert any("Backward" in name for name in names)
    # On demand: it goes on, and records steps of this launch.
    run("train_ls.py", *options(demo_shards, profiled, *on, "--max_steps=6"))
    assert sorted(path.name for path in (profiled / "profile").iterdir()) == [
        trace.name,
        "steps-00000006-00000006.json.gz",  # the run ends before the second one
    ]
    assert losses(profiled) == losses(plain)


def test_only_the_main_process_records(demo_shards: Path, tmp_path: Path) -> None:
    on = ["--log.profile_steps=1", "--log.profile_after_steps=1", "--max_steps=3"]
    run("train_ls.py", *options(demo_shards, tmp_path, *on), ranks=2)
    (trace,) = (tmp_path / "profile").iterdir()
    assert any("all_reduce" in name or "allreduce" in name for name in names_in(trace))


def test_a_run_that_ends_before_has_no_trace(demo_shards: Path, tmp_path: Path) -> None:
    on = ["--log.profile_steps=2", "--max_steps=2"]
    printed = run("train_ls.py", *options(demo_shards, tmp_path, *on))
    assert "no step is profiled: only 2 are left, and --log.profile_after_steps 10" in printed
    assert not (tmp_path / "profile").exists()


def test_what_comes_between_steps_is_not_recorded(demo_shards: Path, tmp_path: Path) -> None:
    on = ["--log.profile_steps=3", "--log.profile_after_steps=1", "--max_steps=5"]
    early, late = (
        options(demo_shards, tmp_path / str(every), *on, f"--checkpoint.every_steps={every}")
        for every in (1, 2)
    )
    run("train_ls.py", *late)
    (trace,) = (tmp_path / "2" / "profile").iterdir()
    assert trace.name == "steps-00000002-00000002.json.gz"
    run("train_ls.py", *early)  # a save after every step, of which one is to warm up
    assert not (tmp_path / "1" / "profile").exists()


def test_a_trace_that_cannot_be_written_costs_a_line(demo_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("a file where the folder should be")
    on = ["--log.profile_steps=1", "--log.profile_after_steps=1", "--max_steps=3"]
    printed = run("train_ls.py", *options(demo_shards, tmp_path, *on))
    assert printed.count("warning: ") == 1
    assert "cannot be written" in printed
    assert summary(tmp_path)["step"] == 3


@pytest.mark.parametrize("settings", [{"profile_steps": -1}, {"profile_after_steps": 0}])
def test_impossible_settings_are_refused(settings: dict[str, int]) -> None:
    (name,) = settings
    with pytest.raises(InputError, match=f"log.{name}"):
        LogConfig(**settings)
