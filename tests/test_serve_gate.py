"""What `idea-serve` lets in and keeps: hosts, origins, tokens, sizes, photos, folders, the line."""

import asyncio
import io
import json
import os
import socket
import stat
import struct
import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import serving
import uvicorn
from PIL import Image

from idea_jax.config.settings import ConfigError
from idea_jax.data import images
from idea_jax.faces.models import FaceError
from idea_jax.formats.identity import Identity, IdentityError, write_identity
from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.runtime.files import cannot_write
from idea_jax.serve import gate, metrics, run, tasks
from idea_jax.serve.album import Album
from idea_jax.serve.compiling import Compiler
from idea_jax.serve.gate import Gate, Keys
from idea_jax.serve.line import Line, Ticket
from idea_jax.serve.metrics import Meters
from idea_jax.serve.painter import as_problem
from idea_jax.serve.photos import uploads
from idea_jax.serve.problems import HttpProblem
from idea_jax.serve.school import School
from idea_jax.serve.settings import TOKEN, ServeConfig, read_token
from idea_jax.serve.shelf import PEOPLE, Shelf
from idea_jax.serve.tasks import Tasks

MINI = {"pretrained_model_name_or_path": "mini"}


@pytest.fixture(scope="module")
def meters():
    made = Meters()
    yield made
    made.close()


@pytest.fixture
def ask(meters):
    """Sends a request through the gate; returns the status, headers and body of the answer."""

    def ask(path="/v1/info", method="GET", token=None, body=b"", cfg=None, **headers):
        reached = []

        async def app(scope, receive, send):
            while (message := await receive()).get("more_body"):
                pass
            assert message["type"] == "http.request"
            reached.append(scope["path"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok"})

        sent, parts = [], [body] if isinstance(body, bytes) else list(body)

        async def receive():
            if not parts:
                await asyncio.sleep(3600)
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts)}

        async def send(message):
            sent.append(message)

        made = Gate(app, cfg or ServeConfig(**MINI), Keys(token), meters)
        pairs = {"host": "127.0.0.1:8765"} | {k.replace("_", "-"): v for k, v in headers.items()}
        scope = {
            "type": "http",
            "path": path,
            "method": method,
            "scheme": "http",
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in pairs.items()],
        }
        asyncio.run(made(scope, receive, send))
        body = b"".join(message.get("body", b"") for message in sent)
        assert (sent[0]["status"] == 200) == bool(reached)
        return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, body

    return ask


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8765", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:8765", 200),
        ("[::1]:8765", 200),
        ("192.168.1.7", 200),
        ("ours.example:8765", 200),
        ("evil.example:8765", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)
