from __future__ import annotations

import io

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from magneto_dist.data import image_bytes
from magneto_dist.data.decode_cpu import check_image_decodes
from magneto_dist.data.image_bytes import checked_header, image_header
from magneto_dist.data.sample import BadSample
from pictures import (
    PICTURES,
    encoded,
    jpeg_that_claims,
    jpeg_with_scans,
    png_that_claims,
    turned,
    webp_that_claims,
)


@pytest.mark.parametrize("name", PICTURES)
def test_header_gives_kind_and_size(name):
    kind, content = PICTURES[name]
    assert image_header(content) == (kind, 37, 21, 1)
    assert check_image_decodes(content, 1.0) == (kind, 37, 21, 1)


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    kind=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    lossless=st.booleans(),
)
def test_header_agrees_with_pillow(width, height, kind, lossless):
    content = encoded(width, height, kind, lossless=lossless)
    assert image_header(content)[1:3] == Image.open(io.BytesIO(content)).size == (width, height)


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
    "bomb",
    [
        png_that_claims(100_000, 100_000),
        jpeg_that_claims(65_535, 65_535),
        webp_that_claims(65_535, 65_535),
    ],
)
def test_bomb_is_refused_by_its_header(bomb):
    assert len(bomb) < 1000
    with pytest.raises(BadSample, match=r"larger than 100 megapixels"):
        checked_header(bomb, 100.0)
    with pytest.raises(BadSample, match=r"larger than 100 megapixels"):
        check_image_decodes(bomb, 100.0)


def test_jpeg_of_more_scans_than_any_encoder_writes_is_refused():
    assert check_image_decodes(jpeg_with_scans(100), 1.0).kind == "jpg"
    for num_scans in (101, 5000):
        with pytest.raises(BadSample, match="more than 100 scans"):
            checked_header(jpeg_with_scans(num_scans), 1.0)


def test_sequential_jpeg_of_many_scans_is_refused():
    """Only where the first scan is all of the picture are others not looked for."""
    content = encoded(64, 48, "JPEG")
    start = content.rindex(b"\xff\xda")
    one_of_three = bytes([1]) + content[start + 5 : start + 7] + bytes([0, 63, 0])
    scan = b"\xff\xda" + (len(one_of_three) + 2).to_bytes(2, "big") + one_of_three
    checked_header(content[:start] + scan * 100 + b"\xff\xd9", 1.0)
    with pytest.raises(BadSample, match="more than 100 scans"):
        checked_header(content[:start] + scan * 101 + b"\xff\xd9", 1.0)


@pytest.mark.parametrize("progressive", [False, True])
def test_what_comes_after_the_picture_does_not_hide_that_it_is_cut_off(progressive):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (90, 20, 200)).save(buffer, "JPEG", progressive=progressive)
    content = buffer.getvalue()
    for junk in (b"junk", b"\xff\xd9", b"\xff\xd9junk"):
        assert check_image_decodes(content + junk, 1.0).kind == "jpg"
    with pytest.raises(BadSample, match="cut off"):
        checked_header(content[:-2] + b"junk", 1.0)


def test_file_too_large_to_be_read_is_refused(monkeypatch):
    content = encoded(20, 20, "PNG")
    monkeypatch.setattr(image_bytes, "MAX_IMAGE_BYTES", len(content))
    checked_header(content, 1.0)
    with pytest.raises(BadSample, match=f"{len(content) + 1} bytes is larger than {len(content)}"):
        checked_header(content + b"x", 1.0)


def test_size_limit_is_inclusive():
    checked_header(png_that_claims(1000, 1000), 1.0)
    with pytest.raises(BadSample):
        checked_header(png_that_claims(1001, 1000), 1.0)


def test_header_alone_does_not_make_a_picture():
    with pytest.raises(BadSample, match="does not decode"):
        check_image_decodes(png_that_claims(50, 50), 1.0)


@pytest.mark.parametrize("content", [b"GIF89a" + bytes(50), b"", b"%PDF-1.4", b"RIFF0000WAVEfmt "])
def test_other_files_are_bad(content):
    with pytest.raises(BadSample, match="neither JPEG, PNG nor WebP"):
        image_header(content)


def test_jpeg_is_whole_to_its_last_byte():
    for name, (kind, content) in PICTURES.items():
        if kind == "jpg":
            checked_header(content + b"junk", 1.0)
            for end in range(2, len(content)):
                with pytest.raises(BadSample, match=r"cut off|before its size"):
                    checked_header(content[:end], 1.0)
            assert checked_header(content, 1.0).kind == "jpg", name


@given(
    orientation=st.integers(0, 2**16 - 1),
    kind=st.sampled_from(["JPEG", "PNG", "WEBP"]),
    byte_order=st.sampled_from("<>"),
    position=st.integers(0, 72),  # inside the block
    damage=st.binary(max_size=4),
)
def test_broken_exif_turns_nothing(orientation, kind, byte_order, position, damage):
    content = turned(orientation, kind, byte_order)
    assert image_header(content).orientation == (orientation if orientation in range(1, 9) else 1)
    start = content.index({"<": b"II*\0", ">": b"MM\0*"}[byte_order]) + position
    broken = content[:start] + damage + content[start + len(damage) :]
    assert 1 <= image_header(broken).orientation <= 8
