"""`idea-serve` under requests that nobody means well, many at once, and signals."""

import base64
import collections
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import hypothesis
import numpy as np
import pytest
import schemathesis
import serving
from PIL import Image
from serving import ended, learn, row

from idea_jax.jobs import JobsError
from idea_jax.serve.run import run
from idea_jax.serve.settings import ServeConfig

THREADS = 25
EXAMPLES = 5  # of each route, meant well and not
# Kept open by names that never end, or with an answer that is not for a fuzzer.
HOSTILE = (
    "..",
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/secret",
    "anna%00.json",
    "a" * 5000,
    "anna/../bert",
    "\\..\\..\\x",
    "%ff%fe",
    "con",
    ".tmp-x",
    ".old-anna",
    "-",
    "💥",
)
BODIES = (
    b"",
    b"\xff\xfe{}",
    b"[" * 100_000,
    b'{"rows": ' + b"9" * 10_000 + b"}",
    b'{"rows": [{"identity": "anna", "prompt": "{}", "guidance_scale": 1e999}]}',
    b'{"rows": [{"identity": "anna", "prompt": "{}", "guidance_scale": NaN}]}',
    b'{"rows": [{"identity": "anna", "prompt": "{}", "seed": 1e400}]}',
    b"--x\r\nContent-Disposition: form-data; name=photos; filename=a\r\n\r\n\x00\r\n--x--\r\n",
    b"--x\r\nContent-Disposition: form-data\r\n\r\n\r\n--x--\r\n",
    b"--x\r\n" * 5000,
)
KINDS = (
    "application/json",
    "application/json; charset=utf-16",
    "multipart/form-data",
    "multipart/form-data; boundary=x",
    "multipart/form-data; boundary=x; charset=nonsense",
    "text/plain",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@pytest.fixture(scope="module")
def model(smallest_checkpoint, tmp_path_factory):
    return serving.checkpoint(smallest_checkpoint, tmp_path_factory.mktemp("model") / "smallest")


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    changes = {"max_queue": 64, "max_programs": 4, "max_side": 32, "max_inference_steps": 2}
    with serving.Running(model, tmp_path_factory.mktemp("served"), **changes) as running:
        with running.client() as client:
            assert ended(client, learn(client, "anna", keep_face="true"))["state"] == "done"
        yield running


class Watch:
    """What other threads than the test's change on the disk, besides below some folders."""

    def __init__(self, *folders):
        self.folders, self.found, self.is_on = [str(f) for f in folders], [], False
        self.own = threading.main_thread()
        sys.addaudithook(self._heard)

    def _heard(self, event, arguments):
        if not self.is_on or threading.current_thread() is self.own:
            return
        paths = []
        if event == "open":
            path, mode, flags = arguments
            is_writing = any(c in (mode or "") for c in "wax+") or (mode is None and flags & WRITES)
            paths = [path] if is_writing else []
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = arguments[:2]
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
            paths = arguments[:1]
        for path in paths:
            text = os.fsdecode(path) if isinstance(path, str | bytes) else ""
            if os.path.isabs(text) and not text.startswith(tuple(self.folders)):
                self.found.append((event, text))


def test_no_request_makes_a_mistake_of_the_server_or_a_file_elsewhere(server, tmp_path):
    """Every route, with what its description allows and with what it forbids; and hostile names."""
    data = server.service.shelf.folder.parent
    watch = Watch(data, "/proc", "/dev", os.environ["IDEA_JAX_TEST_CACHE"])
    with server.client() as client:
        described = client.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(described)
    answers = collections.Counter()

    def look(response):
        assert response.status_code < 500, (response.status_code, response.text[:500])
        if response.status_code >= 400:
            assert response.headers["content-type"] == ["application/problem+json"] or (
                response.headers["content-type"] == "application/problem+json"
            )
        answers[response.status_code] += 1

    settings = hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    watch.is_on = True
    try:
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in schemathesis.GenerationMode:

                @settings
                @hypothesis.given(case=operation.as_strategy(mode))
                def send(case):
                    look(case.call(base_url=server.url))

                try:
                    send()
                except hypothesis.errors.Unsatisfiable:
                    continue  # nothing is forbidden in a route without parameters
        with server.client() as client:
            for path, methods in described["paths"].items():
                for method in methods:
                    for name in HOSTILE if "{" in path else ():
                        own = path.replace("{name}", name).replace("{key}", name)
                        own = own.replace("{index}", "0").replace("{step}", "1")
                        look(client.request(method, own))
            for name in HOSTILE:
                look(client.post("/v1/images", json={"rows": [row(name)]}))
                look(learn(client, name))
                look(client.get(f"/studio/{name}"))
            for body in BODIES:
                for path in ("/v1/images", "/v1/session", "/v1/identities", "/v1/faces"):
                    for kind in KINDS:
                        look(client.post(path, content=body, headers={"Content-Type": kind}))
            assert client.get("/v1/identities/anna").status_code == 200
            assert client.post("/v1/images", json={"rows": [row("anna")]}).status_code == 200
    finally:
        watch.is_on = False
    assert watch.found == []
    assert {200, 404, 422} <= set(answers)


def pixels(told):
    """The picture of an answer."""
    with Image.open(io.BytesIO(base64.b64decode(told["data"]))) as image:
        return np.asarray(image.convert("RGB"), np.int16)


def storm(server, clients, seconds, rounding):
    """So many clients ask without a pause; returns how often each status came, and wrong answers.

    What is right is what one client alone is answered, to 2 of 255 where there is rounding.
    """
    rows = [row("anna", number=number) for number in range(8)]
    with server.client() as client:
        answer = client.post("/v1/images", json={"rows": rows}).json()
    right = answer["pictures"]
    seen, wrong, until = collections.Counter(), [], time.monotonic() + seconds

    def ask(number):
        with server.client() as client:
            while time.monotonic() < until:
                place = number % len(rows)
                number += 1
                try:
                    answer = client.post("/v1/images", json={"rows": [rows[place]]})
                except httpx.HTTPError as error:
                    wrong.append(repr(error))
                    continue
                seen[answer.status_code] += 1
                if answer.status_code == 200:
                    (told,) = answer.json()["pictures"]
                    is_right = told["sha256"] == right[place]["sha256"]
                    if not is_right and rounding:
                        is_right = abs(pixels(told) - pixels(right[place])).max() <= 2
                    if not is_right:
                        wrong.append(place)
                elif answer.status_code == 429:
                    assert int(answer.headers["retry-after"]) >= 1
                    time.sleep(0.2)
                else:
                    wrong.append(answer.text[:200])

    with ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(ask, number) for number in range(clients)]:
            future.result()
    return seen, wrong


