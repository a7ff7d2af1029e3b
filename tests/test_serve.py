"""`idea-serve`: people are learned, drawn and deleted over HTTP, as the commands do it."""

import base64
import io
import json
import logging
import re
import shutil
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import numpy as np
import pytest
import serving
from PIL import Image
from serving import ended, events, learn, photo, row

import train_jax
from idea_jax.data import images
from idea_jax.formats.identity import read_identity
from idea_jax.pytrees import flatten
from idea_jax.sampling import engine
from idea_jax.sampling.engine import PictureRow
from idea_jax.sampling.plan import NOBODY
from idea_jax.sampling.programs import Sampling
from idea_jax.serve import photos, service
from idea_jax.serve.app import STUDIO
from idea_jax.serve.line import Line, Ticket
from idea_jax.serve.painter import Enrolled, Painter
from idea_jax.serve.school import Lesson
from idea_jax.serve.tasks import Task
from idea_jax.training.program import Shape


@pytest.fixture(scope="module")
def model(smallest_checkpoint, tmp_path_factory):
    return serving.checkpoint(smallest_checkpoint, tmp_path_factory.mktemp("model") / "smallest")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving.Running(model, tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client
        for one in client.get("/v1/identities").json()["identities"]:
            client.delete(f"/v1/identities/{one['name']}")


def pixels_of(picture):
    """uint8[H, W, 3] of an answer's picture."""
    with Image.open(io.BytesIO(base64.b64decode(picture["data"]))) as image:
        return np.asarray(image.convert("RGB"))


def covered(client, name):
    """Somebody, once their cover is drawn: nothing else happens by itself."""
    until = time.monotonic() + serving.PATIENCE
    while (one := client.get(f"/v1/identities/{name}").json())["cover"] is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return one


def draw(client, *rows, **asked):
    return client.post("/v1/images", json={"rows": list(rows), **asked})


def test_somebody_is_learned_as_the_command_learns_them(client, server, model, tmp_path):
    """The same file, but for what says when and where; and they are listed with what was asked."""
    job = ended(client, learn(client, "anna", [photo(1), photo(2)], steps=2, seed=3))
    assert job["state"] == "done", job["problem"]
    assert (job["done"], job["total"], job["identity"]) == (2, 2, "/v1/identities/anna")
    assert isinstance(job["loss"], float)
    for number in (1, 2):
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / f"{number}.png").write_bytes(photo(number))
    flags = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": tmp_path / "photos",
        "output_dir": tmp_path / "out",
        "placeholder_token": "<anna>",
        "max_train_steps": 2,
        "seed": 3,
        "crop": "face",
        "report_to": "none",
        "mesh": "identity=1,data=1",
    }
    assert train_jax.main([f"--{name}={value}" for name, value in flags.items()]) == 0
    ours = read_identity(server.service.shelf.get("anna").folder / "identity.safetensors")
    theirs = read_identity(tmp_path / "out" / "identity.safetensors")
    assert (ours.placeholder, ours.method, ours.steps) == ("<anna>", theirs.method, 2)
    for name, value in flatten(theirs.trainable).items():
        np.testing.assert_allclose(flatten(ours.trainable)[name], value, rtol=1e-5, atol=1e-6)
    (one,) = client.get("/v1/identities").json()["identities"]
    assert one == client.get("/v1/identities/anna").json()
    told = {name: one[name] for name in ("name", "steps", "photos", "kept_photos", "keeps_face")}
    assert told == dict(name="anna", steps=2, photos=2, kept_photos=0, keeps_face=False)


