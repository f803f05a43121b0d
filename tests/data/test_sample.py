from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from magneto_dist.data.sample import (
    BadSample,
    Sample,
    annotation_bytes,
    check_image_decodes,
    check_image_size,
    image_header,
    parse_annotation,
    valid_key,
)


def encoded(width: int, height: int, kind: str, mode: str = "RGB", **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(100))
    chunks = [
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data, b"IEND")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def jpeg_that_claims(width: int, height: int) -> bytes:
    content = bytearray(encoded(8, 8, "JPEG"))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(content)


PICTURES = {
    "jpg baseline": ("jpg", encoded(37, 21, "JPEG")),
    "jpg progressive": ("jpg", encoded(37, 21, "JPEG", progressive=True)),
    "jpg grey": ("jpg", encoded(37, 21, "JPEG", "L")),
    "jpg CMYK": ("jpg", encoded(37, 21, "JPEG", "CMYK")),
    "jpg with comment": ("jpg", encoded(37, 21, "JPEG", comment=b"\xff\xc0" * 50)),
    "png": ("png", encoded(37, 21, "PNG")),
    "png palette": ("png", encoded(37, 21, "PNG", "P")),
    "png alpha": ("png", encoded(37, 21, "PNG", "RGBA")),
    "png 16 bit": ("png", encoded(37, 21, "PNG", "I;16")),
    "webp lossy": ("webp", encoded(37, 21, "WEBP")),
    "webp lossless": ("webp", encoded(37, 21, "WEBP", lossless=True)),
    "webp alpha": ("webp", encoded(37, 21, "WEBP", "RGBA", exif=b"Exif\0\0")),
}


@pytest.mark.parametrize("name", PICTURES)
def test_header_gives_kind_and_size(name):
    kind, content = PICTURES[name]
    assert image_header(content) == (kind, 37, 21)
    assert check_image_decodes(content, 1.0) == (kind, 37, 21)


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    kind=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    lossless=st.booleans(),
)
def test_header_agrees_with_pillow(width, height, kind, lossless):
    content = encoded(width, height, kind, lossless=lossless)
    assert image_header(content)[1:] == Image.open(io.BytesIO(content)).size == (width, height)


@pytest.mark.parametrize("name", PICTURES)
def test_cut_off_picture_is_bad_wherever_it_is_cut(name):
    _, content = PICTURES[name]
    for end in range(0, len(content) // 2, 7):
        with pytest.raises(BadSample):
            check_image_decodes(content[:end], 1.0)


@given(
    start=st.sampled_from(
        [b"", *(content[:n] for _, content in PICTURES.values() for n in (2, 30))]
    ),
    rest=st.binary(max_size=60),
)
@example(start=b"\xff\xd8", rest=b"\xff\xe0\x00\x00" * 10)
@example(start=b"\xff\xd8", rest=b"\xff" * 50)
def test_no_bytes_do_more_than_be_bad(start, rest):
    try:
        header = image_header(start + rest)
    except BadSample:
        return
    assert header.width >= 1
    assert header.height >= 1


@pytest.mark.parametrize(
    "bomb", [png_that_claims(100_000, 100_000), jpeg_that_claims(65_500, 65_500)]
)
def test_bomb_is_refused_by_its_header(bomb):
    assert len(bomb) < 1000
    with pytest.raises(BadSample, match=r"larger than 100 megapixels"):
        check_image_size(image_header(bomb), 100.0)
    with pytest.raises(BadSample, match=r"larger than 100 megapixels"):
        check_image_decodes(bomb, 100.0)


def test_size_limit_is_inclusive():
    check_image_size(image_header(png_that_claims(1000, 1000)), 1.0)
    with pytest.raises(BadSample):
        check_image_size(image_header(png_that_claims(1001, 1000)), 1.0)


def test_header_alone_does_not_make_a_picture():
    with pytest.raises(BadSample, match="does not decode"):
        check_image_decodes(png_that_claims(50, 50), 1.0)


@pytest.mark.parametrize("content", [b"GIF89a" + bytes(50), b"", b"%PDF-1.4", b"RIFF0000WAVEfmt "])
def test_other_files_are_bad(content):
    with pytest.raises(BadSample, match="neither JPEG, PNG nor WebP"):
        image_header(content)


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
        (b'{"tags": ["a"], "important": null}', "no list of 0 and 1"),
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
