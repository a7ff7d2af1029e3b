"""Times a server: latency and pictures a second for several numbers of clients, beside the engine.

    python -m benchmarks.serving
    python -m benchmarks.serving --opening

A server is started on the mini as a process of its own, which learns one person; then so many
clients ask for one picture each, again and again. The engine draws as many rows in a process of its
own, and encodes them as the server does. With --opening a studio is opened instead, as `make
studio` does it, and the first person is learned and drawn. Prints JSON lines.
"""

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FLAGS = (
    "--pretrained_model_name_or_path mini --guidance_scale 3 --preset fast --port 0 "
    "--warm_up drawing --max_queue 1024"
).split()
STUDIO = "--pretrained_model_name_or_path mini --guidance_scale 3 --port 0".split()
PHOTO = Path(__file__).resolve().parent.parent / "idea_jax" / "mini" / "photo.png"
PROMPT = "a photo of {} smiling"
PATIENCE = 1800  # seconds


def cpu_seconds(pid: int) -> float:
    """Seconds that all cores have worked for a process, on Linux."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def opening(data: Path) -> dict[str, float]:
    """Seconds from the start of a studio to its page, to when it is ready, to a person who is
    learned with no step, and to their first picture, with what the page asks for by itself."""
    import httpx2 as httpx

    began, found = time.perf_counter(), {}

    def passed(what: str) -> None:
        found[what] = round(time.perf_counter() - began, 2)

    command = [sys.executable, "-m", "idea_jax.studio", *STUDIO, "--data", str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            page = process.stdout.readline().decode().strip()
            with httpx.Client(base_url=page.removesuffix("/studio/"), timeout=PATIENCE) as client:
                client.get("/studio/").raise_for_status()
                passed("page_s")
                wait_for(lambda: client.get("/readyz").status_code == 200)
                passed("ready_s")
                learn(client, steps="0", keep_face="true")
                passed("person_s")
                row = {"identity": "anna", "prompt": PROMPT}
                client.post("/v1/images", json={"rows": [row]}).raise_for_status()
                passed("first_picture_s")
        finally:
            process.terminate()
    return found


def learn(client: Any, **fields: str) -> None:
    """Learns "anna", and waits for her."""
    form = {"name": "anna", "consent": "true", **fields}
    with open(PHOTO, "rb") as photo:
        client.post("/v1/identities", data=form, files={"photos": photo}).raise_for_status()
    wait_for(lambda: client.get("/v1/identities/anna").status_code == 200)


@contextlib.contextmanager
def serving(batch_size: int, data: Path) -> Iterator[tuple[Any, int]]:
    """A client of a server that is ready and knows "anna"; and the server's process id."""
    import httpx2 as httpx

    command = [sys.executable, "-m", "idea_jax.serve", *FLAGS, "--data", str(data)]
    command += ["--batch_size", str(batch_size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            url = process.stdout.readline().decode().strip()
            with httpx.Client(base_url=url, timeout=PATIENCE) as client:
                wait_for(lambda: client.get("/readyz").status_code == 200)
                learn(client)
                wait_for(lambda: client.get("/v1/identities/anna").json()["cover"])
                yield client, process.pid
        finally:
            process.terminate()


def wait_for(is_so: Any) -> None:
    """Waits until something is so."""
    until = time.monotonic() + PATIENCE
    while not is_so():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.05)


def load(client: Any, pid: int, clients: int, pictures: int) -> dict[str, Any]:
    """What so many clients see who ask for so many pictures, all together."""
    import httpx2 as httpx

    refused, latencies = [], []
    free = queue.SimpleQueue()
    for _ in range(clients):
        # Plain HTTP: certificates would take each of them longer to read than an answer.
        free.put(httpx.Client(base_url=client.base_url, timeout=PATIENCE, verify=False))

    def ask(number: int) -> None:
        row, own = {"identity": "anna", "prompt": PROMPT, "seed": number}, free.get()
        began = time.perf_counter()
        answer = own.post("/v1/images", json={"rows": [row]})
        free.put(own)
        if answer.status_code == 200:
            latencies.append(time.perf_counter() - began)
        else:
            refused.append(answer.status_code)

    began, busy = time.perf_counter(), cpu_seconds(pid)
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, range(pictures)))
    seconds = time.perf_counter() - began
    while not free.empty():
        free.get().close()
    found = sorted(latencies)
    return {
        "clients": clients,
        "pictures": len(found),
        "refused": len(refused),
        "p50_s": round(found[len(found) // 2], 3),
        "p95_s": round(found[min(len(found) - 1, int(0.95 * len(found)))], 3),
        "pictures_per_s": round(len(found) / seconds, 2),
        "server_cpu_s_per_picture": round((cpu_seconds(pid) - busy) / len(found), 4),
    }


def alone(batch_size: int, pictures: int, data: Path) -> dict[str, Any]:
    """What the engine takes for as many rows in one go, with the encoding, in this process."""
    from idea_jax.config import reading
    from idea_jax.models import hub
    from idea_jax.runtime import compile_cache, devices
    from idea_jax.sampling.batch import encoded
    from idea_jax.serve.opening import open_service, start
    from idea_jax.serve.settings import ServeConfig

    compile_cache.use(None)
    devices.use_cores(hub.local_folder("mini"))
    flags = [*FLAGS, "--data", str(data), "--batch_size", str(batch_size)]
    service = open_service(reading.parse(ServeConfig, flags))
    start(service)
    service.painter.is_ready.wait()
    count = min(64, pictures)
    asked = [{"identity": "anna", "prompt": PROMPT, "seed": number} for number in range(count)]
    jobs = [job for job, _ in service.reception.jobs(asked)]
    artist = service.painter.artist

    def draw() -> dict[str, Any]:
        began, busy = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(service.cfg.threads) as pool:
            for place, picture in artist.draw([job.row for job in jobs]):
                pool.submit(encoded, jobs[place], picture, "png")
        cpu = (time.process_time() - busy) / len(jobs)
        speed = len(jobs) / (time.perf_counter() - began)
        return {"pictures_per_s": round(speed, 2), "cpu_s_per_picture": round(cpu, 4)}

    service.painter.errand(draw).result()  # once before, for the caches
    told = service.painter.errand(draw).result()
    service.refuse()
    service.finish(0.0)
    return {"engine": True, "batch_size": batch_size, "pictures": len(jobs), **told}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--batch_size", type=int, default=1, help="rows of a device in a call")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--pictures", type=int, default=192, help="for each number of clients")
    parser.add_argument("--engine", metavar="DATA", help="the engine alone, with a server's people")
    parser.add_argument("--opening", action="store_true", help="from the start to a first picture")
    args = parser.parse_args(argv)
    if args.engine:
        print(json.dumps(alone(args.batch_size, args.pictures, Path(args.engine))), flush=True)
        return 0
    from benchmarks import machine

    print(json.dumps(machine.machine()), flush=True)
    if args.opening:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(opening(Path(folder) / "studio")), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "served"
        with serving(args.batch_size, data) as (client, pid):
            load(client, pid, max(args.clients), max(args.clients))  # once before
            for clients in args.clients:
                found = load(client, pid, clients, args.pictures)
                print(json.dumps({"batch_size": args.batch_size, **found}), flush=True)
        own = ["--engine", str(data), "--batch_size", str(args.batch_size)]
        command = [sys.executable, "-m", "benchmarks.serving", *own]
        subprocess.run([*command, "--pictures", str(args.pictures)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