def test_a_picture_is_that_of_the_engine_with_its_settings_and_marks(client, server):
    ended(client, learn(client, "anna"))
    wanted = row("anna", "a sketch of {}", seed=5, number=2, guidance_scale=2.0, id_strength=0.5)
    answer = draw(client, wanted, row("anna")).json()
    picture, other = answer["pictures"]
    artist = server.service.painter.artist
    asked = PictureRow(
        ("anna",), "a sketch of {}", Sampling((32, 32), "ddim", 2), "", 5, 2, 2.0, 0.5
    )
    errand = server.service.painter.errand(lambda: dict(artist.draw([asked]))[0])
    np.testing.assert_array_equal(pixels_of(picture), images.to_uint8(errand.result()))
    assert picture["data"] != other["data"] and picture["id"] is None
    about = picture["about"]
    assert about["prompt"] == "a sketch of {}" and (about["seed"], about["number"]) == (5, 2)
    assert about["identities"] == [client.get("/v1/identities/anna").json()["sha256"]]
    text = images.read_text(base64.b64decode(picture["data"]))
    assert text["AIGenerated"] == "true" and images.DIGITAL_SOURCE_TYPE in str(text)
    assert json.loads(text["parameters"])["hash"] == about["hash"]


def test_faces_are_found_and_one_of_them_is_chosen(client, server):
    """The larger one is taken if nothing is said; another choice is another person."""
    files = [("photos", ("a.png", photo(1, 640))), ("photos", ("b.png", b"no picture"))]
    good, bad = client.post("/v1/faces", files=files).json()["photos"]
    assert (good["width"], good["height"], good["chosen"], good["problem"]) == (640, 640, 0, None)
    assert [face["number"] for face in good["faces"]] == [0, 1]
    left, _, right, _ = good["faces"][0]["box"]
    assert abs((left + right) / 2 - 200) < 8
    assert bad["faces"] == [] and "photo 2 is not a JPEG" in bad["problem"]
    learned = []
    for name, faces in (("left", "[0]"), ("right", "[1]"), ("none", "")):
        job = ended(client, learn(client, name, [photo(1, 640)], faces=faces))
        assert job["state"] == "done", job
        tokens = read_identity(server.service.shelf.get(name).folder / "identity.safetensors")
        learned.append(tokens.trainable["pseudo_tokens"])
    assert (learned[0] == learned[2]).all() and (learned[0] != learned[1]).any()
    assert ended(client, learn(client, "third", faces="[7]"))["problem"]["status"] == 422


def test_a_cover_is_drawn_and_likeness_is_told_of_those_whose_face_is_kept(client):
    kept = {"keep_face": "true", "keep_photos": "true"}
    ended(client, learn(client, "anna", [photo(1), photo(2)], **kept))
    ended(client, learn(client, "bert"))
    one = covered(client, "anna")
    cover = client.get(one["cover"]).headers  # that no browser keeps when the person goes
    assert (cover["content-type"], cover["cache-control"]) == ("image/png", "no-store")
    assert -1 <= one["cover_likeness"] <= 1 and one["keeps_face"]
    rows = [row("anna"), row("bert"), row("anna,bert", "{anna} beside {bert}")]
    alone, without, both = draw(client, *rows, likeness=True).json()["pictures"]
    assert list(alone["likeness"]) == ["anna"] == list(both["likeness"])
    assert without["likeness"] == {}
    assert draw(client, rows[0]).json()["pictures"][0]["likeness"] is None
    # The photo is kept as pixels alone, and somebody can be learned from it again.
    kept = client.get("/v1/identities/anna/photos/0")
    assert kept.headers["content-type"] == "image/jpeg" and b"Exif" not in kept.content[:200]
    assert client.get("/v1/identities/bert/photos/0").status_code == 404
    fields = {"name": "anna", "consent": "true", "replace": "true", "steps": "2"}
    form = {name: (None, value) for name, value in fields.items()}
    job = ended(client, client.post("/v1/identities", files=form))
    assert job["state"] == "done", job["problem"]
    assert client.get("/v1/identities/anna").json()["steps"] == 2
    assert [one["step"] for one in job["previews"]] == [1]
    shown = client.get(job["previews"][0]["url"])
    assert images.read_text(shown.content)["AIGenerated"] == "true"


