"""Times this project and PyTorch side by side: python -m benchmarks, or `make bench`.

    python -m benchmarks [--workload mini|mid|sd21] [--device cpu|gpu] [--stacks jax eager ...]

One run on one machine: the same weights, inputs, shapes, types and numbers of steps for all. The
stacks are those of `stack_jax` and `stack_torch`. First their results are compared; a stack that
computes something else is not timed, and the run fails. Then each is measured in turn, again and
again (A B C A B C ...), so that whatever else the machine does meets all of them. Reported are
minimum, median and spread, (max - min) / median; a ratio within the spread counts as "equal".
Compilation is timed apart. Whole jobs (process start to identity file to pictures) come last.

Writes NAME.json, NAME.md and NAME.svg into --out; they are written anew after each part, so that a
run that is cut off leaves what it has measured.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

from benchmarks import jobs, report
from benchmarks.settings import COMPARED_STEPS, WORKLOADS, Workload
from benchmarks.worker import StackError, Worker

STACKS = ("jax", "published", "eager", "compiled")
# The profile that each stack trains; the published step is compared with the same arithmetic here.
PROFILES = {"jax": ("paper", "official"), "published": ("official",)}
# Tokens after a few steps of Adam, whose first steps turn rounding of small gradients into steps:
# the cosine between the changes. Losses: relative. Pictures: mean difference of [-1, 1].
TOLERANCES = {
    "float32": {"loss": 1e-3, "tokens": 0.999, "pictures": 2e-3},
    "bfloat16": {"loss": 3e-2, "tokens": 0.9, "pictures": 5e-2},
}


class Mismatch(RuntimeError):
    """A stack computes something else than this project."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse(argv)
    workload = WORKLOADS[args.workload, args.device]
    repeats = args.repeats or workload.repeats
    name = f"{args.workload}-{args.device}"
    result = {"workload": args.workload, "device": args.device, "machine": machine()}
    out = Path(args.out)
    with tempfile.TemporaryDirectory(prefix="idea-jax-bench-") as scratch:
        folder = Path(scratch)
        stacks = {}
        try:
            result["sizes"] = prepare(workload, args.device, folder)
            stacks = start(args.stacks, args.device, folder)
            result["ceilings"] = ceilings(stacks, args.device)
            result["compared"] = compare(stacks, folder, args.device)
            measurements = report.Measurements()
            for part in (train_steps, sampling):
                part(stacks, workload, repeats, measurements)
                result["times"] = measurements.summary()
                report.write(out, name, result)
            if workload.ablations:
                result |= inside(stacks["jax"], workload, repeats, args.device)
            result["memory"] = {name: stack("memory") for name, stack in stacks.items()}
            report.write(out, name, result)
        except (StackError, Mismatch) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            for stack in stacks.values():
                stack.close()
        if args.jobs:
            result["jobs"] = jobs.measure(
                args.workload, args.device, args.stacks, folder, args.jobs
            )
            report.write(out, name, result)
    print((out / f"{name}.md").read_text())
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    names = dict.fromkeys(name for name, _ in WORKLOADS)
    parser.add_argument("--workload", choices=names, default="mini")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--repeats", type=int, help="measurements of each (default: by workload)")
    parser.add_argument(
        "--jobs", type=int, default=0, help="measure whole jobs, this many times each (0: not)"
    )
    parser.add_argument("--out", default="benchmarks/results", help="folder of the results")
    args = parser.parse_args(argv)
    if "jax" not in args.stacks:
        parser.error("--stacks must hold jax: the others are compared with it")
    return args


