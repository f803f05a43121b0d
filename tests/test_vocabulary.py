"""Tags and ids."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from magneto_dist.errors import InputError
from magneto_dist.vocabulary import Vocabulary

tag = st.text(min_size=1).filter(lambda t: len(t.splitlines()) == 1 and t == t.strip("\r\n"))


def can_encode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@given(st.lists(tag.filter(can_encode), unique=True, max_size=20))
def test_round_trip(tags: list[str]) -> None:
    vocabulary = Vocabulary(tags)
    again = Vocabulary.from_bytes(vocabulary.to_bytes())
    assert again.tags == tuple(tags)
    assert again.sha256 == vocabulary.sha256
    assert again.padding_id == len(tags)
    np.testing.assert_array_equal(again.ids(tags), np.arange(len(tags)))


def test_windows_line_ends_are_read() -> None:
    assert Vocabulary.from_bytes(b"sea\r\nsky\r\n").tags == ("sea", "sky")


def test_hash_tells_order() -> None:
    assert Vocabulary(["a", "b"]).sha256 != Vocabulary(["b", "a"]).sha256


def test_unknown_tags_are_counted_and_the_first_is_named() -> None:
    with pytest.raises(InputError, match=r"2 of 3 tags .* first is 'moon'"):
        Vocabulary(["sea", "sky"]).ids(["sea", "moon", "star"])


@pytest.mark.parametrize("content", [b"sea\nsea\n", b"sea\n\nsky\n", b"\xff\xfe\n"])
def test_damaged_vocabulary(content: bytes) -> None:
    with pytest.raises(InputError, match="vocabulary"):
        Vocabulary.from_bytes(content)