def test_events_tell_of_each_picture_and_of_a_job(client):
    answer = learn(client, "anna", [photo(1), photo(2)], steps=2)
    with client.stream("GET", f"{answer.headers['location']}/events") as stream:
        told = list(events(stream.iter_lines()))
    assert [name for name, _ in told[-2:]] == ["job", "end"]
    assert told[-2][1]["state"] == "done" and told[-2][1]["done"] == 2
    asked = {"rows": [row("anna", number=n) for n in range(3)], "stream": True, "keep": True}
    with client.stream("POST", "/v1/images", json=asked) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        told = list(events(stream.iter_lines()))
    names = [name for name, _ in told]
    assert names[0] == "accepted" and names[-1] == "done" and names.count("picture") == 3
    pictures = [value for name, value in told if name == "picture"]
    assert sorted(one["row"] for one in pictures) == [0, 1, 2]
    listed = client.get("/v1/pictures?identity=anna&limit=2").json()
    newest = sorted((one["id"] for one in pictures), reverse=True)
    assert [one["id"] for one in listed["pictures"]] == newest[:2] and listed["next"] == newest[1]
    rest = client.get(f"/v1/pictures?before={listed['next']}").json()
    assert [one["id"] for one in rest["pictures"]] == newest[2:] and rest["next"] is None
    assert images.read_text(client.get(pictures[0]["url"]).content)["AIGenerated"] == "true"
    assert client.delete(pictures[0]["url"]).status_code == 204
    assert client.get(pictures[0]["url"]).status_code == 404


def test_nothing_is_left_of_somebody_who_is_deleted(client, server):
    """No file, no entry of the engine's caches, no text, no job, and no picture that shows them."""
    for name in ("anna", "bert"):
        ended(client, learn(client, name, keep_face="true", keep_photos="true"))
    both = row("anna,bert", "{anna} beside {bert}")
    draw(client, row("anna"), row("bert"), both, keep=True)
    for name in ("anna", "bert"):
        covered(client, name)  # so that nothing is written any more
    service = server.service
    folder = service.shelf.folder.parent
    there = {path for path in folder.rglob("*") if path.is_file()}
    digest = service.shelf.get("anna").known.digest
    told = client.delete("/v1/identities/anna").json()
    gone = {path for path in there if not path.exists()}
    assert {folder / name for name in told["files"]} == gone
    assert told["pictures"] == 2 and told["cache_entries"] > 0 and told["jobs"]
    names = {path.name for path in gone}
    assert {"identity.safetensors", "face.safetensors", "0.jpg", "person.json"} <= names
    artist = service.painter.artist
    for kept in (artist.near, artist.known, artist.texts.kept, service.reception.texts.kept):
        assert "anna" not in str(kept.entries.keys()) and digest not in str(kept.entries.keys())
    assert not any(digest in path.read_text("latin-1") for path in folder.rglob("*.json"))
    assert client.get("/v1/identities/anna").status_code == 404
    assert client.delete("/v1/identities/anna").status_code == 404
    assert all(client.get(f"/v1/jobs/{key}").status_code == 404 for key in told["jobs"])
    refused = draw(client, row("anna")).json()
    assert refused["status"] == 422 and "nobody called anna" in refused["errors"][0]["detail"]
    (left,) = client.get("/v1/pictures").json()["pictures"]
    assert left["about"]["people"] == ["bert"]
    assert draw(client, row("bert")).status_code == 200