def machine() -> dict:
    """What the numbers were measured with."""
    packages = ("jax", "flax", "optax", "torch", "diffusers", "transformers", "numpy")
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def environment(device: str) -> dict[str, str]:
    """Variables that every process of a run gets."""
    backend = {"cpu": "cpu", "gpu": "cuda"}[device]
    # Several stacks hold the device at once, each only what it needs.
    return {"JAX_PLATFORMS": backend, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def prepare(workload: Workload, device: str, folder: Path) -> dict:
    """Writes checkpoint and inputs in a process of its own."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    sizes = (str(workload.batch), str(max(workload.pictures, 2)), dtype)
    command = [sys.executable, "-m", "benchmarks.workloads", workload.name, str(folder), *sizes]
    subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return vars(workload) | {"dtype": dtype}


def start(names: list[str], device: str, folder: Path) -> dict[str, Worker]:
    """Starts the stacks; the programs that they compile are cached for this run alone."""
    variables = environment(device) | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    dtype = "float32" if device == "cpu" else "bfloat16"
    torch_device = {"cpu": "cpu", "gpu": "cuda"}[device]
    stacks = {}
    for name in names:
        command = ["benchmarks.stack_torch", str(folder), torch_device, name]
        if name == "jax":
            command = ["benchmarks.stack_jax", str(folder), dtype]
        stacks[name] = Worker(name, command, variables)
    return stacks


def ceilings(stacks: dict[str, Worker], device: str) -> dict[str, float]:
    """FLOP/s that a large product reaches."""
    size = {"cpu": 1024, "gpu": 8192}[device]
    return {name: stack("ceiling", size=size) for name, stack in stacks.items()}


def compare(stacks: dict[str, Worker], folder: Path, device: str) -> dict:
    """The differences between every stack and this project.

    Raises: Mismatch, where one is larger than rounding explains.
    """
    limits = TOLERANCES["float32" if device == "cpu" else "bfloat16"]
    start_of = dict(np.load(folder / "inputs.npz"))
    found = {}
    for name, stack in stacks.items():
        if name == "jax":
            continue
        found[name], pair = {}, (stacks["jax"], stack)
        if name != "published":
            # Before the training steps: they change the person whom PyTorch draws.
            ours, theirs = (np.load(one("sample_outputs"))["pictures"] for one in pair)
            found[name]["pictures"] = float(np.abs(ours - theirs).mean())
        (profile,) = PROFILES.get(name, ("paper",))
        ours, theirs = (np.load(one("train_outputs", profile=profile)) for one in pair)
        start = start_of[f"{profile}/trainable/pseudo_tokens"]
        a, b = (np.ravel(x["tokens"] - start) for x in (ours, theirs))
        found[name]["loss"] = float(np.max(np.abs(theirs["losses"] / ours["losses"] - 1)))
        found[name]["tokens"] = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        # Written so that a NaN is a mismatch.
        fits = found[name]["loss"] <= limits["loss"] and found[name]["tokens"] >= limits["tokens"]
        if not (fits and found[name].get("pictures", 0.0) <= limits["pictures"]):
            raise Mismatch(
                f"{name} differs from this project after {COMPARED_STEPS} steps of profile "
                f"{profile}: {found[name]}, expected within {limits}"
            )
        for one in pair:
            one("release")
    return found


def train_steps(stacks, workload: Workload, repeats: int, measurements) -> None:
    """Blocks of training steps, milliseconds a step."""
    calls = {
        (f"train step, {profile}", name): (stack, "train_time", {"profile": profile})
        for name, stack in stacks.items()
        for profile in PROFILES.get(name, ("paper",))
        if profile == "paper" or "published" in stacks
    }
    sizes = {"batch": workload.batch, "steps": workload.block}
    take_turns(calls, sizes, repeats, 1e3 / workload.block, "ms", measurements)


def sampling(stacks, workload: Workload, repeats: int, measurements) -> None:
    """Calls of the sampler, milliseconds a call; the published code's is that of `eager`."""
    counts = dict.fromkeys([workload.pictures, *([1] if workload.single else [])])
    for pictures in counts:
        what = f"drawing {pictures} at once, {workload.steps} steps"
        calls = {
            (what, name): (stack, "sample_time", {})
            for name, stack in stacks.items()
            if name != "published"
        }
        sizes = {"pictures": pictures, "steps": workload.steps}
        take_turns(calls, sizes, repeats, 1e3, "ms", measurements)


def take_turns(calls, sizes: dict, repeats: int, scale: float, unit: str, measurements) -> None:
    """Measures every call once per round; the first round compiles and is kept apart."""
    for round_number in range(repeats + 1):
        for (what, name), (stack, call, arguments) in calls.items():
            value = scale * stack(call, **arguments, **sizes)
            measurements.add(what, name, value, unit, is_first=round_number == 0)
            stack("release")


def inside(jax_stack: Worker, workload: Workload, repeats: int, device: str) -> dict:
    """What only this project's stack is asked: counts, and on a GPU ablations and kernels."""
    counted = jax_stack(
        "counted", batch=workload.batch, pictures=workload.pictures, steps=workload.steps
    )
    sizes = {"batch": workload.batch, "steps": workload.block}
    measurements = report.Measurements()
    plain = {"best": (jax_stack, "train_time", {"profile": "paper"})}
    taken_back = ("moments", "trainables", *(("flash", "bfloat16") if device == "gpu" else ()))
    without = {
        f"without {name}": (jax_stack, "ablated_time", {"without": name}) for name in taken_back
    }
    without["in one program"] = (jax_stack, "scanned_time", {})
    calls = {("ablation", name): call for name, call in {**plain, **without}.items()}
    take_turns(calls, sizes, repeats, 1e3 / workload.block, "ms", measurements)
    numbers = (1, 2, 4, 8, 16) if device == "gpu" else (1, 2, 4)
    for people in numbers:
        calls = {
            ("people in one step", f"{people}"): (jax_stack, "people_time", {"people": people})
        }
        take_turns(calls, sizes, repeats, 1e3 / workload.block / people, "ms/person", measurements)
    return {
        "flops": counted,
        "inside": measurements.summary(),
        "kernels": jax_stack("kernels", profile="paper", **sizes),
        "convolutions": jax_stack("convolutions", batch=workload.batch),
    }


if __name__ == "__main__":
    sys.exit(main())
