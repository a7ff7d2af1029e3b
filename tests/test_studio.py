"""The studio in a real browser: people are learned, drawn, compared and deleted on its page."""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import pytest
import serving
from PIL import Image

from idea_jax import studio
from idea_jax.data.images import ImageError
from idea_jax.serve import examples
from idea_jax.serve import run as serve_run

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parent.parent
PHOTO = ROOT / "idea_jax" / "mini" / "photo.png"
PARTS = ("people", "draw", "compare", "about")
PATIENCE = 1000 * serving.PATIENCE  # milliseconds
# Where axe-core may be: `npm install axe-core`, in the checkout or elsewhere.
AXE = Path(os.environ.get("AXE_CORE", ROOT / "node_modules" / "axe-core" / "axe.min.js"))


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    """The mini, which draws in two steps, with one made-up person to try."""
    offered = examples.example_routes({"mia": [PHOTO.read_bytes()]})
    changes = {"height": 64, "width": 64, "learn_steps": 25, "max_photo_megabytes": 1}
    data = tmp_path_factory.mktemp("served")
    with serving.Running("mini", data, routers=[offered], **changes) as running:
        yield running


@contextlib.contextmanager
def open_tabs(browser, url, count=1, **options):
    """So many tabs of the studio in a browser of their own; whatever they complain of fails."""
    # Without motion: colours that are just changing are no contrast to measure.
    context = browser.new_context(reduced_motion="reduce", **options)
    context.set_default_timeout(PATIENCE)
    wrong, tabs = [], []
    for _ in range(count):
        tab = context.new_page()
        tab.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        tab.on("console", lambda message: wrong.append(message.text) if is_bad(message) else None)
        tab.on(
            "request",
            lambda sent: wrong.append(sent.url) if not is_own(sent.url, url) else None,
        )
        tab.goto(f"{url}/studio/")
        tabs.append(tab)
    yield tabs
    context.close()
    assert wrong == []


def is_bad(message):
    """Whether the console says what should not be: refused content, or an error of a script."""
    return message.type == "error" and "Failed to load resource" not in message.text


def is_own(address, url):
    return address.startswith((url, "blob:", "data:"))


@pytest.fixture
def page(browser, server):
    try:
        with open_tabs(browser, server.url) as (page,):
            page.wait_for_selector("html[data-ready]")
            yield page
    finally:
        with server.client() as client:
            for one in client.get("/v1/identities").json()["identities"]:
                client.delete(f"/v1/identities/{one['name']}")


@pytest.fixture
def anna(server, page):
    """The page, once somebody was learned elsewhere."""
    with server.client() as client:
        job = serving.learn(client, "anna", [PHOTO.read_bytes()], keep_face="true")
        assert serving.ended(client, job)["state"] == "done"
    page.reload()
    page.locator("#library img").wait_for()
    return page


