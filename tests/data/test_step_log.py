from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magneto_dist.data.step_log import StepLog, cut_back_all, read_entries
from magneto_dist.errors import InputError

STEPS = st.lists(st.integers(0, 9), max_size=12).map(sorted)


@given(steps=STEPS, text=st.text(max_size=9), cut=st.integers(-1, 10), torn=st.booleans())
def test_cutting_back_keeps_exactly_the_entries_up_to_a_step(
    tmp_path_factory, steps, text, cut, torn
):
    path = tmp_path_factory.mktemp("log") / "new" / "log.jsonl"
    entries = [{"step": step, "text": text * step, "value": 0.1 * step} for step in steps]
    log = StepLog(path)
    log.extend(entries)
    log.close()
    if torn:
        with path.open("ab") as file:
            file.write(b'{"step": 1, "te')
    log = StepLog(path)
    log.cut_back(cut)
    kept = [entry for entry in entries if entry["step"] <= cut]
    assert read_entries(path)[0] == kept
    assert log.entries_from(cut) == [entry for entry in kept if entry["step"] == cut]
    assert log.entries_from(3) == [entry for entry in kept if entry["step"] >= 3]
    log.append({"step": 11})
    log.close()
    assert read_entries(path)[0] == [*kept, {"step": 11}]


@given(steps=STEPS, cut=st.integers(-1, 10), evaluated=st.booleans())
def test_an_evaluation_that_comes_again_is_cut_away(tmp_path_factory, steps, cut, evaluated):
    """Each step has entries without a split, then one of training, then those of its evaluation."""
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    splits = ({}, {"split": "train"}, {"split": "validation"}, {"split": "validation"})
    entries = [{"step": step, **split} for step in dict.fromkeys(steps) for split in splits]
    log = StepLog(path)
    log.extend(entries)
    log.cut_back(cut, evaluated=evaluated)
    log.close()
    again = {"step": cut, "split": "validation"}
    assert read_entries(path)[0] == [
        e for e in entries if e["step"] <= cut and (evaluated or e != again)
    ]


def test_a_log_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "log.jsonl"
    whole = b"".join(b'{"step": %d, "x": "%s"}\n' % (step, b"y" * 40_000) for step in range(4))
    for torn in (b"", b'{"step": 4', b'{"step": 4, "x": "' + b"z" * 200_000):
        path.write_bytes(whole + torn)
        StepLog(path).close()
        assert path.read_bytes() == whole
    path.write_bytes(b"half of the first li")
    StepLog(path).close()
    assert path.read_bytes() == b""


def test_what_a_crash_left_after_the_last_checkpoint_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n\0\0\0\0\n\0\0')
    log = StepLog(path)
    log.cut_back(2)
    log.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_lines_are_there_when_the_writer_is_killed(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from magneto_dist.data.step_log import StepLog
log = StepLog(Path({str(tmp_path / "log.jsonl")!r}))
log.append({{"step": 1, "tag": "Zürich"}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert read_entries(tmp_path / "log.jsonl")[0] == [{"step": 1, "tag": "Zürich"}]


def test_reading_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "log.jsonl"
    log = StepLog(path)
    offset, seen = 0, []
    for step in range(5):
        log.append({"step": step})
        entries, offset = read_entries(path, offset)
        seen += entries
    with path.open("ab") as file:
        file.write(b'{"step": 5')
    assert read_entries(path, offset) == ([], offset)
    assert seen == [{"step": step} for step in range(5)]
    log.close()


def test_all_logs_of_a_folder_are_cut_back_also_of_ranks_that_are_gone(tmp_path):
    for rank in range(3):
        (tmp_path / f"rank-{rank}.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    cut_back_all(tmp_path, 1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"step": 1}\n'] * 3
    cut_back_all(tmp_path / "absent", 1)


def test_a_full_disk_is_one_clear_line():
    log = StepLog(Path("/dev/full"))
    with pytest.raises(InputError, match="/dev/full cannot be written: No space left on device"):
        log.append({"step": 1})
    log.close()


def test_a_file_in_the_place_of_the_folder_is_one_clear_line(tmp_path):
    (tmp_path / "ledger").write_text("")
    with pytest.raises(InputError, match=r"ledger/rank-0.jsonl cannot be written"):
        StepLog(tmp_path / "ledger" / "rank-0.jsonl")


def test_lines_are_valid_json_each(tmp_path):
    log = StepLog(tmp_path / "log.jsonl")
    log.extend({"step": step, "key": f"a\n{step}"} for step in range(3))
    log.flush()
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().split(os.linesep)
    assert [json.loads(line)["key"] for line in lines[:-1]] == ["a\n0", "a\n1", "a\n2"]
