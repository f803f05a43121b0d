"""Chromium without a window, for pages that people look at."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
_DRIVER = shutil.which("chromedriver")


def missing() -> str | None:
    """What is not there that a browser needs; None: nothing."""
    if importlib.util.find_spec("selenium") is None:
        return "needs selenium: the extra [test]"
    if _CHROMIUM is None or _DRIVER is None:
        return "needs chromium and chromedriver on the PATH"
    return None


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver of selenium; it logs what the page prints and asks for."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(_DRIVER))
    try:
        yield started
    finally:
        started.quit()


def look_at(browser: Any, width: int, scheme: str = "light", height: int = 800) -> None:
    """Gives the page a screen of `width` x `height` pixels, and a reader who wants it so."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
