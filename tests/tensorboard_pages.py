"""TensorBoard as people see it: its pages in a real browser.

`python tests/tensorboard_pages.py RUNS` makes docs/images/tensorboard*.png anew, of the runs in a
folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from browser import chromium, look_at
from warm import REPOSITORY, free_port

IMAGES = REPOSITORY / "docs" / "images"
SHOTS = {
    "custom_scalars": ("tensorboard", 1400, 1160),
    "pr_curves": ("tensorboard_pr_curves", 1400, 620),
    "histograms": ("tensorboard_alpha", 1000, 560),
}
"""Tab -> name of its picture, width and height of the screen in pixels."""
_PATIENCE_S = 60.0

# Everything on the page, through the borders of its web components.
_DEEP = """
const texts = [], drawn = {path: 0, rect: 0, img: 0};
const visit = root => {
  for (const node of root.childNodes) {
    if (node.nodeType === Node.TEXT_NODE) texts.push(node.textContent.trim());
    const name = node.nodeName.toLowerCase();
    if (node.nodeType !== Node.ELEMENT_NODE || /^(style|script|template)$/.test(name)) continue;
    const box = node.getBoundingClientRect();
    if (name in drawn && box.width > 60 && box.height > 1) drawn[name] += 1;
    if (node.shadowRoot) visit(node.shadowRoot);
    visit(node);
  }
};
visit(document.body);
return [texts.filter(text => text).join('\\n'), drawn];
"""


@contextmanager
def served(command: Sequence[str], cwd: Path | None = None) -> Iterator[str]:
    """The address at which a `tensorboard` command, to which a port is added, shows some run."""
    url = f"http://127.0.0.1:{free_port()}"
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    server = subprocess.Popen(
        [*command, "--port", url.rpartition(":")[2]],
        cwd=cwd,
        env={**os.environ, "PATH": scripts},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _shows_a_run(url, server), lambda: "no run")
        yield url
    finally:
        server.terminate()
        server.wait()


def _shows_a_run(url: str, server: subprocess.Popen) -> bool:
    assert server.poll() is None, "TensorBoard has ended"
    try:
        with urllib.request.urlopen(f"{url}/data/runs") as answer:
            return bool(json.load(answer))  # at first it has read nothing
    except OSError:
        return False


def wait_until(happened: Callable[[], bool], instead: Callable[[], str]) -> None:
    """Looks again and again; after a minute it fails and tells what is there instead."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline_s, instead()
        time.sleep(0.2)


class Page:
    """A tab of TensorBoard, opened.

    Args:
        browser: of `browser.chromium`.
        url: of `served`.
        tab: as its address ends, e.g. "pr_curves".
        texts: which must be there before it is looked at.
    """

    def __init__(self, browser: Any, url: str, tab: str, texts: Sequence[str] = ()) -> None:
        self._browser = browser
        browser.get("about:blank")  # another tab alone would load nothing anew
        browser.get(f"{url}/#{tab}")
        wait_until(lambda: all(text in self.text for text in texts), lambda: self.text)

    @property
    def text(self) -> str:
        """Everything that is written on it, a piece a line."""
        return self._browser.execute_script(_DEEP)[0]

    def wait_for(self, kind: str, number: int) -> None:
        """Waits for so many visible elements of a kind: "path", "rect" or "img"."""
        wait_until(lambda: self._drawn()[kind] >= number, lambda: f"{self._drawn()}")

    def _drawn(self) -> dict[str, int]:
        return self._browser.execute_script(_DEEP)[1]


def main() -> None:
    """Pictures for the documentation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder of runs")
    runs = parser.parse_args().runs.resolve()
    # From there: the page says where it was told to look, and not where that is.
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", runs.name]
    with served(command, runs.parent) as url, chromium() as browser:
        for tab, (name, width, height) in SHOTS.items():
            look_at(browser, width, height=height)
            Page(browser, url, tab)
            time.sleep(8)  # charts come one after the other
            shot(browser, IMAGES / f"{name}.png")


def shot(browser: Any, path: Path) -> None:
    """Saves what is on the screen with few colours: a small file."""
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "full.png"
        assert browser.save_screenshot(str(full))
        with Image.open(full) as image:
            image.convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main()
