from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magneto_dist.data.sample import (
    BadSample,
    Sample,
    annotation_bytes,
    parse_annotation,
    valid_key,
)


def test_annotation_of_labelled_and_unlabelled_sample():
    labelled = parse_annotation(b'{"tags": ["sea", "sky"], "important": [0, true], "by": "me"}')
    assert labelled == (("sea", "sky"), (False, True))
    assert parse_annotation('{"tags": ["été"]}'.encode()) == (("été",), None)


def test_repeated_tags_are_merged():
    tags, important = parse_annotation(b'{"tags": ["a", "b", "a"], "important": [0, 0, 1]}')
    assert tags == ("a", "b")
    assert important == (True, False)
    assert parse_annotation(b'{"tags": ["a", "b", "a"]}') == (("a", "b"), None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"{'tags': ['a']}", "not JSON"),
        (b'{"tags": ["\xff"]}', "not JSON in UTF-8"),
        ('{"tags": ["a"]}'.encode("utf-16"), "not JSON in UTF-8"),
        (b'{"tags": ["a"], "important": [NaN]}', "NaN is not JSON"),
        (b'{"tags": ["a"], "score": -Infinity}', "-Infinity is not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b'["a"]', "no JSON object"),
        (b'{"important": [1]}', "no list of non-empty strings"),
        (b'{"tags": "abc"}', "no list of non-empty strings"),
        (b'{"tags": ["a", 3]}', "no list of non-empty strings"),
        (b'{"tags": ["a", ""]}', "no list of non-empty strings"),
        (rb'{"tags": ["\ud800"]}', "no list of non-empty strings"),
        (b'{"tags": []}', "no tags"),
        (b'{"tags": ["a"], "important": [1, 0]}', "1 tags but 2"),
        (b'{"tags": ["a"], "important": []}', "1 tags but 0"),
        (b'{"tags": ["a"], "important": "1"}', "no list of 0 and 1"),
        (b'{"tags": ["a"], "important": [2]}', "no list of 0 and 1"),
        (b'{"tags": ["a"], "important": [1.0]}', "no list of 0 and 1"),
        (b'{"tags": ["a"], "important": ["1"]}', "no list of 0 and 1"),
    ],
)
def test_broken_annotation_is_bad_with_its_reason(content, reason):
    with pytest.raises(BadSample, match=reason):
        parse_annotation(content)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(tags=st.lists(TEXT, min_size=1, max_size=8, unique=True), data=st.data())
def test_annotation_round_trip(tags, data):
    flags = st.lists(st.booleans(), min_size=len(tags), max_size=len(tags)).map(tuple)
    important = data.draw(st.none() | flags)
    sample = Sample("k", None, tuple(tags), important)
    assert parse_annotation(annotation_bytes(sample)) == (tuple(tags), important)
    assert ("important" in json.loads(annotation_bytes(sample))) == (important is not None)


def test_key():
    assert valid_key("a")
    assert valid_key("Photo_12-b" * 9)
    for key in ("", "a.b", "a/b", "../a", "a b", "a\n", "é", "a" * 91, ".", "pipe:x"):
        assert not valid_key(key)


def test_bad_sample_survives_the_way_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(BadSample("no good", "k1")))
    assert (str(error), error.reason, error.key) == ("no good", "no good", "k1")
