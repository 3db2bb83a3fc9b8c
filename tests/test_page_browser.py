"""The page in a headless Chromium: it draws, sorts, follows dark mode, fits a phone, and logs no error.

`PARE_CHROMIUM` names the browser; without it one on the path, or playwright's own.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from evals.page import page
from tests.test_page import result

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    path = os.environ.get("PARE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium to start: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def written(tmp_path: Path) -> str:
    runs = {"a": result(ratio=0.4), "b": result(ratio=0.2), "c": result("random", 0.6)}
    (tmp_path / "report.html").write_text(page("Three runs", runs))
    return f"file://{tmp_path / 'report.html'}"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_it_draws_and_logs_no_error(browser, written: str, width: int, scheme: str) -> None:
    errors: list[str] = []
    asked: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab = context.new_page()
    tab.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(written)
    tab.wait_for_selector("#pareto .main-svg")
    assert tab.locator("#pareto .scatterlayer .point").count() == 4, "three pruned models and the dense one"
    assert tab.locator("#layers .bars .point").count() == 4
    assert tab.locator("#scores .boxlayer .box").count() >= 3, "kept of two layers, removed of one"
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 150) == (scheme == "dark")
    assert errors == [] and [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    context.close()


def test_tables_sort_by_a_click_and_charts_change_their_view(browser, written: str) -> None:
    tab = browser.new_page()
    tab.goto(written)
    table = tab.locator("table").first
    heading = table.locator("th", has_text="accuracy")
    column = heading.evaluate("cell => cell.cellIndex")

    def values() -> list[float]:
        cells = table.locator("tbody tr").all()
        return [float(row.locator("td").nth(column).inner_text()) for row in cells]

    heading.locator("button").click()
    assert values() == sorted(values()) and heading.get_attribute("aria-sort") == "ascending"
    heading.locator("button").click()
    assert values() == sorted(values(), reverse=True) and len(set(values())) > 2
    choice = tab.locator("#pareto select")
    before = tab.locator("#pareto .xtitle").text_content()
    choice.select_option(index=1)
    tab.wait_for_function("document.querySelector('#pareto .xtitle').textContent.includes('latency')")
    assert before != tab.locator("#pareto .xtitle").text_content()