def test_only_hosts_that_no_other_site_can_be_called_are_answered(ask, host, status):
    cfg = ServeConfig(**MINI, allowed_hosts=["ours.example"])
    assert ask(host=host, cfg=cfg)[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:8765"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "no-cors"}, 403),
        ({"sec_fetch_site": "same-site", "sec_fetch_mode": "navigate", "method": "POST"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(ask, headers, status):
    """But for a link that leads here, which reads nothing back."""
    assert ask(**headers)[0] == status


def test_the_token_opens_and_nothing_else_does(ask):
    key = "a token that is long enough"
    status, headers, body = ask(token=key)
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert json.loads(body)["type"] == "urn:idea_jax:unauthorised" and key not in str(body)
    assert ask(token=key, authorization=f"Bearer {key}")[0] == 200
    assert ask(token=key, authorization=f"bearer {key}")[0] == 200
    for wrong in (f"Bearer {key}x", f"Basic {key}", key, "Bearer ", "Bearer \xff"):
        assert ask(token=key, authorization=wrong)[0] == 401
    assert ask(token=key, cookie=f"{gate.COOKIE}={key}")[0] == 401
    for path in ("/healthz", "/readyz", "/v1/session", "/studio/x.js", "/"):
        assert ask(path, token=key)[0] == 200
    for path in ("/metrics", "/docs", "/openapi.json", "/v1/identities", "/studio"):
        assert ask(path, token=key)[0] == 401


def test_a_body_that_is_too_large_or_too_slow_is_refused(ask, monkeypatch):
    """By what it says of itself, and by what comes."""
    cfg = ServeConfig(**MINI, max_body_megabytes=3)
    large = {"cfg": cfg, "method": "POST"}
    for path, most in (("/v1/images", 2_000_000), ("/v1/faces", 3_000_000)):
        assert ask(path, body=[bytes(most - 1), b"x"], **large)[0] == 200
        status, headers, body = ask(path, body=[bytes(most), b"x"], **large)
        assert status == 413 and headers["connection"] == "close" and str(most).encode() in body
        assert ask(path, content_length=str(most + 1), **large)[0] == 413
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.05)
    assert ask(body=[], **large)[0] == 408


def test_a_connection_too_many_is_told_so(meters):
    async def app(scope, receive, send):
        raise AssertionError("nobody is let in")

    sent, scope = [], {"type": "http", "method": "GET", "path": "/healthz", "headers": []}

    async def send(message):
        sent.append(message)

    cfg = ServeConfig(**MINI)
    made = Gate(app, cfg, Keys(None), meters, lambda: gate.CONNECTIONS + 1)
    asyncio.run(made(scope, None, send))
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == 429 and int(headers[b"retry-after"]) > 0
    assert json.loads(sent[1]["body"])["type"] == "urn:idea_jax:too-busy"


def test_connections_without_a_whole_request_are_closed(monkeypatch):
    """Many of them would keep everybody out. Whoever waits for an answer stays."""
    monkeypatch.setattr(run, "HEADER_SECONDS", serving.PATIENCE)
    is_released = threading.Event()

    async def app(scope, receive, send):
        while scope["path"] == "/slow" and not is_released.is_set():
            await asyncio.sleep(0.02)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_keep_alive=600)
    service = SimpleNamespace(
        refuse=lambda: None, finish=lambda seconds: None, cfg=SimpleNamespace(grace=1.0)
    )
    server = run.server_of(uvicorn, config, service)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    head, connections = b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n", {}
    try:
        for name in ("silent", "half", "second half", "slow"):
            connections[name] = socket.create_connection(listener.getsockname(), 60)
        connections["slow"].sendall(head % b"/slow")
        connections["second half"].sendall(head % b"/")
        assert connections["second half"].recv(1000).startswith(b"HTTP/1.1 204")
        for name in ("half", "second half"):
            connections[name].sendall(head[:20])
        monkeypatch.setattr(run, "HEADER_SECONDS", 0.5)
        for name in ("silent", "half", "second half"):
            assert connections[name].recv(1000) == b"", name
        is_released.set()
        assert connections["slow"].recv(1000).startswith(b"HTTP/1.1 204")
    finally:
        is_released.set()
        server.should_exit = True
        for connection in connections.values():
            connection.close()
        thread.join(serving.PATIENCE)
    assert not thread.is_alive()


def test_who_asks_again_and_again_is_not_late(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    busy, idle = (type("Connection", (), {"cycle": None})() for _ in range(2))
    late, closed = run.Late(), []
    for _ in range(30):
        now[0] += 1.0
        busy.cycle = SimpleNamespace(response_complete=True)
        closed.append(late.among([busy, idle]))
    before = round(run.HEADER_SECONDS) + 1
    assert closed == [[]] * before + [[idle]] * (30 - before)
    assert late.among([]) == [] and not late.waiting


def test_every_answer_says_what_browsers_may_do_with_it(ask):
    _, headers, _ = ask()
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "server.example"])
def test_without_a_token_only_loopback_is_served(host, monkeypatch, tmp_path):
    monkeypatch.delenv(TOKEN, raising=False)
    cfg = ServeConfig(**MINI, host=host)
    with pytest.raises(ConfigError, match="can be reached from elsewhere"):
        read_token(cfg)
    for local in ("127.0.0.1", "::1", "localhost"):
        assert read_token(ServeConfig(**MINI, host=local)) is None
    monkeypatch.setenv(TOKEN, "0123456789abcdef")
    assert read_token(cfg) == "0123456789abcdef"
    (tmp_path / "token").write_text("fedcba9876543210\n")
    from_file = ServeConfig(**MINI, host=host, token_file=str(tmp_path / "token"))
    assert read_token(from_file) == "fedcba9876543210"
    monkeypatch.setenv(TOKEN, "short")
    with pytest.raises(ConfigError, match="at least 16"):
        read_token(cfg)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(ServeConfig(**MINI, host=host, token_file=str(tmp_path / "absent")))


