"""A server for tests: in a thread of this process, or as a process of its own."""

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import enhancers
import httpx2 as httpx
import jax
import numpy as np
import scrfd
import uvicorn
from PIL import Image

from idea_jax.serve.app import create_app
from idea_jax.serve.opening import open_service
from idea_jax.serve.settings import ServeConfig

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 600  # seconds, on a busy machine
TOKEN = "a token of the tests, which is long"
SMALL = {
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "scheduler": "ddim",
    "batch_size": 2,
    "height": 32,
    "width": 32,
    "learn_steps": 2,
    "compile_cache": "off",
    "warm_up": "none",
    "port": 0,
}


def checkpoint(smallest, folder):
    """A copy of the smallest checkpoint with an enhancer, and face models that see two faces."""
    enhancers.copy_with_one(smallest, folder)
    faces = [scrfd.face(200, 300, 160), scrfd.face(450, 300, 120)]
    scrfd.write_detector(folder / "face" / "detector.onnx", faces)
    return folder


def photo(number=0, side=64, kind="PNG", **save):
    """Bytes of a picture of noise."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((side, side))
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return buffer.getvalue()


class Running:
    """A server in threads of this process, on the first device.

    Attributes:
      service: what it works with.
      url: where it is.
    """

    def __init__(self, model, data, token=None, routers=(), **changes):
        values = SMALL | {"pretrained_model_name_or_path": str(model), "data": str(data)}
        self.service = open_service(ServeConfig(**values | changes), jax.devices()[:1])
        config = uvicorn.Config(
            create_app(self.service, token, routers),
            port=0,
            log_config=None,
            access_log=False,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()))

    def __enter__(self):
        self.before = set(threading.enumerate()) | {self.thread}
        self.thread.start()
        until = time.monotonic() + PATIENCE
        while not self.server.started:
            assert self.thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        (listener,) = self.server.servers[0].sockets
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert self.service.painter.is_ready.wait(PATIENCE)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        left = set(threading.enumerate()) - self.before
        until = time.monotonic() + 10
        while left and time.monotonic() < until:
            time.sleep(0.05)
            left = {t for t in left if t.is_alive() and not is_of_others(t)}
        assert left == set(), [thread.name for thread in left]

    def client(self, **given):
        """A client of it."""
        return httpx.Client(base_url=self.url, timeout=PATIENCE, **given)


def is_of_others(thread):
    """Whether a thread is not the server's: of tqdm, or of the loop that leads the browser.

    The server's own loop has waited for its threads when it has ended.
    """
    return thread.name == "tqdm_monitor" or thread.name.startswith("asyncio_")


def learn(client, name, photos=None, **fields):
    """Asks for somebody to be learned; returns the answer."""
    files = [("photos", (f"{n}.png", data)) for n, data in enumerate(photos or [photo()])]
    data = {"name": name, "consent": "true", "preview": "false"} | fields
    return client.post("/v1/identities", data=data, files=files)


def ended(client, answer):
    """Waits until the job of an answer has ended; returns it."""
    assert answer.status_code == 202, answer.text
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        job = client.get(answer.headers["location"]).json()
        if job["state"] in ("done", "failed", "cancelled"):
            return job
        time.sleep(0.02)
    raise AssertionError(job)


def row(identity, prompt="a photo of {}", **changes):
    """A row of a request."""
    return {"identity": identity, "prompt": prompt, **changes}


def events(lines):
    """(name, value) of server-sent events."""
    name = None
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def process(model, data, cache, *flags, **environment):
    """`idea-serve` as a process; yields it, and where it is."""
    values = SMALL | {"pretrained_model_name_or_path": str(model), "data": str(data)}
    values |= {"compile_cache": str(cache)}
    command = [sys.executable, "-m", "idea_jax.serve"]
    command += [f"--{name}={value}" for name, value in values.items()]
    inherited = {name: value for name, value in os.environ.items() if name != "IDEA_SERVE_TOKEN"}
    env = inherited | {
        "PYTHONPATH": str(ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    errors = Path(data).parent / f"errors-{time.monotonic_ns()}.txt"
    with open(errors, "wb") as file:
        running = subprocess.Popen(
            [*command, *flags], env=env | environment, stdout=subprocess.PIPE, stderr=file
        )
    try:
        url = running.stdout.readline().decode().strip()
        assert url.startswith("http"), errors.read_text()
        running.errors = errors
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            until = time.monotonic() + PATIENCE
            while client.get("/readyz").status_code != 200:
                assert time.monotonic() < until
                time.sleep(0.05)
            yield running, client
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
        running.wait()
        running.stdout.close()
