"""Checksums of stores in the form in which their clients tell them."""

from __future__ import annotations

import base64
import hashlib
import io

import pytest

from magneto_dist.data.checksums import CheckedReadings, Checksum, told_checksum
from magneto_dist.errors import FormatError

MD5 = Checksum("md5", hashlib.md5(b"content").hexdigest())
SHA256 = Checksum("sha256", hashlib.sha256(b"content").hexdigest())


def base64_of(checksum: Checksum) -> str:
    return base64.b64encode(bytes.fromhex(checksum.digest)).decode()


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"ETag": f'"{MD5.digest}"'}, MD5),
        ({"ETag": MD5.digest}, MD5),
        ({"ETag": f'"{MD5.digest}-12"'}, None),  # of parts
        ({"ETag": 'W/"5f-1"', "Content-MD5": base64_of(MD5)}, MD5),
        ({"md5Hash": base64_of(MD5), "etag": "CKih16"}, MD5),
        ({"Digest": f"crc32c=AAAA,SHA-256={base64_of(SHA256)}"}, SHA256),
        ({"Digest": f"md5={base64_of(MD5)}"}, MD5),
        ({"lfs": {"sha256": SHA256.digest}}, SHA256),
        ({"lfs": None, "Content-MD5": "no base64", "Digest": "sha-256=?"}, None),
        ({}, None),
    ],
)
def test_checksum_is_found_where_the_client_tells_it(info, expected):
    assert told_checksum(info) == expected


def accepted(readings: CheckedReadings, content: bytes) -> bool:
    file = readings.hashed(io.BytesIO(content))
    while file.read(3):
        pass
    assert file.num_bytes == len(content)
    try:
        readings.check(file)
    except FormatError:
        return False
    return True


@pytest.mark.parametrize("told", [MD5, SHA256])
@pytest.mark.parametrize("twice", [False, True])
def test_what_the_checksum_confirms_is_accepted_at_once_and_else_the_second_time(told, twice):
    readings = CheckedReadings(told, twice)
    assert [accepted(readings, c) for c in (b"contant", b"contend", b"content")] == [
        False,
        False,
        True,
    ]
    readings = CheckedReadings(told, twice)
    assert [accepted(readings, c) for c in (b"other", b"othar", b"other")] == [False, False, True]


def test_without_a_checksum_two_readings_agree_if_that_is_asked_for():
    assert accepted(CheckedReadings(None, twice=False), b"contant")
    readings = CheckedReadings(None, twice=True)
    assert [accepted(readings, c) for c in (b"content", b"contant", b"content")] == [
        False,
        False,
        True,
    ]
