"""Small files that would be gigabytes of pixels: what they cost before they are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pictures import (
    black_png,
    grey_jpeg,
    jpeg_that_claims,
    jpeg_with_scans,
    png_that_claims,
    png_with_two_headers,
    webp_that_claims,
)

BOMBS = {
    "png": lambda: black_png(30_000, 30_000),
    "jpg": lambda: grey_jpeg(30_000, 30_000),
    "png header": lambda: png_that_claims(65_535, 65_535),
    "jpg header": lambda: jpeg_that_claims(65_535, 65_535),
    "webp header": lambda: webp_that_claims(65_535, 65_535),
    "second png header": lambda: png_with_two_headers(30_000, 30_000),
    "scans": lambda: jpeg_with_scans(5000, 1000, 1000),
}
LARGE = {"large jpg": lambda: grey_jpeg(9000, 9000), "large png": lambda: black_png(9000, 9000)}
"""81 megapixels, which are allowed: this much the measurement must show."""

# In a process of its own, with little else in its memory. Not `ru_maxrss`: a process inherits that
# of the one that started it. The kernel sets its mark back to what is in memory now on request.
MEASURE = """
import json, re, sys
from pathlib import Path
from magneto_dist.config import AugmentConfig
from magneto_dist.data.augment import evaluation_augmentation
from magneto_dist.data.decode_cpu import CpuDecoder
from magneto_dist.data.image_bytes import checked_header
from magneto_dist.data.sample import BadSample

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def header_error(content):
    try:
        checked_header(content, 100.0)
    except BadSample as error:
        return error.reason

decoder = CpuDecoder(32, 100.0)
whole = evaluation_augmentation(AugmentConfig(image_size=32))
for path in sys.argv[1:]:
    content = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    reasons = header_error(content), decoder([content], [whole]).errors[0]
    print(json.dumps([*reasons, (kilobytes("VmHWM") - before) / 1e3]))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, float]]:
    """By name: what the header check says, what the decoder says, growth in megabytes."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux: no other system tells so precisely")
    folder = tmp_path_factory.mktemp("bombs")
    pictures = BOMBS | LARGE
    for name, make in pictures.items():
        (folder / name).write_bytes(make())
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, *(folder / name for name in pictures)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return dict(zip(pictures, map(json.loads, output.splitlines()), strict=True))


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_before_it_goes_off(measured, name):
    header, decoder, growth_mb = measured[name]
    assert growth_mb < 100
    if name != "second png header":  # of which the first one knows nothing
        assert header == decoder
    assert {
        "second png header": "two sizes",
        "scans": "more than 100 scans",
    }.get(name, "larger than 100 megapixels") in decoder


@pytest.mark.parametrize("name", LARGE)
def test_memory_of_a_large_picture_is_seen(measured, name):
    header, decoder, growth_mb = measured[name]
    assert header is decoder is None
    assert growth_mb > 200
