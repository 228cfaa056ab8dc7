"""A report in a real browser without network: nothing fails, nothing is fetched, nothing sticks out.

Screenshots go to build/browser.
"""

import importlib.util
import shutil
from pathlib import Path

import pytest

from hetmoe.report.build import build_report

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
OUT = ROOT / "build" / "browser"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}

_MEASURE = """
const figures = [...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const group = svg.querySelector('g').getBoundingClientRect();
  return [svg.getAttribute('aria-label').slice(0, 40), box.width, box.height, group.width, group.height];
});
return {
  figures,
  inner: window.innerWidth,
  body: document.documentElement.scrollWidth,
  wide: [...document.querySelectorAll('body *')]
    .filter(e => !e.closest('.wide') && e.getBoundingClientRect().right > window.innerWidth + 0.5)
    .map(e => e.tagName + ' ' + e.textContent.slice(0, 50)),
  broken: [...document.querySelectorAll('a[href^="#"]')].filter(a => !document.getElementById(a.hash.slice(1))).length,
  font: Math.min(...[...document.querySelectorAll('p, td, th, figcaption, caption, li')]
    .map(e => parseFloat(getComputedStyle(e).fontSize))),
};
"""


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page():
    synthetic = load("synthetic_sweep", ROOT / "tests" / "report" / "synthetic.py")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    record = synthetic.make_record(
        name="<script>document.title='broken'</script> " + "a-long-name-without-spaces" * 5, scales=(0.0, 5.0),
        times=(None, 25.0, 86400.0), seeds=3,
    )  # fmt: skip
    for name, content in build_report(record).items():
        (OUT / name).write_bytes(content)
    return OUT / "index.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = load("webdriver", Path(__file__).with_name("webdriver.py"))
    with webdriver.Browser(tmp_path_factory.mktemp("profile")) as session:
        session.open("about:blank", 800, 600)  # leaves the browser's own start page
        session.console()
        session.network()
        yield session


@pytest.mark.parametrize("kind", SIZES)
def test_page(browser, page, kind):
    width, height = SIZES[kind]
    browser.open(page.as_uri(), width, height)
    seen = browser.run(_MEASURE)
    browser.screenshot(OUT / f"{kind}.png", whole_page=False)
    browser.screenshot(OUT / f"{kind}-whole.png", whole_page=True)

    assert seen["inner"] == width
    assert seen["body"] <= width and not seen["wide"], seen["wide"]
    assert len(seen["figures"]) > 10
    assert all(min(sizes) > 50 for _, *sizes in seen["figures"]), seen["figures"]
    assert not seen["broken"] and seen["font"] >= 14
    assert browser.run("return document.title").startswith("hetmoe sweep: <script>")

    assert not browser.console()
    events = browser.network()
    requested = {p["request"]["url"] for m, p in events if m == "Network.requestWillBeSent"}
    assert page.as_uri() in requested  # events are recorded at all
    assert all(url == page.as_uri() or url.startswith("data:") for url in requested), requested
    assert not [p for m, p in events if m == "Network.loadingFailed"]


def test_the_check_sees_what_it_looks_for(browser, page, tmp_path):
    """A page with one fault of each kind."""
    bad = tmp_path / "bad.html"
    fault = '<p style="width:3000px">x</p><img src="http://example.invalid/a.png"><script>missing()</script>'
    bad.write_text(page.read_text().replace("</body>", f"{fault}</body>"))
    browser.open(bad.as_uri(), 390, 844)
    seen = browser.run(_MEASURE)
    assert seen["body"] > 390 and seen["wide"]
    assert any("missing" in entry["message"] for entry in browser.console())
    events = browser.network()
    assert any("example.invalid" in p["request"]["url"] for m, p in events if m == "Network.requestWillBeSent")
    assert any(m == "Network.loadingFailed" for m, _ in events)