def test_whoever_cannot_be_read_or_is_half_gone_can_be_deleted(client, server, monkeypatch):
    """Their folder is damaged, is gone, or cannot be emptied: the pictures of them go as well."""
    shelf = server.service.shelf
    ended(client, learn(client, "anna"))
    covered(client, "anna")
    draw(client, row("anna"), keep=True)
    with shelf.lock:
        del shelf.residents["anna"]  # as at a start that cannot read the identity
    refused = learn(client, "anna")
    assert refused.status_code == 409 and "replace=true" in refused.json()["detail"]

    def stuck(hidden):
        raise OSError(5, "Input/output error")

    discard = shelf.discard
    monkeypatch.setattr(shelf, "discard", stuck)
    assert client.delete("/v1/identities/anna").status_code == 500
    assert client.get("/v1/pictures").json()["pictures"] == []
    monkeypatch.setattr(shelf, "discard", discard)
    assert (
        "people/anna/identity.safetensors" in client.delete("/v1/identities/anna").json()["files"]
    )
    assert list(shelf.folder.iterdir()) == []
    assert client.delete("/v1/identities/anna").status_code == 404
    assert ended(client, learn(client, "anna"))["state"] == "done"
    covered(client, "anna")
    draw(client, row("anna"), keep=True)
    shutil.rmtree(shelf.get("anna").folder)
    told = client.delete("/v1/identities/anna").json()
    assert told["pictures"] == 1 and all(name.startswith("pictures/") for name in told["files"])
    assert client.get("/v1/identities").json() == {"identities": []}


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"name": "Anna"}, "name", "small letters"),
        ({"name": "../x"}, "name", "small letters"),
        ({"consent": "false"}, "consent", "agreed"),
        ({"steps": "321"}, "steps", "from 0 to 320"),
        ({"steps": "-1"}, "steps", "from 0 to 320"),
        ({"faces": "[0, 1]"}, "faces", "1 numbers"),
        ({"keep_photos": "maybe"}, "keep_photos", "true or false"),
        ({"colour": "red"}, "colour", "expected some of"),
    ],
)
def test_what_is_wrong_with_a_form_is_told_with_its_field(client, changes, where, words):
    answer = learn(client, **{"name": "anna", **changes})
    told = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, told["status"]) == (422, 422)
    assert [one["where"] for one in told["errors"]] == [where] and words in told["detail"]
    assert client.get("/v1/identities").json()["identities"] == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "a photo"}, "{}"),
        ({"prompt": "x" * 3000 + "{}"}, "3002 letters"),
        ({"identity": "../anna"}, "no name of a person"),
        ({"identity": "anna,anna,anna,anna,anna"}, "more than 4 people"),
        ({"height": 9}, "multiple of"),
        ({"width": 1032}, "at most 1024"),
        ({"num_inference_steps": 101}, "at most 100"),
        ({"scheduler": "x"}, "one of"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"colour": "red"}, "no field of this name"),
        ({"prompt": "\ud800 {}"}, ""),
    ],
)
def test_what_is_wrong_with_rows_is_told_before_anything_is_drawn(client, server, changes, words):
    ended(client, learn(client, "anna"))
    body = json.dumps({"rows": [row("anna"), {**row("anna"), **changes}]})
    answer = client.post("/v1/images", content=body, headers={"Content-Type": "application/json"})
    told = answer.json()
    assert answer.status_code == 422 and told["errors"][0]["where"].startswith("rows[1]")
    assert words in told["errors"][0]["detail"]


def test_a_body_that_is_no_json_and_a_field_that_nobody_knows_are_told_as_such(client):
    for body, where, words in (
        (b"{rows: []}", "body", "this is no JSON (Expecting property name"),
        (b'{"rows": [{"identity": "anna", "prompt": "{}", "sede": 1}]}', "rows[0].sede", "known"),
    ):
        answer = client.post(
            "/v1/images", content=body, headers={"Content-Type": "application/json"}
        )
        (error,) = answer.json()["errors"]
        assert answer.status_code == 422 and error["where"] == where and words in error["detail"]