def resident():
    """Bytes of this process's memory."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024


def weather(server, clients, seconds, rounding):
    """A storm after a shorter one: every answer is right or 429, and nothing is left of it."""
    storm(server, clients, seconds / 4, rounding)
    time.sleep(0.2)
    memory, before = resident(), threading.active_count()
    seen, wrong = storm(server, clients, seconds, rounding)
    assert wrong == [] and seen[200] > 0 and set(seen) <= {200, 429}, (seen, wrong[:5])
    assert server.service.line.waiting() == 0 and not server.service.line.tickets
    assert resident() - memory < 50e6
    # Of its pools, however many clients there are.
    assert threading.active_count() - before < THREADS
    return seen


def test_many_clients_at_once_are_answered_right_or_told_to_wait(server, rounding):
    server.service.line.most, before = 8, server.service.line.most
    try:
        seen = weather(server, 24, 2.0, rounding)
    finally:
        server.service.line.most = before
    assert seen[429] > 0


@pytest.mark.long
def test_two_hundred_clients_for_a_minute(tmp_path, rounding):
    """On the mini, as it is shipped."""
    changes = {"height": None, "width": None, "num_inference_steps": 4, "max_queue": 64}
    with serving.Running("mini", tmp_path / "served", **changes) as running:
        with running.client() as client:
            photo = Path(__file__).resolve().parent.parent / "idea_jax" / "mini" / "photo.png"
            assert ended(client, learn(client, "anna", [photo.read_bytes()]))["state"] == "done"
        seen = weather(running, 200, 60.0, rounding)
    print(dict(seen))


def listed(client):
    return client.get("/v1/identities").json()["identities"]


def test_a_server_that_is_killed_or_told_to_stop_loses_nobody(model, tmp_path):
    """Killed while people are learned and pictures drawn, started again: the same people, whole.

    Told to stop, it finishes what is under way, refuses the rest, and ends with its signal's code.
    """
    data, cache = tmp_path / "served", tmp_path / "cache"
    keep = {"rows": [row("one")], "keep": True}
    with serving.process(model, data, cache) as (running, client):
        for name in ("one", "two"):
            assert ended(client, learn(client, name))["state"] == "done"
        before = json.dumps(sorted((p["name"], p["sha256"]) for p in listed(client)))
        (kept,) = client.post("/v1/images", json=keep).json()["pictures"]
        for number in range(3):
            learn(client, f"late-{number}")
        with pytest.raises(httpx.TimeoutException):
            client.post("/v1/images", json={"rows": [row("one")] * 32, "keep": True}, timeout=0.1)
        running.send_signal(signal.SIGKILL)
        running.wait()
    said = running.errors.read_text()
    assert "ready" in said and not re.search(r"\b(two|late-)", said)  # the log names nobody
    people = {path.name for path in (data / "people").iterdir()}
    assert {"one", "two"} <= people
    with serving.process(model, data, cache) as (running, client):
        now = listed(client)
        old = sorted((p["name"], p["sha256"]) for p in now if not p["name"].startswith("late"))
        assert json.dumps(old) == before
        # Whoever else is here is whole: they can be drawn; and nothing half-made is left.
        names = [person["name"] for person in now]
        rows = [row(name) for name in names]
        assert client.post("/v1/images", json={"rows": rows}).status_code == 200
        assert sorted(path.name for path in (data / "people").iterdir()) == sorted(names)
        files = sorted(path.name for path in (data / "pictures").iterdir())
        pictures = client.get("/v1/pictures").json()["pictures"]
        assert len(files) == 2 * len(pictures)
        assert kept["id"] in [picture["id"] for picture in pictures]
        # A second server does not share the folder.
        second = ServeConfig(pretrained_model_name_or_path="mini", data=str(data), port=0)
        with pytest.raises(JobsError, match="another run is using"):
            run(second)
        with ThreadPoolExecutor(2) as pool:
            asked = {"rows": [row("one", number=n) for n in range(48)]}
            drawing = pool.submit(client.post, "/v1/images", json=asked)
            until = time.monotonic() + serving.PATIENCE
            newest = {"total": 0, "done": 0}
            while newest["total"] != 48 or not newest["done"]:
                newest = client.get("/v1/jobs").json()["jobs"][0]
                assert time.monotonic() < until and not drawing.done()
            running.send_signal(signal.SIGTERM)
            with pytest.raises(ConnectionRefusedError):  # who comes now, while that is finished
                while time.monotonic() < until:
                    socket.create_connection((client.base_url.host, client.base_url.port)).close()
            assert drawing.result().status_code == 200
        assert running.wait(serving.PATIENCE) == 128 + signal.SIGTERM
        assert "Traceback" not in running.errors.read_text()
