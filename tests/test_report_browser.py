"""The report as a reader sees it: in headless Chromium, on a wide and on a narrow screen, light and dark, printed."""

from pathlib import Path

import pytest

from tests.chromium import Browser, Page
from tests.report_runs import classified, detected, picture, pretrained, segmented, swept
from tools.report.page import write_report

WIDTHS = (1280, 390)
HOSTILE = "<script>alert(1)</script>\"'" + "w" * 200 + "\n\N{RAINBOW}"

# Everything that is cut off by the window, but for what scrolls in a box of its own.
STICKS_OUT = """
[...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !e.closest(".scroll, pre");
}).map(e => e.tagName + "." + e.getAttribute("class") + " " + e.textContent.slice(0, 40))
"""
# The least contrast of text with what is behind it, by what it is.
CONTRAST = """
(() => {
  const light = c => {
    const [r, g, b] = c.match(/[0-9.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/rgba\\(.*, 0\\)/.test(colour) && colour !== "transparent") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = {};
  for (const e of document.querySelectorAll("td, th, li, p, a, figcaption, h1, h2, h3, caption, summary, .delta, .tick, .label")) {
    const style = getComputedStyle(e), drawn = e.namespaceURI.endsWith("svg");
    const a = light(drawn ? style.fill : style.color), b = light(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const what = e.tagName + "." + (e.getAttribute("class") || "");
    found[what] = Math.min(found[what] ?? 99, ratio);
  }
  return found;
})()
"""
NARROW_CHARTS = """
[...document.querySelectorAll(".chart > svg")].filter(e => e.getBoundingClientRect().width < 0.99 * e.parentElement.clientWidth).length
"""
WIDE_SWATCHES = "[...document.querySelectorAll('.legend svg')].filter(e => e.getBoundingClientRect().width > 30).length"
TICK_PX = "Math.min(...[...document.querySelectorAll('.tick')].map(e => e.getBoundingClientRect().height))"


@pytest.fixture(scope="module")
def page_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report of every stage, two runs of most, hostile and very long names, one run that has only begun."""
    folder = tmp_path_factory.mktemp("runs")
    pretrained(folder / "rc_mae")
    pretrained(folder / "mae", "mae", rate=130.0)
    classified(folder / "tuned", per_class={HOSTILE: 10.0, "dog": 50.0})
    classified(folder / ("y" * 200), 61.0, per_class={HOSTILE: 12.0, "dog": 49.0})
    run = detected(folder / "boxes", names=[HOSTILE, "dog"])
    picture(run / "pictures" / "detections_0000010.png", 900, 600, noise=True)
    segmented(folder / "labels", names=[HOSTILE, "sky"], config={"data": f"/sets/{HOSTILE.replace('/', '')}"})
    swept(folder / "corruptions")
    swept(folder / "dense", {"box_ap": 0.4, "mask_ap": 0.3}, name="coco", clean={"box_ap": 0.4, "mask_ap": 0.35})
    begun = classified(folder / "begun")
    for name in ("summary.json", "results.json", "metrics.jsonl", "confusion.png"):
        (begun / name).unlink()
    out = folder / "report.html"
    write_report([folder], out)
    return out.as_uri()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_is_whole_quiet_and_readable(browser: Browser, page_url: str, width: int, dark: bool) -> None:
    page = Page(browser, page_url, width, dark)
    try:
        seen = page.seen()
        assert seen.console == []
        assert [url for url in seen.requests if not url.startswith("data:image/webp")] == [page_url]
        assert page.evaluate("innerWidth") == width
        assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") is dark
        assert page.evaluate("document.querySelectorAll('table').length") == 20
        pictures = page.evaluate(
            "[...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
        )
        assert len(pictures) == 6 and all(done and natural > 0 and seen > 30 for done, natural, seen in pictures)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(STICKS_OUT) == []
        faint = {what: ratio for what, ratio in page.evaluate(CONTRAST).items() if ratio < 4.5}
        assert faint == {}
        assert page.evaluate(TICK_PX) >= 11
        assert page.evaluate(NARROW_CHARTS) == 0 and page.evaluate(WIDE_SWATCHES) == 0
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(21, 24, 28)") is dark, background
        missing = "[...document.querySelectorAll('nav a')].filter(a => !document.querySelector(a.getAttribute('href'))).length"
        assert page.evaluate(missing) == 0
    finally:
        page.close()


def test_tables_scroll_in_boxes_of_their_own_where_the_screen_is_narrow(browser: Browser, page_url: str) -> None:
    page = Page(browser, page_url, 390)
    try:
        inner = page.evaluate("[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth, e.clientWidth])")
        assert any(content > box for content, box in inner) and all(box <= 390 for _, box in inner)
        assert page.evaluate("getComputedStyle(document.querySelector('table.cards thead')).display") == "none"
    finally:
        page.close()


def test_hostile_names_are_nothing_but_text(browser: Browser, page_url: str) -> None:
    page = Page(browser, page_url, 1280)
    try:
        assert page.evaluate("document.scripts.length") == 0
        assert page.evaluate("document.body.textContent.includes('<script>alert(1)</script>')") is True
        assert page.evaluate("document.querySelectorAll('[onerror], [onclick], [onload], [onmouseover]').length") == 0
    finally:
        page.close()


def test_it_prints(browser: Browser, page_url: str, tmp_path: Path) -> None:
    page = Page(browser, page_url, 1280, dark=True)
    try:
        page.pdf(tmp_path / "page.pdf")
        printed = (tmp_path / "page.pdf").read_bytes()
        assert printed.startswith(b"%PDF-") and printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") >= 4
    finally:
        page.close()
