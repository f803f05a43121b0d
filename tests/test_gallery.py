"""The page of predictions: what it holds, and what it does in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from browser import chromium, look_at, missing
from magneto_dist.config import Config
from magneto_dist.gallery import gallery
from magneto_dist.inference import ItemPrediction, attention_kept
from magneto_dist.model.magneto import build_model

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


def picture(width: int, height: int, format: str = "JPEG") -> bytes:
    ramp = np.linspace(0, 255, width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    content = io.BytesIO()
    Image.fromarray(ramp).save(content, format)
    return content.getvalue()


def item(number: int, **more: Any) -> ItemPrediction:
    """Three tags, 2 x 2 regions; the second tag has the highest probability."""
    attention = np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.4, 0.1, 0.1], [1, 0, 0, 0]], np.float32)
    values: dict[str, Any] = {
        "tags": ("sea", HOSTILE, "été, \u2028 münchen"),
        "probability": (0.7, 0.9, 0.2),
        "image": (0.7, 0.9, 0.2),
        "tag": (0.7, 0.9, 0.2),
        "alpha": (0.25, 0.5, 0.75),
        "important": (False, True, True),
        "picture": picture(64, 48),
        "attention": attention,
    }
    return ItemPrediction(f"item {number}", **{**values, **more})


def items(count: int) -> list[ItemPrediction]:
    return [
        ItemPrediction("broken", "has <b>no tags</b>"),
        replace(item(1), key=HOSTILE, unknown_tags=(HOSTILE,)),
        *(item(number) for number in range(2, count)),
    ]


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_page_holds_what_was_predicted_and_nothing_that_a_browser_would_run():
    page = gallery(items(30), 500, 0.5, Config())
    assert page.count("</script>") == 2
    assert "onerror='" not in page.replace("\\u003cimg src=x onerror='", "")
    assert not re.search(r"https?:|src=\"(?!data:)", page)
    data = data_of(page)
    assert (data["total"], data["threshold"], len(data["items"])) == (500, 0.5, 30)
    assert data["items"][0]["error"] == "has <b>no tags</b>"
    first = data["items"][1]
    assert [tag["name"] for tag in first["tags"]] == [HOSTILE, "sea", "été, \u2028 münchen"]
    assert [tag["important"] for tag in first["tags"]] == [True, False, True]
    assert [tag["alpha"] for tag in first["tags"]] == [0.5, 0.25, 0.75]
    assert first["attention"]["most"] == pytest.approx([0.4, 0.4, 1.0])
    shares = np.frombuffer(base64.b64decode(first["attention"]["shares"]), np.uint8)
    assert shares.tolist() == [255, 255, 64, 64, 64, 128, 191, 255, 255, 0, 0, 0]
    # Of 64 x 48 pixels the model sees the 42 x 42 at the centre.
    assert first["attention"]["window"] == pytest.approx([11 / 64, 3 / 48, 42 / 64, 42 / 48])


def test_picture_of_the_gallery_is_a_small_jpeg():
    big = item(1, picture=picture(900, 600, "PNG"))
    small = Image.open(
        io.BytesIO(
            base64.b64decode(data_of(gallery([big], 1, 0.5, Config()))["items"][0]["picture"])
        )
    )
    assert (small.format, small.size) == ("JPEG", (320, 213))


def test_a_model_without_pictures_or_gate_has_neither_on_its_page():
    bare = ItemPrediction("k", None, ("a",), (0.75,))
    data = data_of(gallery([bare], 1, 0.5, Config()))
    assert not data["has_alpha"]
    assert not data["has_attention"]
    assert data["items"][0]["tags"] == [{"name": "a", "p": 0.75}]


@pytest.mark.parametrize("kind", ["magneto", "tf-it"])
def test_attention_is_that_of_the_forward_pass(kind):
    """Against softmax(Q K^T / sqrt(d)) by plain matrices, the mean over the heads."""
    torch.manual_seed(0)
    config = replace(
        Config().model, kind=kind, d_model=16, num_heads=2, d_ff=32, backbone="resnet18",
        backbone_weights="none", backbone_stages=2, image_layers=1, tag_layers=1,
    )  # fmt: skip
    model = build_model(config, 10).double().eval()
    ids, mask = torch.arange(6).reshape(2, 3), torch.ones(2, 3, dtype=torch.bool)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(ids, mask, pixels)
        with attention_kept(model) as kept:
            seen = model(ids, mask, pixels)
        again = model(ids, mask, pixels)
        stream: Any = model.image_stream
        regions = stream.regions(pixels, None)
        tags = model.tag_embedding(ids)  # type: ignore[operator]
        weight, bias = stream.attention.in_proj_weight, stream.attention.in_proj_bias
        query = (tags @ weight[:16].T + bias[:16]).unflatten(-1, (2, 8))
        key = (regions @ weight[16:32].T + bias[16:32]).unflatten(-1, (2, 8))
        by_head = torch.einsum("bthd,brhd->bhtr", query, key) / 8**0.5
    assert len(kept) == 1  # and not of the pass that followed
    torch.testing.assert_close(kept[0], by_head.softmax(-1).mean(1))
    torch.testing.assert_close(seen.image_logits, expected.image_logits)
    assert torch.equal(again.image_logits, expected.image_logits)


def test_models_of_tags_alone_have_no_attention_over_regions():
    model = build_model(replace(Config().model, kind="tf-t"), 10).eval()
    with attention_kept(model) as kept, torch.no_grad():
        model(torch.arange(3)[None], torch.ones(1, 3, dtype=torch.bool))
    assert kept == []


# In a browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    if reason := missing():
        pytest.skip(reason)
    with chromium() as started:
        yield started


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Any:
    """The browser at a page of 30 items; it must not have complained in the end."""
    path = tmp_path / "für alle.html"
    path.write_text(gallery(items(30), 500, 0.5, Config()), encoding="utf-8")
    look_at(browser, 1280, "light")
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    asked_for = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert {url.split(":")[0] for url in asked_for} <= {"file", "data"}
    assert browser.execute_script("return window.hacked") is None


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains, Keys

    actions = ActionChains(browser)
    for key in keys:
        *held, last = key.split("+")
        for name in held:
            actions.key_down(getattr(Keys, name))
        actions.send_keys(getattr(Keys, last))
        for name in held:
            actions.key_up(getattr(Keys, name))
    actions.perform()


def focused(browser: Any) -> str:
    return browser.execute_script("return document.activeElement.closest('article')?.item.key")


def find(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def test_tags_are_text_whatever_they_hold(opened):
    assert opened.title == "Predictions: the first 30 of 500 items"
    assert len(find(opened, "article")) == 12
    card = find(opened, "article")[1]
    assert card.find_element("css selector", "h2").text == HOSTILE
    names = [name.text for name in card.find_elements("css selector", ".name")]
    assert names[:2] == [HOSTILE, "sea"]
    marks = [mark.text for mark in card.find_elements("css selector", ".truth")]
    assert marks == ["✓ important", "✗ not important", "✗ missed"]
    assert HOSTILE in card.find_element("css selector", "img").get_attribute("alt")
    assert find(opened, ".error")[0].text == "not scored: has <b>no tags</b>"


def test_pages_and_items_by_keys(opened):
    press(opened, "ARROW_RIGHT")
    assert focused(opened) == "broken"
    press(opened, "ARROW_RIGHT", "ARROW_RIGHT")
    assert focused(opened) == "item 2"
    ring = "return getComputedStyle(document.activeElement).outlineWidth"
    assert float(opened.execute_script(ring).removesuffix("px")) >= 2
    press(opened, "SHIFT+ARROW_RIGHT")
    assert (focused(opened), find(opened, "#where")[0].text) == (
        "item 12",
        "page 2 of 3, items 13 to 24",
    )
    press(opened, "ARROW_LEFT")
    assert focused(opened) == "item 11"  # the last one of the first page
    press(opened, "ARROW_RIGHT", "SHIFT+ARROW_RIGHT")
    assert (focused(opened), len(find(opened, "article"))) == ("item 24", 6)
    press(opened, *["ARROW_RIGHT"] * 9)
    assert focused(opened) == "item 29"  # and there it ends


def test_pages_by_clicks_and_a_page_that_is_loaded_again(opened):
    back, on = find(opened, "nav:first-of-type button")
    assert not back.is_enabled()
    on.click()
    on.click()
    assert back.is_enabled()
    assert not on.is_enabled()
    opened.refresh()
    assert find(opened, "#where")[0].text == "page 3 of 3, items 25 to 30"


def test_attention_of_a_chosen_tag_lies_over_what_the_model_saw(opened):
    press(opened, "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_DOWN")
    chosen = find(opened, "[aria-pressed=true] .name")
    assert [name.text for name in chosen] == [HOSTILE]
    press(opened, "ARROW_DOWN")
    assert [name.text for name in find(opened, "[aria-pressed=true] .name")] == ["sea"]
    shade = opened.execute_script(
        "const canvas = document.querySelector('.seen canvas');"
        "return [...canvas.getContext('2d').getImageData(0, 0, 2, 2).data]"
    )
    # The brighter, the more: 0.1, 0.2, 0.3 and 0.4 of the attention, row by row.
    assert shade[3::4] == pytest.approx([0.85 * (255 - n) for n in (64, 128, 191, 255)], abs=1)
    seen, shown = find(opened, ".seen")[0].rect, find(opened, "article:nth-child(2) img")[0].rect
    assert seen["x"] - shown["x"] == pytest.approx(shown["width"] * 11 / 64, abs=1)
    assert seen["width"] == pytest.approx(shown["width"] * 42 / 64, abs=1)
    text = find(opened, "article:nth-child(2) .looks")[0].text
    assert text == "attention: up to 40.0 % on one of 4 regions"
    press(opened, "ESCAPE")
    assert find(opened, ".seen") == []
    tag = find(opened, "article:nth-child(3) li button")[0]
    tag.click()
    assert len(find(opened, "article:nth-child(3) .seen")) == 1
    tag.click()
    assert find(opened, ".seen") == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_its_screen_and_is_readable_in_light_and_dark(opened, tmp_path, width, scheme):
    look_at(opened, width, scheme)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    assert len({card.rect["x"] for card in find(opened, "article")}) == (1 if width == 390 else 3)
    for selector in (
        "h1",
        ".legend",
        ".name",
        ".kept .name",
        ".right",
        ".wrong",
        ".note",
        ".number",
    ):
        contrast = opened.execute_script(CONTRAST, find(opened, selector)[0])
        assert contrast >= 4.5, selector  # WCAG 2 AA
    assert opened.save_screenshot(str(tmp_path / "page.png"))
    image = Image.open(tmp_path / "page.png").convert("L")
    assert image.width == width
    assert (np.median(np.asarray(image)) > 128) == (scheme == "light")


CONTRAST = """
const luminance = rgb => rgb.map(c => c / 255).map(c =>
  c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const numbers = text => text.match(/[\\d.]+/g).map(Number);
const text = numbers(getComputedStyle(arguments[0]).color).slice(0, 3);
const behind = [];  // all that may lie behind: of a bar both ends
for (let e = arguments[0]; e; e = e.parentElement) {
  const style = getComputedStyle(e);
  for (const colour of style.backgroundImage.match(/rgba?\\([^)]*\\)/g) ?? [])
    if (numbers(colour)[3] !== 0) behind.push(numbers(colour).slice(0, 3));
  if (numbers(style.backgroundColor)[3] !== 0) {
    behind.push(numbers(style.backgroundColor).slice(0, 3));
    break;
  }
}
const ratios = behind.map(b => [luminance(b), luminance(text)].sort((x, y) => y - x))
  .map(([bright, dark]) => (bright + 0.05) / (dark + 0.05));
return Math.min(...ratios);
"""
