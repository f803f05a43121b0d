"""Features on disk: whole or absent, whoever writes them in whatever order; read view by view."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from magneto_dist.data.feature_files import FeatureViews, FeatureWriter, view_of

SHAPE = (10, 4, 3)
CHUNK = 4  # samples: 3 chunks, the last of 2
DTYPES = [torch.float16, torch.bfloat16]


def numbers(dtype: torch.dtype, view: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(view)).to(dtype)


def writer(path: Path, dtype: torch.dtype) -> FeatureWriter:
    return FeatureWriter(path, SHAPE, dtype, CHUNK, {"made": "by a test"})


def write(target: FeatureWriter, chunks: Sequence[int], features: torch.Tensor, **bad: str) -> None:
    target.begin()
    for chunk in chunks:
        rows = target.rows(chunk)
        middle = (rows.start + rows.stop) // 2
        for part in (range(middle, rows.stop), range(rows.start, middle)):
            target.write(part.start, features[part.start : part.stop])
        target.finish_chunk(chunk, {int(k[1:]): v for k, v in bad.items() if int(k[1:]) in rows})


@given(st.integers(1, 9), st.integers(0, 100), st.integers(0, 5), st.integers(0, 1000))
def test_a_sample_shows_every_view_once_in_as_many_epochs(
    num_views: int, epoch: int, seed: int, first_id: int
) -> None:
    ids = np.arange(first_id, first_id + 50)
    epochs = range(epoch, epoch + num_views)
    views = np.stack([view_of(ids, e, num_views, seed) for e in epochs])
    assert (np.sort(views, axis=0) == np.arange(num_views)[:, None]).all()
    # The view of one epoch later, whatever else is asked for at the same time.
    later = [int(view_of(np.array([i]), epoch + 1, num_views, seed)[0]) for i in ids]
    assert later == ((views[0] + 1) % num_views).tolist()


def test_an_epoch_mixes_all_views_evenly() -> None:
    counts = Counter(view_of(np.arange(8000), 3, 8, seed=0).tolist())
    assert len(counts) == 8
    assert min(counts.values()) > 850


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_finished_before_a_kill_stays_and_the_bytes_are_the_same(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    features, whole = numbers(dtype), writer(tmp_path / "whole.npy", dtype)
    write(whole, [0, 1, 2], features)
    whole.finish()
    path = tmp_path / "Größe 图" / "resumed.npy"
    write(writer(path, dtype), [2, 0], features, _9="no picture")
    killed = writer(path, dtype)
    killed.write(4, torch.full((2, *SHAPE[1:]), 7, dtype=dtype))  # of a chunk that is not finished
    (log,) = path.parent.glob(".*.log")
    log.write_bytes(log.read_bytes() + b'\n{"chunk": 1')  # as a crash of the machine leaves it
    resumed = writer(path, dtype)
    assert resumed.missing_chunks() == [1]
    assert not path.exists()
    write(resumed, [1], features, _5="cut off")
    assert resumed.missing_chunks() == []
    resumed.finish()
    resumed.finish()  # another rank, or run
    assert path.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert {p.name for p in path.parent.iterdir()} == {"resumed.npy", "resumed.json", ".lock"}
    _, errors = FeatureViews((path,), seed=0).read(0, torch.arange(10), torch.ones(10).bool())
    assert {i: e for i, e in enumerate(errors) if e} == {5: "cut off", 9: "no picture"}


def test_another_run_may_be_quicker_with_the_same_file(tmp_path: Path) -> None:
    path, features = tmp_path / "train.npy", numbers(torch.float16)
    slow, quick = writer(path, torch.float16), writer(path, torch.float16)
    write(slow, [0], features)
    write(quick, [1, 2], features)
    quick.finish()
    before = path.read_bytes()
    write(slow, [1, 2], features)
    slow.finish()
    assert path.read_bytes() == before
    assert slow.missing_bytes == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_has_its_view(tmp_path: Path, dtype: torch.dtype) -> None:
    paths = tuple(tmp_path / f"{view}.npy" for view in range(3))
    for view, path in enumerate(paths):
        target = writer(path, dtype)
        write(target, [0, 1, 2], numbers(dtype, view), _1=f"bad in view {view}")
        target.finish()
    views = FeatureViews(paths, seed=4)
    views.read(0, torch.tensor([0]), torch.tensor([True]))
    again: FeatureViews = pickle.loads(pickle.dumps(views))
    assert len(pickle.dumps(views)) < 1000  # the files stay where they are
    ids = torch.tensor([7, 1, -1, 3, 9])
    valid = torch.tensor([True, True, False, False, True])
    features, errors = again.read(5, ids, valid)
    shown = view_of(ids.numpy(), 5, 3, seed=4)
    assert features.dtype == dtype
    for row in (0, 1, 4):
        assert torch.equal(features[row], numbers(dtype, int(shown[row]))[ids[row]])
    assert not features[2:4].any()
    assert errors == (None, f"bad in view {shown[1]}", None, None, None)