def test_no_answer_names_a_flag_of_the_command_line(client, server, monkeypatch, tmp_path):
    """Whoever uses the page or the routes cannot type one; not in the descriptions either."""
    ended(client, learn(client, "anna"))
    cfg, file = server.service.cfg, tmp_path / "train.yaml"
    file.write_text("lr_warmup_steps: 10\n")
    changes = {"eta": 0.5, "guidance_interval": [0.2, 0.9], "train_config": str(file)}
    before = {name: getattr(cfg, name) for name in changes}
    heic = b"\0\0\0\x18ftypheic" + bytes(99)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    wrong = [
        {"scheduler": "euler"},  # which has no use for eta
        {"num_inference_steps": 1},  # of which none is guided
        {"negative_prompt": f"a {NOBODY}"},
        {"negative_prompt": "blurred", "guidance_scale": 1.0},
        {"width": 33},
        {"width": 1032},
        {"identity": "carl"},
        {"prompt": "nobody"},
    ]
    refused = [{"rows": [row("anna") | one]} for one in wrong]
    refused += [{"rows": []}, {"rows": [row("anna")] * 65}, {"colour": "red"}]
    try:
        for name, value in changes.items():
            object.__setattr__(cfg, name, value)
        answers = [client.post("/v1/images", json=one) for one in refused]
        answers += [
            learn(client, "bert", [photo()] * 25),
            learn(client, "bert", steps=5),  # all of them of warming up
            learn(client, "bert", steps=321),
            client.post("/v1/images", content=bytes(2_000_001)),
            client.get("/v1/info", headers={"Host": "elsewhere.example"}),
            client.get("/v1/identities/anna/export?to=word"),
            client.post("/v1/info"),
        ]
    finally:
        for name, value in before.items():
            object.__setattr__(cfg, name, value)
    assert all(400 <= answer.status_code < 500 for answer in answers), answers
    told = [answer.text for answer in answers]
    # One after the other: a name that is being learned is taken.
    for sent, choice in ((None, {"faces": "[7]"}), ([heic], {})):
        told.append(str(ended(client, learn(client, "bert", sent, **choice))))
    assert "has no face 7" in told[-2] and "convert it to JPEG" in told[-1]
    monkeypatch.setattr(photos, "MEGA", 60)  # so that forty of these are less than a photo has
    files = [("photos", ("a", data)) for data in (heic, photo())]
    told.append(client.post("/v1/faces", files=files).text)
    assert "HEIC" in told[-1] and "megapixels" in told[-1]
    told += [client.get(path).text for path in ("/docs", "/openapi.json", "/v1/info")]
    pages = (path for path in STUDIO.iterdir() if path.suffix in (".html", ".js"))
    told += [path.read_text("utf-8") for path in pages]
    assert [text for text in told if re.search(r"--[a-z]{3}", text)] == []


def test_numbers_with_which_nothing_finite_is_drawn_are_the_clients_fault(client):
    ended(client, learn(client, "anna"))
    answer = draw(client, row("anna"), row("anna", guidance_scale=1e38))
    told = answer.json()
    assert answer.status_code == 422 and told["errors"][0]["where"] == "rows[1]"
    assert "smaller guidance_scale" in told["detail"]
    assert draw(client, row("anna")).status_code == 200


def test_a_taken_name_and_an_unusable_photo_cost_nobody_anything(client):
    ended(client, learn(client, "anna"))
    before = client.get("/v1/identities/anna").json()["sha256"]
    assert learn(client, "anna").status_code == 409
    cut = photo(3, kind="JPEG")[:400]
    job = ended(client, learn(client, "anna", [cut], replace="true"))
    assert job["state"] == "failed" and "photo 1 is cut off" in job["problem"]["detail"]
    assert client.get("/v1/identities/anna").json()["sha256"] == before
    replaced = ended(client, learn(client, "anna", [photo(9)], replace="true", seed=1))
    assert replaced["state"] == "done"
    assert client.get("/v1/identities/anna").json()["sha256"] != before


