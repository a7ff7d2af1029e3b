"""The machine that numbers are measured on."""

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path


class DeviceError(ValueError):
    """The device that is asked for is not there."""


def check_device(device: str) -> None:
    """Raises DeviceError if JAX has no such device, before anything is written for it."""
    if device == "cpu":
        return
    look = "import jax; jax.devices()"
    variables = {**os.environ, **environment(device)}
    seen = subprocess.run([sys.executable, "-c", look], env=variables, capture_output=True)
    if seen.returncode:
        (*_, last) = seen.stderr.decode(errors="replace").strip().splitlines() or ["no reason told"]
        raise DeviceError(f"--device {device}: JAX finds no NVIDIA GPU here: {last}")


def machine() -> dict:
    """What the numbers were measured with."""
    packages = ("jax", "flax", "optax", "torch", "diffusers", "transformers", "numpy")
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(cores()),
        "busy": busy_share(),
        "python": platform.python_version(),
        "versions": installed(packages),
    }


def cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    return os.sched_getaffinity(0) if has_affinity else set(range(os.cpu_count() or 1))


def busy_share(stat: Path = Path("/proc/stat")) -> float:
    """Share of its cores' time that other programs take while this one waits for two seconds.

    The load average would still hold what ran a minute ago, such as the benchmark before this one.
    It is taken where the kernel does not tell the times (macOS).
    """
    if not stat.is_file():
        return min(1.0, os.getloadavg()[0] / len(cores()))
    own = {f"cpu{number}" for number in cores()}

    def read_times() -> tuple[int, int]:
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are part of user.
        lines = (line.split() for line in stat.read_text().splitlines())
        times = [[int(x) for x in line[1:9]] for line in lines if line and line[0] in own]
        return sum(map(sum, times)), sum(idle + waiting for _, _, _, idle, waiting, *_ in times)

    total, idle = read_times()
    time.sleep(2)
    total_after, idle_after = read_times()
    return 1 - (idle_after - idle) / max(1, total_after - total)


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def environment(device: str) -> dict[str, str]:
    """Variables that every process of a run gets."""
    if device == "cpu":
        return {"JAX_PLATFORMS": "cpu"} | huge_pages()
    # PyTorch's stacks use one device, so this project has no more than that one.
    one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    # Several stacks hold the device at once, each only what it needs.
    preallocate = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": one} | preallocate


def huge_pages() -> dict[str, str]:
    """The variable that has all stacks alike get pages of 2 MB, where the system gives them to
    those that ask. Empty elsewhere, and where the variable is set already."""
    from idea_jax.runtime import memory  # which imports JAX: nothing that `--help` should wait for

    wish = memory.wish_for_huge_pages()
    return {memory.TUNABLES: wish} if wish else {}
