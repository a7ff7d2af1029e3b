"""A training of many people as a process of its own, that tests disturb and start again."""

import contextlib
import hashlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from idea_jax import jobs
from idea_jax.formats.identity import read_identity

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 900  # seconds, for a start on a busy machine
# What is tested is what is left on disk, so programs are compiled quickly and run slowly.
XLA = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={}"


def write_people(root, count):
    """Folders with one or two small pictures each."""
    for number in range(count):
        folder = root / f"person-{number:02d}"
        folder.mkdir(parents=True)
        for picture in range(1 + number % 2):
            rng = np.random.default_rng([number, picture])
            pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
            image = Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC)
            image.save(folder / f"{picture}.png")


class Job:
    """`train_jax.py` on a folder of people, started as often as need be."""

    def __init__(self, model, root, out, cache, *flags):
        self.root, self.out = root, out
        self.command = [
            sys.executable,
            str(ROOT / "train_jax.py"),
            "--pretrained_model_name_or_path",
            str(model),
            "--train_data_dir",
            str(root),
            "--output_dir",
            str(out),
            *"--profile cross_init --train_batch_size 1 --report_to none".split(),
            *flags,
        ]
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": XLA.format(1),
        }

    def start(self, *flags, stderr=None, **environment):
        self.errors = self.out.parent / f"errors-{time.monotonic_ns()}.txt"
        with open(self.errors, "wb") as errors:
            return subprocess.Popen(
                [*self.command, *flags],
                env=self.environment | environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr or errors,
            )

    def run(self, *flags, timeout=PATIENCE):
        """Runs to the end; returns the exit code and what it said."""
        process = self.start(*flags)
        try:
            code = process.wait(timeout)
        finally:
            end(process)
        return code, self.said()

    def run_on_a_disk_that_fills(self, is_time, *flags):
        """The same, but once it is time nothing can be written to any file."""
        process, is_running = self.start_and_wait(
            is_time,
            *flags,
            stderr=subprocess.PIPE,  # which is no file; it has room for what is said
            JAX_ENABLE_COMPILATION_CACHE="0",
        )
        try:
            assert is_running
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
            _, said = process.communicate(timeout=PATIENCE)
        finally:
            end(process)
        return process.returncode, said.decode("utf-8", "replace")

    def said(self):
        return self.errors.read_text("utf-8", "replace")

    def start_and_wait(self, is_time, *flags, **options):
        """Starts it and waits for something; returns the process, and whether it still runs."""
        process = self.start(*flags, **options)
        deadline = time.monotonic() + PATIENCE
        try:
            while process.poll() is None and not is_time():
                assert time.monotonic() < deadline, self.said()
                time.sleep(0.005)
        except BaseException:
            end(process)
            raise
        return process, process.poll() is None

    def kill_when(self, is_time, *numbers):
        """Starts it, sends signals once it is time; returns the exit code: None if it was over."""
        process, is_running = self.start_and_wait(is_time)
        for number in numbers or (signal.SIGKILL,):
            process.send_signal(number)
            time.sleep(0.1)
        started = time.monotonic()
        code = process.wait(PATIENCE)
        self.seconds_to_stop = time.monotonic() - started
        return code if is_running else None

    def records(self):
        """What is on disk of each person now."""
        found = {}
        for path in sorted(self.out.glob(f"*/{jobs.RECORD}")):
            with contextlib.suppress(FileNotFoundError):
                found[path.parent.name] = jobs.from_line(path.read_text())
        return found

    def begun(self):
        """(person, attempts) of everybody who was begun: changes when training goes on."""
        return {(record.person, record.attempts) for record in self.records().values()}

    def checkpoints(self):
        """Folders of the checkpoints that are complete, the newest of each person last."""
        found = self.out.glob("*/checkpoints/*")
        return sorted(
            (path for path in found if path.name.isdigit()),
            key=lambda path: (path.parent.parent.name, int(path.name)),
        )

    def results(self):
        """The digest of each identity file, each of which is whole at any time."""
        found = {}
        for path in self.out.glob(f"*/{jobs.RESULT}"):
            read_identity(path)
            found[path.parent.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def is_saving(self):
        return any(self.out.glob("*/checkpoints/*orbax-checkpoint-tmp*"))


def processes_of(count):
    """The variables that let so many processes on this machine find each other."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    return [
        {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(number),
        }
        for number in range(count)
    ]


def end(process):
    """Ends a process that a failed test would leave behind."""
    if process.poll() is None:
        process.kill()
        process.wait()


def flip_a_bit(folder, rng):
    """Flips a bit in the largest file of a checkpoint."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
    path.write_bytes(raw)


def cut(folder):
    """Cuts the largest file of a checkpoint in half."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