def bomb():
    """A PNG of few bytes that says it has 10^10 pixels."""
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def test_photos_are_decoded_within_limits_and_kept_as_pixels_alone():
    cfg = ServeConfig(**MINI, max_photo_megapixels=1)
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", 6  # turned by 90 degrees
    image = Image.fromarray(np.zeros((40, 60, 3), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, comment=b"somewhere")
    good, huge, large = uploads(
        cfg, [buffer.getvalue(), bomb(), serving.photo(side=1001)], [None, None, None]
    )
    assert good.read().size == (40, 60)
    with Image.open(io.BytesIO(good.kept())) as kept:
        assert (kept.format, kept.size) == ("JPEG", (40, 60)) and len(kept.getexif()) == 0
    assert b"camera" not in good.kept() and b"somewhere" not in good.kept()
    for photo in (huge, large):
        with pytest.raises(images.ImageError, match="scale it down"):
            photo.read()


@pytest.fixture(scope="module")
def model(smallest_checkpoint):
    return sd.read_configs(smallest_checkpoint, "float32")


def person(number):
    method = condition.make_method("cross_init")
    tokens = np.random.default_rng(number).normal(size=(2, 8)).astype(np.float32)
    given = {"anchor": tokens}
    return Identity(method, {"pseudo_tokens": tokens}, given, "<x>", "smallest", None, 0, 1)


def add(shelf, name, number=0, replace=False):
    made = shelf.new_folder()
    write_identity(made / "identity.safetensors", person(number))
    return shelf.put(name, made, replace)


def test_the_shelf_is_the_same_after_a_restart_and_mends_what_a_kill_left(model, tmp_path):
    shelf = Shelf(tmp_path, model, None)
    first, second = add(shelf, "anna"), add(shelf, "bert", 1)
    with pytest.raises(HttpProblem, match="here already"):
        add(shelf, "anna", 2)
    assert add(shelf, "anna", 2, replace=True).sha256 != first.sha256
    expected = [one.as_dict() for one in shelf.all()]
    assert stat.S_IMODE(os.stat(tmp_path / PEOPLE).st_mode) == 0o700
    people = tmp_path / PEOPLE
    # Killed between the two renames of a replacement, while somebody was written, while deleting.
    (people / "bert").rename(people / ".old-bert")
    write_identity(people / ".tmp-x" / "identity.safetensors", person(3))
    (people / "anna" / ".tmp-cover.png").write_bytes(b"half")
    # And what the server never wrote.
    (people / "Some Folder").mkdir()
    (people / "broken").mkdir()
    (people / "broken" / "identity.safetensors").write_bytes(b"half a file")
    again = Shelf(tmp_path, model, None)
    assert [one.as_dict() for one in again.all()] == expected
    assert again.get("bert").sha256 == second.sha256
    left = sorted(path.name for path in people.iterdir())
    assert left == ["Some Folder", "anna", "bert", "broken"]
    # Whoever cannot be used is deleted all the same, and nothing that is no name of a person.
    assert again.has("broken") and not again.has("../people") and not again.has("none")
    files, hidden = again.hide("broken")
    assert files == ["people/broken/identity.safetensors"]
    assert again.hide("broken") == (files, hidden)  # once more, where the deletion has failed
    for name in ("../people", str(tmp_path), "Some Folder", ".", ""):
        with pytest.raises(HttpProblem, match="nobody of this name"):
            again.hide(name)
    # Killed while they are deleted: the next start deletes the rest, of theirs and of nobody else.
    gone = []
    (people / ".gone-x" / "bert").mkdir(parents=True)  # learned anew since
    assert sorted(Shelf(tmp_path, model, None, gone.append).residents) == ["anna", "bert"]
    assert gone == ["broken"] and not hidden.exists() and not (people / ".gone-x").exists()
    # Killed after both renames: the new one counts.
    (people / ".old-bert").mkdir()
    assert sorted(Shelf(tmp_path, model, None).residents) == ["anna", "bert"]
    assert not (people / ".old-bert").exists()


def test_the_album_keeps_whole_pictures_and_no_more_than_it_may(tmp_path):
    album = Album(tmp_path, 3)
    about = {"type": "image/png", "about": {"people": ["anna"]}}
    told = [album.keep(bytes([number]), about) for number in range(4)]
    assert [one["id"] for one in album.listed(None, 9, None)] == [one["id"] for one in told[:0:-1]]
    # A picture without a description, a description without a picture, and one that is no JSON.
    (album.folder / f"{'0' * 32}.png").write_bytes(b"x")
    (album.folder / f"{'1' * 32}.json").write_text(json.dumps(about))
    (album.folder / f"{told[3]['id']}.json").write_text("{")
    (album.folder / ".tmp-a_b1.json").write_text("")
    # Files of others, as where --data is a folder in which somebody drew: they are left alone.
    others = [
        album.folder / name for name in ("run.json", "0.png", f"{'0' * 31}.png", "index.jsonl")
    ]
    for path in others:
        path.write_text("{}")
    again = Album(tmp_path, 3)
    assert sorted(again.about) == [told[1]["id"], told[2]["id"]]
    assert len(list(album.folder.iterdir())) == 4 + len(others)
    path, kind = again.get(told[1]["id"])
    assert (path.read_bytes(), kind) == (b"\1", "image/png")
    assert len(again.remove_of("anna")) == 4
    assert sorted(album.folder.iterdir()) == sorted(others)


def test_settings_of_learning_that_a_server_would_not_read_are_refused(tmp_path):
    file = tmp_path / "train.yaml"
    cfg = ServeConfig(**MINI, train_config=str(file))
    sights = SimpleNamespace(finder=SimpleNamespace(detector=None))
    school = School(cfg, SimpleNamespace(name="x"), None, None, None, sights)
    file.write_text("learning_rate: 0.25\npretrained_model_name_or_path: mini\n")
    settings = school.settings(3, 7, "anna")
    assert (settings.learning_rate, settings.max_train_steps, settings.seed) == (0.25, 3, 7)
    file.write_text("mesh: auto\n")
    with pytest.raises(ConfigError, match="mesh in --train_config .* has no effect"):
        school.settings(3, 7, "anna")
    with pytest.raises(HttpProblem, match="at least 1"):
        school.check(0)
    school.courses = {(steps, 1): None for steps in range(1, cfg.max_learn_programs + 1)}
    school.check(2)
    with pytest.raises(HttpProblem, match="take one of these"):
        school.check(320)


def rows(*programs):
    job = SimpleNamespace(row=SimpleNamespace(cast=("anna",)))
    return [(job, program) for program in programs]


def ticket(heard, *programs):
    return Ticket(rows(*programs), heard.append, None)


def test_calls_have_rows_of_one_program_and_requests_take_turns():
    line = Line(100, 60.0)
    large, small, other = (
        ticket([], *"aaaaa"),
        ticket([], "a"),
        ticket([], "b"),
    )
    for one in (large, small, other):
        line.put(one)
    assert line.ahead_of(other) == 6
    taken = []
    while line.waiting():
        found, size = line.take(lambda count: min(2, count), lambda row: True)
        assert len({row.kind for row in found}) == 1 and len(found) == size
        taken.append([row.ticket for row in found])
    assert taken[0] == [large, small] and taken[1] == [other]
    assert taken[2:] == [[large, large], [large, large]]
    # What is not compiled yet lets others go first.
    line.put(ticket([], "slow"))
    line.put(small := ticket([], "a"))
    found, _ = line.take(lambda count: 2, lambda row: row.kind != "slow")
    assert [row.ticket for row in found] == [small] and line.waiting() == 1


def test_the_line_is_bounded_in_number_and_time_and_can_be_left():
    heard, line = [], Line(4, 60.0)
    waiting, gone = ticket(heard, *"aaa"), ticket([], "a")
    line.put(waiting)
    line.put(gone)
    with pytest.raises(HttpProblem) as refused:
        line.put(ticket([], "a"))
    assert refused.value.status == 429 and refused.value.retry_after >= 1
    assert line.cancel(gone) and not line.cancel(gone) and line.waiting() == 3
    line.deadline = 0.0
    time.sleep(0.01)
    assert line.take(lambda count: 2, lambda row: True) == ([], 0)
    assert heard[0][1].status == 429
    # Who has begun is not sent away any more, and who has not is, once the server stops.
    begun, late = ticket(heard, "a", "a"), ticket(heard, "a")
    line.deadline = 60.0
    line.put(begun)
    (row,), _ = line.take(lambda count: 1, lambda row: True)
    line.put(late)
    line.deadline = 0.0
    line.stop()
    assert late.is_closed and heard[-1][1].status == 503 and not begun.is_closed
    assert line.take(lambda count: 1, lambda row: True)[0][0].ticket is begun
    row.ticket.deliver(0, lambda: "picture")
    assert heard[-1] == ("picture", 0, "picture")
    with pytest.raises(HttpProblem) as refused:
        line.put(ticket([], "a"))
    assert refused.value.status == 503


def test_what_compiling_takes_yet_is_told_by_what_others_took():
    compiler, first, second = Compiler(), threading.Event(), threading.Event()
    compiler.usual = 20.0
    assert not compiler.has("a", first.wait) and not compiler.has("b", second.wait)
    one, both = compiler.seconds_left("a"), compiler.seconds_left("b")
    assert 19 < one <= 20 and 39 < both <= 40 and compiler.seconds_left("c") is None
    while "a" not in compiler.began:
        time.sleep(0.001)
    compiler.began["a"] -= 100  # longer than usual
    assert 50 <= compiler.seconds_left("a") < 55
    first.set()
    compiler.under_way["a"].result()
    assert 100 <= compiler.usual < 110 and compiler.seconds_left("a") is None
    assert compiler.has("a", None) and not compiler.has("b", None)
    second.set()
    compiler.close()


def test_who_waits_too_long_is_told_what_keeps_them():
    """The program, if each of their rows waits for one; else the others."""
    heard, line = [], Line(9, 0.0)
    reason = HttpProblem("compiling", "wait", retry_after=7)
    line.why_late = lambda kind: reason if kind == "new" else None
    for kinds, code in (("new", "compiling"), ("old", "too-busy"), (("new", "old"), "too-busy")):
        line.put(ticket(heard, *([kinds] if isinstance(kinds, str) else kinds)))
        time.sleep(0.001)
        line.expire()
        assert heard.pop()[1].code == code and line.waiting() == 0


def test_nothing_is_made_of_a_picture_that_nobody_waits_for():
    made, one = [], ticket([], "a")
    one.close()
    one.deliver(0, lambda: made.append(1))
    assert made == []


def test_counts_have_all_of_their_digits_and_calls_are_forgotten_though_nobody_asks(monkeypatch):
    meters = Meters()
    meters.close()
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    for _ in range(200):
        now[0] += 1.0
        meters.called(0.5, 61_729)
    text = meters.text({"memory_bytes": ("resident", 1234567891.0), "share": ("of it", 0.125)})
    lines = text.splitlines()
    assert len(meters.recent) == metrics.WINDOW + 1
    assert "idea_rows_total 12345800" in lines and "idea_memory_bytes 1234567891" in lines
    assert "idea_share 0.125" in lines


def test_jobs_that_have_ended_are_told_of_up_to_a_number():
    every = Tasks()
    running = every.add(tasks.Task("draw", 1))
    for _ in range(tasks.LISTED + 5):
        every.add(tasks.Task("learn", 0, "anna")).change(state="done")
    assert len(every.listed()) <= tasks.LISTED + 2 and running in every.listed()
    running.change(state="failed")
    running.change(state="done")
    assert running.as_dict()["state"] == "failed" and running.as_dict()["ended"]
    assert len(every.forget("anna")) >= tasks.LISTED and every.listed() == [running]


def test_a_job_is_cancelled_or_what_came_of_it_is_kept_and_never_both():
    kept, ended = tasks.Task("learn", 0, "anna"), tasks.Task("learn", 0, "bert")
    kept.settle()
    kept.cancel()
    kept.change(state="done")
    ended.cancel()
    with pytest.raises(HttpProblem, match="cancelled"):
        ended.settle()
    ended.fail(HttpProblem("internal", "what came of the cancelling"))
    assert [task.as_dict()["state"] for task in (kept, ended)] == ["done", "cancelled"]


def test_problems_say_what_is_wrong_and_not_where_the_server_keeps_it(tmp_path):
    path = tmp_path / "secret" / "file.onnx"
    for error, status, words in (
        (FaceError(f"the detector {path} cannot process it (E: 3/4)"), 422, "file.onnx cannot"),
        (IdentityError(f"{path} is damaged"), 422, "file.onnx is damaged"),
        (cannot_write(path, OSError(28, "No space left on device")), 500, "its disk"),
        (FileNotFoundError(2, "No such file", str(path)), 500, "No such file"),
        (ValueError("what somebody wrote in secret"), 500, "its log"),
    ):
        told = as_problem(error).as_dict()
        assert told["status"] == status and words in told["detail"] and "secret" not in str(told)
