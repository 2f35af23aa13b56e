"""The pages in a real browser, driven over its debugging pipe: one start for all tests."""

import base64
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "evaluation"))
import reported

from rosepo_jax.evaluation import comparison, page
from rosepo_jax.stages import compare

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (390, 800, 1200)
PRINTED = 688  # CSS pixels between the margins of an A4 sheet
# Of every visible text: contrast ratio of WCAG 2.1 between its colour and the nearest background behind it.
CONTRASTS = """
(() => {
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const light = colour => parts(colour).slice(0, 3).map(value => value / 255)
    .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if ((parts(colour)[3] ?? 1) > 0) return colour;
    }
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const ink = element.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(ink), light(behind(element))].sort((x, y) => y - x);
    found[`${element.tagName} ${ink} on ${behind(element)}`] = (a + .05) / (b + .05);
  }
  return JSON.stringify(found);
})()
"""


def find():
    """The path of a browser; without one the tests fail in CI and are skipped elsewhere."""
    given = os.environ.get("ROSEPO_BROWSER")
    path = given or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = f"no browser: set ROSEPO_BROWSER, or install one of {', '.join(NAMES)} (bash launch/browser.sh)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


class Browser:
    """A tab of a headless browser. `events`: everything that it reported, in order."""

    def __init__(self, path, profile):
        to_read, self.to = os.pipe()
        self.from_, to_write = os.pipe()
        start = f'exec "$@" 3<&{to_read} 4>&{to_write}'  # where a browser looks for its pipe
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            ["bash", "-c", start, "bash", path, *flags, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read), os.close(to_write)
        self.rest, self.events, self.number, self.session = b"", [], 0, {}
        target = self("Target.getTargets")["targetInfos"][0]["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Log", "Runtime"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        """The answer to a command of the DevTools protocol."""
        self.number += 1
        os.write(
            self.to,
            json.dumps({"id": self.number, "method": method, "params": parameters} | self.session).encode() + b"\0",
        )
        while (message := self.read()).get("id") != self.number:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def read(self):
        while b"\0" not in self.rest:
            chunk = os.read(self.from_, 1 << 20)
            assert chunk, "the browser went away"
            self.rest += chunk
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def open(self, path):
        self.events.clear()
        self("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def show(self, width=1200, scheme="light", media="screen"):
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self):
        """What the window shows, height x width x 3, from 0 to 1."""
        data = base64.b64decode(self("Page.captureScreenshot")["data"])
        return matplotlib.image.imread(io.BytesIO(data), format="png")[:, :, :3]

    def contrasts(self):
        return json.loads(self("Runtime.evaluate", expression=CONTRASTS)["result"]["value"])

    def close(self):
        self("Browser.close")
        os.close(self.to), os.close(self.from_)
        self.process.wait(timeout=20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    tab = Browser(find(), tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a run with everything that a report can show, and that of a comparison of four runs."""
    folder = tmp_path_factory.mktemp("pages")
    titles = (*reported.TITLES[:1], "A_title_without_a_single_space_" * 4, *reported.TITLES[2:])
    material = reported.material(catalogue=reported.catalogue(titles))
    (folder / "report.html").write_text(page.html(material), "utf-8")
    runs = [
        reported.run(folder / f"run {beta} {seed}", seed, hits, **{"align.beta": beta, "align.objective": objective})
        for beta, objective, seed, hits in (
            (0.1, "dpo", 0, 20),
            (0.1, "dpo", 1, 24),
            (0.3, "rosepo", 0, 30),
            (1.0, "ipo", 0, 12),
        )
    ]
    found = comparison.compare(compare.read(runs))
    (folder / "comparison.html").write_text(comparison.html(found), "utf-8")
    return [folder / "report.html", folder / "comparison.html"]


@pytest.fixture(params=["report", "comparison"])
def opened(request, browser, pages):
    (path,) = (path for path in pages if path.stem == request.param)
    browser.show()
    browser.open(path)
    return browser


def methods(browser):
    return [event.get("method") for event in browser.events]


def test_nothing_is_fetched_and_nothing_is_complained_about(opened):
    opened.picture()
    asked = [e["params"]["request"]["url"] for e in opened.events if e.get("method") == "Network.requestWillBeSent"]
    assert len(asked) == 1 and asked[0].startswith("file://")
    complaints = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"} & set(methods(opened))
    assert not complaints, opened.events


def test_the_page_is_never_wider_than_the_window(opened):
    """Wide tables scroll by themselves. On paper nothing scrolls, and a browser would shrink everything to fit."""
    for width, media in (*((width, "screen") for width in WIDTHS), (PRINTED, "print")):
        opened.show(width, media=media)
        assert opened("Page.getLayoutMetrics")["cssContentSize"]["width"] == width, (width, media)


def test_light_and_dark_are_both_readable(opened):
    background = {}
    for scheme in ("light", "dark"):
        opened.show(scheme=scheme)
        contrasts = opened.contrasts()
        assert len(contrasts) > 10 and any(name.startswith("text ") for name in contrasts)  # of plots too
        assert min(contrasts.values()) >= 4.5, sorted(contrasts.items(), key=lambda item: item[1])[:3]
        grey, counts = np.unique(opened.picture().mean(axis=2).round(3), return_counts=True)
        background[scheme] = grey[counts.argmax()]
        assert np.abs(grey - background[scheme]).max() > 0.7  # as painted
    assert background["light"] > 0.9 and background["dark"] < 0.15


def test_it_prints_on_a_plausible_number_of_sheets(opened, request):
    opened.show(media="print")
    pdf = base64.b64decode(opened("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert pdf.startswith(b"%PDF")
    sheets = sheet_sizes(pdf)
    least, most = {"report": (6, 16), "comparison": (1, 6)}[request.node.callspec.params["opened"]]
    assert least <= len(sheets) <= most
    assert all(size == pytest.approx((595, 842), abs=1) for size in sheets)  # A4


def sheet_sizes(pdf):
    """(width, height) in points of every page."""
    boxes = [part.split(b"]")[0] for part in pdf.split(b"/MediaBox [")[1:]]
    return [tuple(map(float, box.split()[2:4])) for box in boxes]


def test_it_needs_no_script(opened, pages):
    opened.show()
    with_script = opened.picture()
    opened("Emulation.setScriptExecutionDisabled", value=True)
    opened("Page.reload")
    opened("Page.getLayoutMetrics")
    np.testing.assert_array_equal(opened.picture(), with_script)
    opened("Emulation.setScriptExecutionDisabled", value=False)
