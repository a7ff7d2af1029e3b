"""The report of an evaluation in a real browser: it sorts, loads nothing, and has both colours."""

import numpy as np
import pytest
from PIL import Image

from idea_jax.evaluation import report, scoring
from idea_jax.evaluation.modes import MODES

pytestmark = pytest.mark.browser
HOSTILE = "</title><script>document.title='taken'</script><img src=http://x.invalid/a.png>"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two methods and three people, one of whom is called something evil."""
    folder = tmp_path_factory.mktemp("report")
    Image.new("RGB", (32, 32), "green").save(folder / "a.png")
    names, rows = ["anna", "bo", HOSTILE], []
    for place, method in enumerate(("first", "second")):
        for number, name in enumerate(names):
            for prompt, group in (("a photo of {}", "prompts"), ("a sketch of {}", "style")):
                value = 0.9 - 0.3 * number - 0.1 * place
                rows.append(
                    scoring.ScoredPicture(
                        method,
                        name,
                        prompt,
                        group,
                        "a.png",
                        faces=1,
                        identity=value,
                        prompt_score=0.2 + 0.01 * number + 0.02 * place,
                    )
                )
    eye = np.eye(4, dtype=np.float32)
    people = {
        name: scoring.Known(eye[k : k + 1], eye[k : k + 1], eye[:0]) for k, name in enumerate(names)
    }
    summary = scoring.summarise(MODES["strict"], rows, {}, people, []) | {"seconds": {}}
    photos = {name: [folder / "a.png"] for name in names}
    about = {"settings": {"prompts": HOSTILE}}
    page = report.page(rows, ([folder / "a.png"] * len(rows), photos), summary, about)
    (folder / "report.html").write_text(page)
    return folder / "report.html"


@pytest.fixture
def opened(browser, written):
    """The page, and every address that it asked for or complained of."""
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: asked.append(f"error: {error}"))
    page.on("console", lambda message: asked.append(f"console: {message.text}"))
    page.goto(written.as_uri())
    yield page, asked
    page.close()


def column(page, table, place):
    return page.locator(f"#{table} tbody tr td:nth-child({place})").all_text_contents()


def test_the_report_loads_nothing_and_runs_no_ones_script(opened, written):
    page, asked = opened
    assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]
    assert page.title() == "Evaluation"
    assert page.locator("script").count() == 1
    assert page.get_by_role("main").locator("table").count() == page.locator("table").count() > 0
    assert HOSTILE in page.locator("#people").inner_text()
    shown = page.locator("img").evaluate_all("all => all.map(i => i.complete && i.naturalWidth)")
    assert len(shown) == 2 * 3 * 3 and all(shown)


def test_tables_sort_and_begin_with_the_worst(opened):
    page, _ = opened
    first = column(page, "people", 3)
    assert first == ["0.200", "0.300", "0.500", "0.600", "0.800", "0.900"]
    head = page.get_by_role("columnheader", name="identity, misses as 0").and_(
        page.locator("#people th")
    )
    button = head.get_by_role("button")
    button.click()
    assert column(page, "people", 3) == first and head.get_attribute("aria-sort") == "ascending"
    button.press("Enter")  # by the keyboard, too
    assert column(page, "people", 3) == first[::-1]
    page.locator("#people th").nth(0).get_by_role("button").click()
    names = column(page, "people", 1)
    assert names[-1] == names[-2] and names.index("anna") < names.index("bo")
    # What has no value comes last, however the column is sorted.
    floors = page.locator("#people th").filter(has_text="held-out").get_by_role("button")
    for _ in range(2):
        floors.click()
        assert set(column(page, "people", 6)) == {"\u2013"}


def test_the_plot_has_methods_and_bounds(opened):
    page, _ = opened
    marks = page.locator("#scatter circle.method")
    assert marks.count() == 2
    assert page.locator("#scatter circle").count() == 2 * 3 + 2
    words = page.locator("#scatter text").all_text_contents()
    assert {"first", "second", "floor", "ceiling"} <= set(words)
    (x0, y0), (x1, y1) = (
        (float(mark.get_attribute("cx")), float(mark.get_attribute("cy"))) for mark in marks.all()
    )
    assert x0 < x1 and y0 < y1  # the second keeps prompts better, and faces worse


def test_light_and_dark_are_both_readable(opened):
    page, _ = opened

    def lightness(what):
        colour = page.evaluate(f"getComputedStyle(document.body).{what}")
        return sum(map(int, colour.strip("rgb()").split(",")[:3])) / 3

    for scheme, dark in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        ink, back = lightness("color"), lightness("backgroundColor")
        assert (ink > back) == dark and abs(ink - back) > 150
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
