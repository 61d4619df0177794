"""The pages in Debian's chromium. Screenshots lie in the tests' temporary folders, to be looked at."""

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import narrow
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from test_features_page import make_features
from test_zsl_run_page import QUICK, make_run

from vggenc.features_page import features_page
from vggenc.page import write_page
from vggenc.zsl.run_page import run_page

pytestmark = pytest.mark.browser
WIDTHS = (1280, 390)
COLOURS = ("light", "dark")


@pytest.fixture(scope="module")
def pages(tmp_path_factory, oxford) -> dict[str, Path]:
    """A page of features, one image of which has moved away, and one of a run."""
    folder = tmp_path_factory.mktemp("pages")
    features = make_features(folder, oxford)
    (folder / "pictures" / "stripes" / "00.png").unlink()
    write_page(folder / "features.html", features_page(features))
    run = make_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        narrow.__wrapped__(patch)
        write_page(folder / "run.html", run_page(run, options=QUICK))
    return {name: folder / f"{name}.html" for name in ("features", "run")}


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(params=["features", "run"])
def shown(request, browser, pages) -> webdriver.Chrome:
    """The browser with one of the pages, freshly loaded, and nothing in its logs from before."""
    resize(browser, 1280)
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(pages[request.param].as_uri())
    return browser


def resize(browser, width: int, colours: str = "light") -> None:
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": colours}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def happened(browser, event: str) -> list[dict[str, Any]]:
    """What the browser's log tells of a kind of event."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [message["params"] for message in messages if message["method"] == event]


def column(browser, table, header: str) -> list[str]:
    """The cells of a column, from the top down."""
    script = """
        const [table, header] = arguments;
        const at = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent === header);
        return [...table.tBodies[0].rows].map((row) => row.cells[at].textContent);
    """
    return browser.execute_script(script, table, header)


def click(browser, table, header: str) -> None:
    button = next(each for each in table.find_elements(By.CSS_SELECTOR, "th > button") if each.text == header)
    browser.execute_script("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", button)
    button.click()


def test_pages_load_without_errors_and_ask_no_network(shown):
    assert shown.execute_script("return document.readyState") == "complete"
    assert shown.get_log("browser") == []
    asked = [event["request"]["url"] for event in happened(shown, "Network.requestWillBeSent")]
    assert asked[0].startswith("file:")
    assert all(url.startswith("data:") for url in asked[1:])


def test_the_policy_of_a_page_stops_scripts_and_pictures_from_elsewhere(shown):
    shown.execute_script(
        """
        const script = document.createElement("script");
        script.textContent = "document.title = 'taken over'";
        document.body.append(script);
        document.body.append(Object.assign(new Image(), {src: "http://localhost:9/a.png"}));
        """
    )
    assert len(shown.get_log("browser")) == 2  # both are refused
    assert shown.title != "taken over"
    assert [event.get("blockedReason") for event in happened(shown, "Network.loadingFailed")] == ["csp"]


def test_every_picture_is_described_and_drawn(shown):
    images = shown.find_elements(By.TAG_NAME, "img")
    assert len(images) >= 8
    assert all(image.get_attribute("alt").strip() for image in images)
    assert shown.execute_script("return [...document.images].every((image) => image.naturalWidth > 0)")
    for drawing in shown.find_elements(By.CSS_SELECTOR, "svg:not([aria-hidden]), [role=img]"):
        assert drawing.get_attribute("aria-label").strip()


@pytest.mark.parametrize("width", WIDTHS)
def test_pages_fit_the_width_and_are_photographed(shown, request, width, tmp_path):
    name = request.node.callspec.params["shown"]
    for colours in COLOURS:
        resize(shown, width, colours)
        sizes = "return [document.documentElement.scrollWidth, window.innerWidth]"
        scrolled, inner = shown.execute_script(sizes)
        assert inner == width
        assert scrolled <= inner
        height = shown.execute_script("return document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        whole = {"captureBeyondViewport": True, "clip": clip}
        picture = shown.execute_cdp_cmd("Page.captureScreenshot", whole)["data"]
        file = tmp_path / f"{name}-{width}-{colours}.png"
        file.write_bytes(base64.b64decode(picture))
        assert file.stat().st_size > 20_000


@pytest.mark.parametrize("shown", ["features"], indirect=True)
def test_a_click_on_a_header_sorts_and_another_one_turns_it_round(shown):
    table = shown.find_element(By.CSS_SELECTOR, "#rows table")
    before = column(shown, table, "Row")
    numbers = sorted(map(int, before))
    assert numbers[-1] > 9  # as text, 10 would stand before 9
    click(shown, table, "Row")
    assert column(shown, table, "Row") == list(map(str, numbers))
    click(shown, table, "Row")
    assert column(shown, table, "Row") == list(map(str, reversed(numbers)))
    click(shown, table, "Path")
    paths = column(shown, table, "Path")
    assert [path for path in paths if path.startswith("stripes")] == [
        f"stripes/{i:02}.png" for i in range(12)
    ]
    click(shown, table, "Path")
    assert column(shown, table, "Path") == paths[::-1]
    for _ in range(2):  # whichever way, rows without a cluster come last
        click(shown, table, "Cluster")
        assert column(shown, table, "Cluster")[-2:] == ["-", "-"]
    states = [head.get_attribute("aria-sort") for head in table.find_elements(By.TAG_NAME, "th")]
    assert states == ["none"] * 5 + ["descending"]


@pytest.mark.parametrize("shown", ["run"], indirect=True)
def test_bars_sort_by_their_values(shown):
    table = shown.find_element(By.CSS_SELECTOR, "#classes table")
    click(shown, table, "GZSL, attributes")
    click(shown, table, "GZSL, attributes")
    values = [float(text) for text in column(shown, table, "GZSL, attributes")]
    assert len(values) == 21
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("shown", ["features"], indirect=True)
def test_the_keyboard_sorts_too(shown):
    table = shown.find_element(By.CSS_SELECTOR, "#failures table")
    table.find_element(By.CSS_SELECTOR, "th > button").send_keys(Keys.ENTER)
    assert column(shown, table, "Path") == ["<b>text.jpg", "empty.png"]
    assert table.find_element(By.TAG_NAME, "th").get_attribute("aria-sort") == "ascending"


@pytest.mark.parametrize("shown", ["features"], indirect=True)
def test_a_name_in_the_legend_leaves_the_other_points_faint(shown):
    names = shown.find_elements(By.CSS_SELECTOR, ".legend > button")
    groups = shown.find_elements(By.CSS_SELECTOR, ".map g")
    assert [name.text.split()[0] for name in names] == ["blue", "stripes"]
    shown.execute_script("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", names[1])
    names[1].click()
    assert [group.get_attribute("class") for group in groups] == ["c0 faint", "c1"]
    assert names[1].get_attribute("aria-pressed") == "true"
    names[1].click()
    assert [group.get_attribute("class") for group in groups] == ["c0", "c1"]


@pytest.mark.parametrize("shown", ["features"], indirect=True)
def test_a_point_leads_to_its_row(shown):
    point = shown.find_element(By.CSS_SELECTOR, ".map a")
    row = point.get_attribute("href") or ""
    shown.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", point)
    target = shown.find_element(By.CSS_SELECTOR, "tr:target")
    assert target.get_attribute("id")
    assert target.text.split()[1] == point.find_element(By.TAG_NAME, "title").get_attribute("textContent"), (
        row
    )
