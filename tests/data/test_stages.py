"""Stages by their names: what they find, and what is said where they fail."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace

import pytest

from magneto_dist.config import DataConfig
from magneto_dist.data.sample import Sample
from magneto_dist.data.stages import load_stages
from magneto_dist.data.stream import Record
from magneto_dist.errors import InputError

RECORDS = [
    Record(i, "train-000000.tar", Sample(f"k{i}", None, ("red", "sea"), (True, False)))
    for i in range(3)
]


def run(name: str, records: list[Record] = RECORDS) -> list[Record]:
    (stage,) = load_stages((f"{__name__}:{name}",))
    return list(pickle.loads(pickle.dumps(stage))(iter(records)))


def without_the_first(records):
    next(records)
    yield from records


def failing(records):
    for record in records:
        yield replace(record, sample=replace(record.sample, tags=(record.sample.tags[2],)))


def giving_nothing(records):
    list(records)


def giving_samples(records):
    return (record.sample for record in records)


def cut(records):
    return (replace(r, sample=replace(r.sample, tags=r.sample.tags[:1])) for r in records)


def doubled(records):
    return (
        replace(r, sample=replace(r.sample, tags=r.sample.tags * 2, important=None))
        for r in records
    )


NO_STAGE = "left out"


def test_a_stage_is_found_by_its_name_wherever_it_is_unpickled():
    assert run("without_the_first") == RECORDS[1:]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("failing", r"failed with IndexError: tuple index out of range \(.*test_stages.py, line"),
        ("giving_nothing", "failed with TypeError: 'NoneType' object is not iterable"),
        ("giving_samples", "gave a Sample, not a Record"),
        ("cut", "gave sample k0 with 1 tags but 2 'important' flags"),
        ("doubled", "gave sample k0 with a tag twice"),
    ],
)
def test_a_stage_that_fails_is_named(name, message):
    with pytest.raises(InputError, match=rf"--data.stages {__name__}:{name}: {message}"):
        run(name)


def test_an_input_error_from_before_a_stage_is_not_its_own():
    def broken():
        raise InputError("a shard is gone")
        yield

    (stage,) = load_stages((f"{__name__}:without_the_first",))
    with pytest.raises(InputError, match="a shard is gone") as error:
        list(stage(broken()))
    assert str(error.value) == "a shard is gone"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_absent.module:f", r"'my_absent.module' cannot be imported \(ModuleNotFoundError: No"),
        (f"{__name__}:absent", f"module '{__name__}' has no 'absent'"),
        (f"{__name__}:NO_STAGE", f"module '{__name__}' has no callable 'NO_STAGE'"),
    ],
)
def test_a_stage_that_is_not_there_is_one_clear_line(name, message):
    with pytest.raises(InputError, match=message) as error:
        load_stages((name,))
    assert str(error.value).startswith(f"--data.stages {name}: ")


def test_modules_lie_in_the_working_folder_and_what_is_wrong_in_them_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished_stage.py").write_text("def stage(records)\n")
    with pytest.raises(InputError, match=r"unfinished_stage' cannot be imported \(SyntaxError: ex"):
        load_stages(("unfinished_stage:stage",))
    (tmp_path / "pickle.py").write_text("raise OSError")  # hides nothing
    (tmp_path / "finished_stage.py").write_text("import pickle\n\ndef stage(r):\n    return r\n")
    (stage,) = load_stages(("finished_stage:stage",))
    assert list(stage(iter(RECORDS))) == RECORDS
    sys.modules.pop("finished_stage")


@pytest.mark.parametrize("name", ["module", "module:", ":stage", "my/module.py:stage", "a:b:c"])
def test_what_is_no_name_of_a_stage_is_refused(name):
    with pytest.raises(InputError, match=f"--data.stages {name}: must be module:function"):
        DataConfig(stages=(name,))