def test_a_name_that_waits_to_be_learned_is_taken(client, server, monkeypatch):
    school, may_look = server.service.school, threading.Event()
    look = school.look
    monkeypatch.setattr(school, "look", lambda pupil: may_look.wait(60) and look(pupil))
    first, second = learn(client, "anna"), learn(client, "anna", [photo(9)])
    cancelled = learn(client, "bea")
    client.delete(f"/v1/jobs/{cancelled.json()['id']}")
    again = learn(client, "bea")
    may_look.set()
    assert second.status_code == 409 and "being learned" in second.json()["detail"]
    assert ended(client, first)["state"] == ended(client, again)["state"] == "done"


def test_an_exported_person_is_one_zip_file(client):
    ended(client, learn(client, "anna"))
    answer = client.get("/v1/identities/anna/export?to=diffusers&to=a1111")
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as file:
        names = file.namelist()
    assert "anna/identity.json" in names and "anna/README.md" in names
    assert client.get("/v1/identities/anna/export?to=word").status_code == 422


def test_an_export_writes_nothing_beside_the_servers_folder(client, server, monkeypatch):
    ended(client, learn(client, "anna"))
    covered(client, "anna")
    shelf, seen = server.service.shelf, []
    exported = service.exporting.export

    def export(asked):
        seen.append(Path(asked.out))
        return exported(asked)

    monkeypatch.setattr(service.exporting, "export", export)
    assert client.get("/v1/identities/anna/export").status_code == 200
    (out,) = seen
    # Where the next start deletes it, if the server is killed meanwhile.
    assert out.parent.parent == shelf.folder and out.parent.name.startswith(".tmp-")
    assert not out.parent.exists()