def picture(faces, side=64):
    """A file with so many faces, up to three, as browsers upload it; grey besides."""
    canvas = Image.new("RGB", (side * min(2, max(1, faces)), side * max(1, faces - 1)), "grey")
    with Image.open(PHOTO) as image:
        drawn = image.convert("RGB").resize((side, side))
    for place in [(0, 0), (side, 0), (side // 2, side)][:faces]:
        canvas.paste(drawn, place)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return {"name": "photo.png", "mimeType": "image/png", "buffer": buffer.getvalue()}


def choose(page, *files):
    """Uploads photos, and waits until the server has looked at them."""
    page.set_input_files("#photos", list(files))
    page.locator("#looked li:not([aria-busy])").nth(len(files) - 1).wait_for()


def fill(page, name):
    page.locator("#name").fill(name)
    page.get_by_label("The person on these photos agreed").check()


def learn_button(page):
    return page.get_by_role("button", name="Learn", exact=True)


def draw_button(page):
    return page.locator("#draw button[type=submit]")


def wait_for(found):
    """What must become true of a locator: the page answers a moment after what was done to it."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    return expect(found)


def gallery(page, count):
    """Waits for so many pictures, and returns them."""
    found = page.locator("#gallery li")
    wait_for(found).to_have_count(count)  # one that is on its way is there for a moment, too
    return found


def test_somebody_is_learned_drawn_kept_and_deleted_for_good(page, server):
    choose(page, PHOTO)
    box, frame = (page.locator(css).bounding_box() for css in ("#looked .box", "#looked .frame"))
    assert frame["x"] < box["x"] < box["x"] + box["width"] < frame["x"] + frame["width"]
    fill(page, "Anna Lee")
    assert "anna-lee" in page.locator("#name-hint").inner_text()
    page.get_by_label("Keep the face").check()
    learn_button(page).click()
    page.get_by_role("heading", name="anna-lee is learned").wait_for()
    page.locator("#library img").wait_for()
    words = page.locator("#library li").inner_text()
    assert "at once" in words and "mini" in words and "KB" in words

    page.get_by_role("button", name="Draw anna-lee").first.click()
    wait_for(page.locator("#draw-title")).to_be_focused()
    page.get_by_label("Pictures of each").fill("2")
    page.locator("#seed").fill("7")
    page.locator("#prompt").fill("a cartoon of {}")
    draw_button(page).click()
    drawn = gallery(page, 2)
    assert "a cartoon of anna-lee" in drawn.first.inner_text()
    assert {"seed 7", "seed 7 + 1"} == {
        re.search(r"seed 7( \+ 1)?", text)[0] for text in drawn.all_inner_texts()
    }
    page.locator("#drawing").get_by_text("2 pictures in").wait_for()

    page.reload()
    gallery(page, 2)
    page.get_by_role("button", name="Again with another seed").first.click()
    newest = gallery(page, 3).first
    assert "seed 7" not in newest.inner_text()
    with page.expect_download() as download:
        newest.get_by_role("link", name="Download").click()
    with Image.open(download.value.path()) as image:
        assert image.size == (64, 64) and image.info["AIGenerated"] == "true"
    newest.locator(".thumb").click()
    facts = page.locator("#dialog")
    assert "a cartoon of {}" in facts.inner_text() and "2, ddim" in facts.inner_text()
    facts.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete for good").click()
    gallery(page, 2)

    page.get_by_role("link", name="People").click()
    page.get_by_role("button", name="More of anna-lee").click()
    facts.get_by_label("ComfyUI").uncheck()
    with page.expect_download() as download:
        facts.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "anna-lee.zip"
    facts.get_by_role("button", name="Delete anna-lee").click()
    page.get_by_role("button", name="Keep anna-lee").click()
    folder = Path(server.service.cfg.data)
    assert (folder / "people" / "anna-lee").is_dir()
    facts.get_by_role("button", name="Delete anna-lee").click()
    page.get_by_role("button", name="Delete for good").click()
    page.get_by_text("anna-lee is deleted").first.wait_for()
    wait_for(page.locator("#library li")).to_have_count(0)
    assert [path for path in folder.rglob("*") if "anna-lee" in path.name] == []
    assert not list((folder / "pictures").iterdir())
    page.get_by_role("link", name="Draw").click()
    wait_for(page.locator("#gallery li")).to_have_count(0)


def test_two_tabs_know_of_each_other(browser, server, anna):
    with open_tabs(browser, server.url, 2) as (first, second):
        for tab in (first, second):
            tab.locator("#library li").wait_for()
        choose(first, PHOTO)
        fill(first, "bert")
        learn_button(first).click()
        second.get_by_role("heading", name="bert", exact=True).wait_for()
        # One deletes whom the other is about to delete.
        first.get_by_role("button", name="More of anna").click()
        second.get_by_role("button", name="More of anna").click()
        for tab in (second, first):
            tab.get_by_role("button", name="Delete anna").click()
            tab.get_by_role("button", name="Delete for good").click()
            tab.get_by_text("anna is deleted").first.wait_for()
            wait_for(tab.locator("#library li")).to_have_count(1)
        first.get_by_role("link", name="Draw").click()
        names = first.locator("#cast input").evaluate_all("all => all.map(one => one.value)")
        assert names == ["bert"]


def test_photos_that_cannot_be_used_are_told_and_one_of_three_faces_is_chosen(page):
    broken = {"name": "b.jpg", "mimeType": "image/jpeg", "buffer": b"\xff\xd8\xff\xe0 cut off"}
    large = {"name": "l.png", "mimeType": "image/png", "buffer": bytes(1_500_000)}
    choose(page, broken, picture(0))
    words = page.locator("#looked li").all_inner_texts()
    assert all("Cannot be used" in text for text in words) and "No face was found" in words[1]
    fill(page, "carl")
    learn_button(page).click()
    assert "Take it out" in page.locator("#learn .problems").inner_text()
    for _ in words:
        page.get_by_role("button", name="Take out photo 1").click()
    page.set_input_files("#photos", [large])
    assert "at most" in page.locator("#learn .problems").inner_text()
    wait_for(page.locator("#looked li")).to_have_count(0)

    choose(page, picture(3))
    faces = page.get_by_role("group", name="Face on photo 1").get_by_role("radio")
    wait_for(faces).to_have_count(3)
    places = [one.locator("..").bounding_box()["x"] for one in faces.all()]
    assert places == sorted(places)
    faces.nth(1).focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("number 3 from the left is taken").wait_for()
    page.evaluate(
        "() => { const send = fetch; window.fetch = (url, how) => { "
        "if (how?.body instanceof FormData) window.sent = how.body.get('faces'); "
        "return send(url, how); }; }"
    )
    learn_button(page).click()
    page.get_by_role("heading", name="carl is learned").wait_for()
    assert page.evaluate("window.sent") == "[2]"


def test_what_is_missing_or_wrong_is_said_beside_its_field(anna):
    page, place = anna, anna.locator("#learn .problems")
    learn_button(page).click()
    assert "Choose a photo" in place.inner_text()
    choose(page, PHOTO)
    for name, words in (
        ("-x", "Give a name"),
        ("anna", "anna is here already"),
        ("dora", "agreed"),
    ):
        page.locator("#name").fill(name)
        learn_button(page).click()
        assert words in place.inner_text() and page.locator("#learn [aria-invalid]").count() == 1
    wait_for(page.locator("#consent")).to_be_focused()
    wait_for(page.locator("#looked li")).to_have_count(1)  # the photo is still there

    page.get_by_role("link", name="Draw").click()
    place = page.locator("#draw .problems")
    for field, value, words in (
        ("#prompt", "a tree", "write {}"),
        ("#count", "0", "a number of pictures"),
        ("#count", "65", "a number of pictures"),
        ("#width", "63", "a multiple of"),
    ):
        before = page.locator(field).input_value()
        page.locator(field).evaluate("(node, value) => { node.value = value; }", value)
        draw_button(page).click()
        assert words in place.inner_text()
        page.locator(field).evaluate("(node, value) => { node.value = value; }", before)


def test_problems_of_the_server_are_told_in_words_with_what_to_do(anna):
    page = anna
    busy = {
        "type": "urn:idea_jax:too-busy",
        "title": "the server is busy",
        "status": 429,
        "detail": "256 rows wait; try again in about 4 s",
        "errors": [],
    }
    page.get_by_role("link", name="Draw").click()
    place = page.locator("#drawing")
    page.route("**/v1/images", lambda route: route.fulfill(status=429, json=busy))
    draw_button(page).click()
    place.get_by_role("alert").wait_for()
    assert "try again in about 4 s" in place.inner_text()
    page.unroute("**/v1/images")
    page.route("**/v1/images", lambda route: route.abort())
    draw_button(page).click()
    place.get_by_text("cannot be reached").wait_for()
    page.unroute("**/v1/images")
    lost = 'event: accepted\ndata: {"job": "1", "total": 4}\n\nevent: error\ndata: {"type": '
    lost += '"urn:idea_jax:internal", "title": "the server has made a mistake", "detail": "x"}\n\n'
    page.route(
        "**/v1/images",
        lambda route: route.fulfill(body=lost, headers={"Content-Type": "text/event-stream"}),
    )
    draw_button(page).click()
    place.get_by_text("Nothing of what you have is lost").wait_for()
    page.unroute("**/v1/images")
    page.get_by_label("Pictures of each").fill("1")
    draw_button(page).click()  # and nothing of it stands in the way
    gallery(page, 1)


def test_sliders_begin_where_the_server_does(page, server):
    """Also beyond their usual range, as a checkpoint without guidance has it, and between steps."""
    said = page.request.get(f"{server.url}/v1/info").json()
    own = said | {"defaults": said["defaults"] | {"guidance_scale": 0.25, "id_strength": 2.41}}
    page.route("**/v1/info", lambda route: route.fulfill(json=own))
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert float(page.locator("#guidance").input_value()) == 0.25
    assert float(page.locator("#strength").input_value()) == 2.41


def test_several_people_are_drawn_apart_or_together_and_compared(anna, server):
    page = anna
    with server.client() as client:
        serving.ended(client, serving.learn(client, "bert", [PHOTO.read_bytes()]))
    page.reload()
    page.get_by_role("link", name="Compare").click()
    page.locator("#compare-cast input").nth(1).wait_for()
    page.locator("#compare-prompts").fill("a photo of {}\na sketch of {}")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#grid-progress").get_by_text("4 pictures in").wait_for()
    table = page.locator("#grid table")
    assert set(table.locator("thead th").all_inner_texts()) == {"anna", "bert"}
    wait_for(table.locator("tbody img")).to_have_count(4)
    assert "the face is not kept" in table.inner_text()  # bert's
    page.get_by_label("Strength and guidance, of one person").check()
    page.locator("#strengths").fill("0, 1")
    page.locator("#guidances").fill("1, x")
    page.get_by_role("button", name="Compare", exact=True).click()
    assert "Give numbers" in page.locator("#compare .problems").inner_text()
    page.locator("#guidances").fill("3")
    page.locator("#compare-one").select_option("anna")
    page.get_by_role("button", name="Compare", exact=True).click()
    page.locator("#grid-progress").get_by_text("2 pictures in").wait_for()
    assert table.locator("tbody th").all_inner_texts() == ["strength 0", "strength 1"]
    wait_for(table.locator("tbody img")).to_have_count(2)
    with server.client() as client:
        assert client.get("/v1/pictures").json()["pictures"] == []  # a comparison is not kept

    page.get_by_role("link", name="Draw").click()
    for name in ("anna", "bert"):
        page.locator("#cast").get_by_label(name).check()
    page.get_by_label("All on one picture").check()
    assert re.search(r"\{\w+\} and \{\w+\}", page.locator("#prompt-hint").inner_text())
    asked = []
    page.route(
        "**/v1/images", lambda route: (asked.append(route.request.post_data_json), route.abort())
    )
    draw_button(page).click()
    page.locator("#drawing").get_by_role("alert").wait_for()
    (request,) = asked
    assert {len(request["rows"]), len({row["number"] for row in request["rows"]})} == {4}
    (cast,) = {row["identity"] for row in request["rows"]}
    words = " and ".join(f"{{{name}}}" for name in cast.split(","))
    assert request["rows"][0]["prompt"] == f"a photo of {words}"


def tab_to(page, css, most=60):
    """Presses Tab until the focus is on something that matches, which must be seen to have it."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("css => document.activeElement.matches(css)", css):
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            hidden = "document.activeElement.matches('.unseen, .box input')"
            assert page.evaluate(hidden) or page.evaluate(outline) != "none"
            return
    raise AssertionError(f"{css} is not reached")


def test_all_of_it_works_by_the_keyboard_alone(page):
    # From the start: the browser takes a moment until it leaves the choice of files to the test.
    page.on("filechooser", lambda chooser: chooser.set_files(PHOTO))
    page.keyboard.press("Tab")
    wait_for(page.locator(".skip:focus")).to_have_count(1)
    tab_to(page, "#photos")
    page.keyboard.press("Enter")
    page.locator("#looked").get_by_text("1 face found").wait_for()
    tab_to(page, "#name")
    page.keyboard.type("emma")
    tab_to(page, "#consent")
    page.keyboard.press("Space")
    tab_to(page, "#learn button[type=submit]")
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="emma is learned").wait_for()
    assert "emma" in page.locator("#live").inner_text()
    page.locator("#library img").wait_for()
    tab_to(page, "#jobs button.main")
    page.keyboard.press("Enter")
    tab_to(page, "#count")
    page.keyboard.press("Control+A")
    page.keyboard.type("1")
    page.keyboard.press("Enter")
    gallery(page, 1)
    page.get_by_text("1 picture is drawn").wait_for(state="attached")
    tab_to(page, "#gallery .thumb")
    page.keyboard.press("Enter")
    wait_for(page.locator("#dialog")).to_be_visible()
    page.keyboard.press("Escape")
    wait_for(page.locator(".thumb:focus")).to_have_count(1)
    page.get_by_role("link", name="People").press("Enter")
    tab_to(page, "[data-focus=more]")
    page.keyboard.press("Enter")
    tab_to(page, "#dialog button.danger")
    page.keyboard.press("Enter")
    wait_for(page.locator(":focus")).to_contain_text("Keep")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_text("emma is deleted").first.wait_for()
    wait_for(page.locator("#library-title")).to_be_focused()


def lightness(page, css, what):
    colour = page.locator(css).first.evaluate(f"node => getComputedStyle(node).{what}")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_narrow_screens_and_dark_mode(anna):
    page = anna
    for scheme, dark in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        for css in ("h1", ".hint", ".card"):
            ink = lightness(page, css, "color")
            back = lightness(page, "body" if css != ".card" else css, "backgroundColor")
            assert (ink > back) == dark and abs(ink - back) > 90, css
    page.set_viewport_size({"width": 390, "height": 844})
    choose(page, picture(3))
    for part in PARTS:
        page.locator(f"nav a[href='#{part}']").click()
        for folded in page.locator(f"#view-{part} details").all():
            folded.evaluate("node => { node.open = true; }")
        wait_for(page.locator(f"#view-{part} h1")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, part
    page.locator("nav a[href='#people']").click()
    page.get_by_role("button", name="More of anna").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#dialog").bounding_box()["width"] <= 390


def faults(page):
    """What axe-core calls serious or worse, and where."""
    found = page.evaluate("async () => (await axe.run()).violations")
    return [
        (one["id"], [node["target"] for node in one["nodes"]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here: npm install axe-core")
def test_axe_finds_no_serious_fault(browser, server, anna):
    """The page's own policy keeps foreign scripts out, so this context goes without it."""
    with open_tabs(browser, server.url, bypass_csp=True) as (page,):
        page.wait_for_selector("html[data-ready]")
        page.add_script_tag(path=AXE)
        choose(page, picture(2), picture(0))
        learn_button(page).click()
        found = {}
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for part in PARTS:
                page.locator(f"nav a[href='#{part}']").click()
                if part == "draw" and scheme == "light":
                    page.get_by_label("Pictures of each").fill("1")
                    draw_button(page).click()
                    gallery(page, 1)
                found[scheme, part] = faults(page)
            page.locator("nav a[href='#people']").click()
            page.get_by_role("button", name="More of anna").click()
            found[scheme, "dialog"] = faults(page)
            page.get_by_role("button", name="Close").click()
        assert {where: what for where, what in found.items() if what} == {}


def test_people_to_try_are_offered(page):
    page.get_by_role("button", name="Take the photos of mia").click()
    page.locator("#looked").get_by_text("1 face found").wait_for()
    assert page.locator("#name").input_value() == "mia"
    assert not page.get_by_label("The person on these photos agreed").is_checked()


@pytest.mark.long
def test_somebody_is_learned_in_steps_with_pictures_on_the_way(page):
    choose(page, PHOTO)
    fill(page, "finn")
    page.get_by_label("More like them").check()
    learn_button(page).click()
    bar = page.get_by_role("progressbar", name="Learning finn")
    bar.wait_for()
    page.locator(".previews img").first.wait_for()
    assert 0 < float(bar.get_attribute("value") or 0) <= 25
    page.reload()  # it goes on, and is shown again
    page.get_by_role("heading", name="finn is learned").wait_for()
    assert page.locator(".previews img").count() >= 3
    assert "25 steps" in page.locator("#library li").inner_text()
    choose(page, PHOTO)
    fill(page, "gwen")
    page.get_by_label("More like them").check()
    learn_button(page).click()
    page.get_by_role("button", name="Cancel learning gwen").click()
    page.get_by_role("heading", name="Learning gwen was cancelled").wait_for()
    wait_for(page.locator("#library li")).to_have_count(1)


def test_a_token_is_asked_for_and_taken_from_the_address(browser, smallest_checkpoint, tmp_path):
    model = serving.checkpoint(smallest_checkpoint, tmp_path / "smallest")
    token = "a-token-of-the-studio-for-tests"
    with (
        serving.Running(model, tmp_path / "served", token) as running,
        open_tabs(browser, running.url) as (page,),
    ):
        page.get_by_role("heading", name="needs its token").wait_for()
        wait_for(page.get_by_role("link", name="People")).to_have_count(0)
        page.locator("#token").fill("another token")
        page.get_by_role("button", name="Enter").click()
        page.get_by_text("This is not the token").wait_for()
        page.locator("#token").fill(token)
        page.get_by_role("button", name="Enter").click()
        page.wait_for_selector("html[data-ready]")
        page.get_by_role("link", name="About").click()
        page.get_by_role("button", name="Forget the token").click()
        page.get_by_role("heading", name="needs its token").wait_for()
        page.goto("about:blank")
        page.goto(f"{running.url}/studio/#token={token}")
        page.wait_for_selector("html[data-ready]")
        assert token not in page.url


def test_the_address_of_the_studio_has_the_token_where_one_is_needed(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("IDEA_SERVE_TOKEN", raising=False)
    shown = []
    monkeypatch.setattr("webbrowser.open", shown.append)

    def served(cfg, opened, routers):
        opened(1234, None, serve_run.read_token(cfg))
        return []

    monkeypatch.setattr(serve_run, "run", served)
    assert studio.main(["--pretrained_model_name_or_path=mini", "--open"]) == 0
    assert capsys.readouterr().out.split() == ["http://127.0.0.1:1234/studio/"] == shown
    flags = ["--pretrained_model_name_or_path=mini", "--host=0.0.0.0"]
    assert studio.main(flags) == 0
    (first,) = capsys.readouterr().out.split()
    assert re.fullmatch(r"http://127\.0\.0\.1:1234/studio/#token=[\w-]{40,}", first)
    os.environ.pop("IDEA_SERVE_TOKEN")  # monkeypatch would put it back in the end
    assert studio.main(flags) == 0
    assert capsys.readouterr().out.split() != [first]
    os.environ.pop("IDEA_SERVE_TOKEN")  # monkeypatch would put it back in the end
    (tmp_path / "token").write_text("a token that stands in a file")
    assert studio.main([*flags, f"--token_file={tmp_path / 'token'}", "--host=::"]) == 0
    assert "http://[::1]:1234" in capsys.readouterr().out


def test_examples_are_read_once_and_learned_where_nobody_is(tmp_path):
    for name in ("ada", "ben"):
        (tmp_path / "people" / name).mkdir(parents=True)
        shutil.copy(PHOTO, tmp_path / "people" / name / "0.png")
    found = examples.read_examples(tmp_path / "people")
    assert found == {"ada": [PHOTO.read_bytes()], "ben": [PHOTO.read_bytes()]}
    (tmp_path / "people" / "Ada Lovelace").mkdir()
    for folder, words in (("people", "no name of a person"), ("nobody", "no folders of people")):
        with pytest.raises(ImageError, match=words):
            examples.read_examples(tmp_path / folder)

    class Shelf:
        residents = {}

    class Service:
        shelf, cfg, enhancer, learned = (
            Shelf(),
            studio.StudioConfig(pretrained_model_name_or_path="mini"),
            object(),
            [],
        )

        def learn(self, pupil):
            self.learned.append(pupil)

    service = Service()
    examples.learn_examples(service, found)
    assert [(one.name, one.steps, len(one.photos)) for one in service.learned] == [
        ("ada", 0, 1),
        ("ben", 0, 1),
    ]
    Shelf.residents["ben"] = object()
    examples.learn_examples(service, found)
    assert len(service.learned) == 2