def test_a_full_line_says_when_to_come_back_and_who_waits_too_long_is_told(client, server):
    """While the thread is busy: two requests have room, a third has not; then they wait in vain."""
    ended(client, learn(client, "anna"))
    covered(client, "anna")
    service, free = server.service, threading.Event()
    service.painter.errand(free.wait)
    before = service.line.most, service.line.deadline
    answers = []
    try:
        service.line.most = 4
        asked = {"rows": [row("anna", number=n) for n in range(2)]}
        threads = [
            threading.Thread(
                target=lambda: answers.append(server.client().post("/v1/images", json=asked))
            )
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + serving.PATIENCE
        while service.line.waiting() < 4:
            assert time.monotonic() < until
            time.sleep(0.01)
        refused = client.post("/v1/images", json=asked)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        service.line.deadline = 0.0
    finally:
        free.set()
        for thread in threads:
            thread.join()
        service.line.most, service.line.deadline = before
    assert [answer.status_code for answer in answers] == [429, 429]
    assert all("retry-after" in answer.headers for answer in answers)
    assert client.post("/v1/images", json=asked).status_code == 200


def test_the_first_of_a_kind_are_told_of_the_compiling_which_goes_on(client, server, monkeypatch):
    """Also where it takes longer than anybody may wait; then the same request is answered."""
    ended(client, learn(client, "anna"))
    covered(client, "anna")
    service, may_compile = server.service, threading.Event()
    make, before = service.painter.compile, service.line.deadline
    compile_late = lambda kind: may_compile.wait() and make(kind)  # noqa: E731
    monkeypatch.setattr(service.painter, "compile", compile_late)
    monkeypatch.setattr(service.line, "deadline", 0.3)
    fresh, asked = row("anna", width=40), {"rows": [row("anna", width=40)], "stream": True}
    try:
        late = draw(client, fresh)
        with client.stream("POST", "/v1/images", json=asked) as stream:
            heard = list(events(stream.iter_lines()))
        # Whoever needs another program is drawn meanwhile.
        monkeypatch.setattr(service.line, "deadline", before)
        assert draw(client, row("anna")).status_code == 200
    finally:
        may_compile.set()
    told = late.json()
    assert (late.status_code, told["type"]) == (503, "urn:idea_jax:compiling")
    assert "pictures of 40 x 32 in 2 steps of ddim" in told["detail"]
    assert 1 <= int(late.headers["retry-after"]) <= 600
    progress = [(about["state"], about["stage"]) for name, about in heard if name == "progress"]
    assert ("queued", "compiling") in progress and heard[-1][0] == "error"
    assert draw(client, fresh).status_code == 200


def test_rows_of_a_client_that_has_gone_are_not_drawn(client, server):
    ended(client, learn(client, "anna"))
    covered(client, "anna")
    service, free = server.service, threading.Event()
    for stream in (False, True):
        free.clear()
        service.painter.errand(free.wait)
        asked = {"rows": [row("anna", number=n) for n in range(8)], "stream": stream}
        before = service.meters.rows
        with pytest.raises(httpx.TimeoutException):
            client.post("/v1/images", json=asked, timeout=0.5)
        until = time.monotonic() + serving.PATIENCE
        while service.line.waiting():
            assert time.monotonic() < until
            time.sleep(0.01)
        free.set()
        service.painter.errand(lambda: None).result()
        assert service.meters.rows == before
        assert client.get("/v1/jobs").json()["jobs"][0]["state"] == "cancelled"


def test_a_job_can_be_cancelled_and_leaves_nothing(client, server):
    service, free = server.service, threading.Event()
    service.painter.errand(free.wait)
    answer = learn(client, "anna", steps=2)
    job = client.delete(answer.headers["location"]).json()
    assert job["state"] == "cancelled"
    free.set()
    service.painter.errand(lambda: None).result()
    assert ended(client, answer)["state"] == "cancelled"
    assert client.get("/v1/identities").json()["identities"] == []
    assert list(service.shelf.folder.iterdir()) == []


@pytest.mark.parametrize("stage", ["waiting", "writing"])
def test_deleting_somebody_who_is_still_learned_ends_the_learning(
    client, server, monkeypatch, stage
):
    """Nobody turns up afterwards, not even where the files are being written already; and nothing
    else waits for it, such as the forms of others."""
    service, begun, free = server.service, threading.Event(), threading.Event()
    write, names = Lesson.write, ("anna", "bert")

    def write_late(self, *about):
        begun.set()
        free.wait()
        write(self, *about)

    if stage == "waiting":
        service.painter.errand(free.wait)
        begun.set()
    monkeypatch.setattr(Lesson, "write", write_late)
    jobs = [learn(client, name, keep_photos="true").json()["id"] for name in names]
    tasks = [service.tasks.get(job) for job in jobs]
    told = []

    def delete(name):
        with server.client() as own:
            told.append(own.delete(f"/v1/identities/{name}"))

    deleting = [threading.Thread(target=delete, args=(name,)) for name in (*names, "anna")]
    try:
        assert begun.wait(serving.PATIENCE)
        for thread in deleting:
            thread.start()
        until = time.monotonic() + serving.PATIENCE
        while not all(task.has_ended for task in tasks):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert learn(client, "carl", consent="no").status_code == 422
    finally:
        free.set()
    for thread in deleting:
        thread.join()
    assert sorted(answer.status_code for answer in told) == [200, 200, 404]
    for about in (answer.json() for answer in told if answer.status_code == 200):
        assert about["files"] == [] and about["was_being_learned"]
        assert set(about["jobs"]) & set(jobs)
    assert all(client.get(f"/v1/jobs/{job}").status_code == 404 for job in jobs)
    assert list(service.shelf.folder.iterdir()) == [] and service.painter.learning() == 0
    assert client.get("/v1/identities").json()["identities"] == []
    assert client.delete("/v1/identities/anna").status_code == 404
    assert ended(client, learn(client, "anna"))["state"] == "done"  # the name is free


def test_drawing_and_learning_share_the_thread():
    """Calls and steps take turns, and somebody who needs no step is not kept waiting by many."""
    happened, line = [], Line(100, 60.0)

    class Artist:
        sizes, texts = (1,), SimpleNamespace(people={})

        def launch(self, rows, size):
            time.sleep(0.01)
            happened.append("call")
            return engine.Call(np.zeros((1, 8, 8, 3), np.float32), 1)

    class Course:
        steps = 0

        def course(self, steps, photos):
            return SimpleNamespace(work=SimpleNamespace(shape=Shape(1, 1, 8)))

        def begin(self, pupil, seen, folder):
            def steps():
                for _ in range(pupil.steps):
                    time.sleep(0.01)
                    happened.append("step")
                    yield

            return SimpleNamespace(
                steps=steps, taken=0, loss=0.0, is_shown=lambda _: False, close=lambda: None
            )

    school = Course()
    delivered = []
    deliver = lambda row, picture: delivered.append(row)  # noqa: E731
    painter = Painter(Artist(), line, school, deliver, None, 1, lambda *_: None)
    painter.compiler.ready |= {"kind", (30, 1)}
    job = SimpleNamespace(row=SimpleNamespace(cast=()), about={"identities": []})
    rows = [(job, "kind")] * 30
    line.put(Ticket(rows, lambda event: None, None))
    seen = SimpleNamespace(pictures=[0])
    finish = lambda one, _: happened.append(one.pupil.name) or one.pupil.name  # noqa: E731
    tasks = []
    for name, steps in (("long", 30), ("quick", 0)):
        tasks.append(Task("learn", steps, name))
        pupil = SimpleNamespace(name=name, steps=steps)
        make = lambda: Path(tempfile.mkdtemp())  # noqa: E731
        painter.enroll(Enrolled(tasks[-1], pupil, seen, None, make, finish))
    painter.start()
    until = time.monotonic() + serving.PATIENCE
    while not all(task.has_ended for task in tasks) or len(delivered) < 30:
        assert time.monotonic() < until
        time.sleep(0.01)
    painter.stop()
    assert [task.values["state"] for task in tasks] == ["done", "done"]
    assert happened.index("quick") < happened.index("long")
    half = happened[: len(happened) // 2]
    assert half.count("call") > 5 and half.count("step") > 5


def test_the_log_has_no_prompts_unless_they_are_asked_for(client, server, caplog):
    ended(client, learn(client, "anna"))
    caplog.set_level(logging.DEBUG)
    for is_asked in (False, True):
        caplog.clear()
        object.__setattr__(server.service.cfg, "log_prompts", is_asked)
        prompt = "xylophone {} violet"
        assert draw(client, row("anna", prompt)).status_code == 200
        draw(client, row("anna", "xylophone, but nobody"))
        written = caplog.text
        assert "POST /v1/images 200" in written
        assert ("xylophone" in written) is is_asked
        assert "anna" not in written.replace(prompt, "")


def test_what_prometheus_reads_says_what_has_happened(client, server):
    ended(client, learn(client, "anna"))
    draw(client, row("anna"), row("anna", number=1))
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["idea_rows_total"]) == server.service.meters.rows > 0
    assert float(values["idea_people"]) == 1 and float(values["idea_queue_rows"]) == 0
    assert float(values["idea_compiles_total"]) > 0 and float(values["idea_memory_bytes"]) > 1e6
    drawn = 'method="POST",route="/v1/images"'
    assert float(values[f'idea_requests_total{{{drawn},status="200"}}']) >= 1
    assert values[f"idea_request_seconds_count{{{drawn}}}"] >= "1"
    kinds = {line.split()[2]: line.split()[3] for line in text.splitlines() if "# TYPE" in line}
    assert kinds["idea_call_seconds"] == "histogram" and kinds["idea_people"] == "gauge"


def test_the_page_of_routes_needs_nothing_from_elsewhere(client):
    page = client.get("/docs").text
    assert "/v1/images" in page and "src=" not in page and "http" not in page
    described = client.get("/openapi.json").json()
    assert {"/v1/identities", "/v1/images", "/v1/jobs/{key}"} <= set(described["paths"])
    assert client.get("/studio/../settings.py").status_code == 404
    info = client.get("/v1/info").json()
    assert info["has_enhancer"] and info["defaults"]["num_inference_steps"] == 2
