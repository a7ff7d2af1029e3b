"""Times this project and PyTorch side by side: python -m benchmarks, or `make bench`.

    python -m benchmarks [--workload mini|mid|sd21] [--device cpu|gpu] [--stacks jax eager ...]

One run on one machine: the same weights, inputs, shapes, types and numbers of steps for all. The
stacks are those of `stack_jax` and `stack_torch`. First their results are compared; a stack that
computes something else is not timed, and what fails is left out: the report says so, and the exit
code is 1. Then each is measured in turn, again and again (A B C A B C ...), so that whatever else
the machine does meets all of them. Reported are minimum, median and spread, (max - min) / median; a
ratio within the spread counts as "equal".
The first call of each, which compiles, is timed apart, while no other stack computes. Whole jobs
(process start to identity file to pictures) come last.

Writes WORKLOAD-DEVICE.json, .md and .svg (or --name) into --out; they are written anew after each
part, so that a run that is cut off leaves what it has measured. A run in which this project could
not be measured at all writes nothing.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import jobs, report
from benchmarks.machine import DeviceError, check_device, environment, machine
from benchmarks.options import MODES, parse
from benchmarks.plans import (
    Plan,
    ablations,
    calls_of,
    comparisons,
    milliseconds,
    people,
    profiles,
    sampling,
    train_steps,
)
from benchmarks.settings import COMPARED_STEPS, WORKLOADS, Workload, read
from benchmarks.worker import StackError, Worker
from idea_jax import launch
from idea_jax.runtime.files import check_writable

# Tokens after a few steps of Adam, whose first steps turn rounding of small gradients into steps:
# the cosine between the changes. Losses: relative. Pictures: mean difference of [-1, 1].
TOLERANCES = {
    "float32": {"loss": 1e-3, "tokens": 0.999, "pictures": 2e-3},
    "bfloat16": {"loss": 3e-2, "tokens": 0.9, "pictures": 5e-2},
}


class InputsError(ValueError):
    """The folder of inputs holds those of another workload."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = parse(argv)
    return launch.run(lambda: measure(args))


def measure(args: argparse.Namespace) -> int:
    """Measures, and writes the reports; returns the exit code.

    Raises:
      WriteError: the reports cannot be written.
    """
    workload = WORKLOADS[args.workload, args.device]
    name_of_report = args.name or f"{args.workload}-{args.device}"
    mode = args.torch_compile or MODES[args.device]
    out = Path(args.out)
    check_writable(out)
    try:
        check_device(args.device)
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    given = os.environ | environment(args.device)
    result = {
        "name": name_of_report,
        "workload": args.workload,
        "device": args.device,
        "machine": machine() | {"tunables": given.get("GLIBC_TUNABLES", "")},
    }
    with tempfile.TemporaryDirectory(prefix="idea-jax-bench-") as scratch:
        folder = Path(args.inputs or scratch).resolve()
        try:
            result["sizes"] = prepare(workload, args.device, folder) | {"torch.compile": mode}
            result["sizes"] |= {"programs kept": True} if args.compile_cache else {}
        except InputsError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        stacks: dict[str, Worker] = {}
        failed = result["failed"] = {}

        def write():
            report.write(out, name_of_report, result)

        try:
            start(stacks, args, mode, folder)
            result["machine"]["device"] = stacks["jax"]("device")
            result["ceilings"] = ceilings(stacks, args.device, failed)
            close_failed(stacks, failed)
            side_by_side(stacks, args, folder, result, write)
            for name in set(stacks) - {"jax"}:  # what follows needs the device's whole memory
                stacks.pop(name).close()
            this_project_alone(stacks, args, result, write)
        except StackError as error:  # of this project: there is nothing to compare the others with
            failed["jax"] = str(error)
            write()
        except (KeyboardInterrupt, SystemExit):
            for stack in stacks.values():
                stack.kill()
            raise
        finally:
            for stack in stacks.values():
                stack.close()
        if args.jobs and "jax" not in failed:
            those = [name for name in args.stacks if name not in failed]
            variables = environment(args.device)
            result["jobs"] = jobs.measure(
                folder, args.device, those, args.jobs, mode, variables, failed
            )
            report.write(out, name_of_report, result)
    if report.holds_something(result):
        print((out / f"{name_of_report}.md").read_text())
    for name, reason in failed.items():
        print(f"error: {name}: {reason.strip().splitlines()[-1]}", file=sys.stderr)
    return int(bool(failed))


def side_by_side(
    stacks: dict[str, Worker],
    args: argparse.Namespace,
    folder: Path,
    result: dict,
    write: Callable[[], None],
) -> None:
    """Compares and times all stacks, and this project's kernels while they are there.

    Args:
      write: writes the report as far as it is.

    Raises: StackError if it is this project.
    """
    workload = WORKLOADS[args.workload, args.device]
    repeats, failed = args.repeats or workload.repeats, result["failed"]
    measurements, wanted = report.Measurements(), comparisons(stacks, workload)
    patience = dict(zip(("train", "sampling"), args.patience or (None, None), strict=True))
    for part, plan_of in {"train": train_steps, "sampling": sampling}.items():
        if part not in args.parts:
            continue
        plan, compared = plan_of(stacks, workload), wanted[part]
        files = first_calls(stacks, compared, plan, measurements, failed, patience[part])
        result.setdefault("compared", {})
        compare(files, folder, args.device, result["compared"], failed)
        close_failed(stacks, failed)
        take_turns(stacks, plan, repeats, measurements, failed)
        result["times"] = measurements.summary()
        write()
        if part == "train":
            result["memory"] = memory(stacks, workload, failed)
            write()
    if "kernels" in args.parts:
        sizes = {"batch": workload.batch, "steps": workload.block}
        sizes |= {"profile": "paper", "room": workload.room}
        beside(stacks["jax"], "kernels", sizes, result, failed)
        write()


def this_project_alone(
    stacks: dict[str, Worker],
    args: argparse.Namespace,
    result: dict,
    write: Callable[[], None],
) -> None:
    """Times several people in a step and steps without a measure, and counts FLOPs.

    Arguments as in `side_by_side`.
    """
    workload = WORKLOADS[args.workload, args.device]
    repeats, failed = args.repeats or workload.repeats, result["failed"]
    alone = report.Measurements()
    for part, plan_of in {"people": people, "ablations": ablations}.items():
        if part not in args.parts:
            continue
        plan = plan_of(workload, args)
        first_calls(stacks, {}, plan, alone, failed, None)
        take_turns(stacks, plan, repeats, alone, failed)
        result["inside"] = alone.summary()
        write()
    sizes = {"batch": workload.batch, "pictures": workload.pictures, "steps": workload.steps}
    beside(stacks["jax"], "flops", sizes, result, failed)
    write()
    if "convolutions" in args.parts:
        beside(stacks["jax"], "convolutions", {"batch": workload.batch}, result, failed)
        write()


def prepare(workload: Workload, device: str, folder: Path) -> dict:
    """Writes checkpoint and inputs in a process of its own, unless they are there already.

    Raises: InputsError if the folder holds those of another workload, of other sizes or another
        folder.
    """
    dtype = "float32" if device == "cpu" else "bfloat16"
    sizes = {"batch": workload.batch, "pictures": max(workload.pictures, 2), "dtype": dtype}
    if (folder / "workload.json").is_file():  # the last file that is written
        expected = {"name": workload.name, "folder": str(folder), **sizes}
        about = read(folder)
        found = {key: about.get(key) for key in expected}
        if found != expected:
            raise InputsError(
                f"--inputs {folder} holds the inputs of {found}, expected {expected}; name another "
                "folder, or delete this one to have them written"
            )
        return vars(workload) | {"dtype": dtype}
    command = [sys.executable, "-m", "benchmarks.workloads", workload.name, str(folder)]
    command += [str(size) for size in sizes.values()]
    subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    return vars(workload) | {"dtype": dtype}


def start(stacks: dict[str, Worker], args: argparse.Namespace, mode: str, folder: Path) -> None:
    """Starts the stacks, and adds each to `stacks`; without `--compile_cache` no program is
    compiled yet."""
    kept = folder if args.compile_cache is None else Path(args.compile_cache).resolve()
    variables = environment(args.device) | {"TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor")}
    if args.compile_cache is None:
        shutil.rmtree(folder / "inductor", ignore_errors=True)
        variables["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    else:
        variables["JAX_ENABLE_COMPILATION_CACHE"] = "true"
        variables["JAX_COMPILATION_CACHE_DIR"] = str(kept / "jax")
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    torch_device = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    for name in args.stacks:
        command = ["benchmarks.stack_torch", str(folder), torch_device, name, mode]
        if name == "jax":
            command = ["benchmarks.stack_jax", str(folder), dtype]
        stacks[name] = Worker(name, command, variables)


def ceilings(stacks: dict[str, Worker], device: str, failed: dict[str, str]) -> dict[str, float]:
    """FLOP/s that large products reach, the best of several turns.

    The first request to PyTorch's stacks: one that cannot be loaded is told in `failed` here.

    Raises: StackError if it is this project.
    """
    size, found = {"cpu": 1024, "gpu": 8192}[device], {}
    for _ in range(5):
        for name, stack in stacks.items():
            if name in failed:
                continue
            try:
                reached, _ = timed(stack, "ceiling", {"size": size})
            except StackError as error:
                if name == "jax":
                    raise
                failed[name] = str(error)
                continue
            found[name] = max(reached, found.get(name, 0.0))
    return found


def close_failed(stacks: dict[str, Worker], failed: dict[str, str]) -> None:
    """Ends the stacks that have failed as a whole, and takes them out of `stacks`."""
    for name in set(failed) & set(stacks):
        stacks.pop(name).close()


def first_calls(
    stacks: dict[str, Worker],
    comparisons: dict[str, list],
    plan: Plan,
    measurements: report.Measurements,
    failed: dict[str, str],
    patience: float | None,
) -> dict:
    """Makes the first calls of a part, which compile it, one stack after the other.

    Never side by side: on a GPU, libraries and compilers choose kernels by their speed, and the
    choice stays. Timed from the request to the answer. Training is compiled for the results that
    are compared, so those are its first call; drawing compares few steps, another program, but the
    text encoder's may be the same one, which is compiled by then.

    What fails is told in `failed`: a stack as a whole if it has no results to compare or takes too
    long, else the single measurement.

    Args:
      patience: seconds until each other stack is given up; None for never.

    Returns: the files with what is to be compared, by stack, call and profile.

    Raises: StackError if this project has no results.
    """
    files = {}
    for name, stack in stacks.items():
        is_limited = patience is not None and name != "jax"
        limit = patience if is_limited else threading.TIMEOUT_MAX
        began, timer = time.monotonic(), threading.Timer(limit, stack.kill)
        timer.start()
        own, training = {}, {}
        try:
            for call, arguments in comparisons.get(name, []):
                file, spent = timed(stack, call, arguments)
                own[name, call, arguments.get("profile")] = file
                if call == "train_outputs":
                    training[arguments["profile"]] = spent
            for what, variant, call, arguments in calls_of(name, plan):
                try:
                    _, spent = timed(stack, call, arguments)
                except StackError as error:
                    if time.monotonic() - began >= limit:
                        raise
                    failed[f"{what}, {variant}"] = str(error)
                    continue
                spent = training.get(arguments.get("profile"), spent)
                measurements.add(what, variant, 1e3 * spent, "ms", is_first=True)
        except StackError as error:
            if name == "jax":
                raise
            failed[name] = str(error)
        finally:
            timer.cancel()
        if time.monotonic() - began >= limit:
            failed[name] = f"had not finished its first calls after {limit:.0f} s"
        if name not in failed:
            files |= own
    return files


def timed(stack: Worker, call: str, arguments: dict) -> tuple[object, float]:
    """What a stack answers, and the seconds that this takes.

    Raises: StackError as the stack.
    """
    started = time.monotonic()
    try:
        answer = stack(call, **arguments)
    except StackError:
        with contextlib.suppress(StackError):  # of a process that is gone; the first one tells why
            stack("release")
        raise
    spent = time.monotonic() - started
    stack("release")  # the device memory that it keeps, for the next stack
    return answer, spent


def compare(files: dict, folder: Path, device: str, found: dict, failed: dict[str, str]) -> None:
    """Adds the differences between every stack and this project to `found`.

    Args:
      files: from `first_calls`.
      failed: is told of stacks that differ by more than rounding explains.
    """
    limits = TOLERANCES["float32" if device == "cpu" else "bfloat16"]
    start_of = dict(np.load(folder / "inputs.npz"))
    for (name, call, profile), file in files.items():
        if name == "jax":
            continue
        ours, theirs = np.load(files["jax", call, profile]), np.load(file)
        differences = found.setdefault(name, {})
        if call == "sample_outputs":
            apart = np.abs(ours["pictures"].astype(float) - theirs["pictures"].astype(float))
            differences["pictures"] = float(apart.mean()) / 127.5
            fits = differences["pictures"] <= limits["pictures"]
        else:
            start = start_of[f"{profile}/trainable/pseudo_tokens"]
            a, b = (np.ravel(x["tokens"] - start) for x in (ours, theirs))
            differences["loss"] = float(np.max(np.abs(theirs["losses"] / ours["losses"] - 1)))
            differences["tokens"] = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            # Written so that a NaN is a mismatch.
            fits = differences["loss"] <= limits["loss"]
            fits &= differences["tokens"] >= limits["tokens"]
        if not fits:
            failed[name] = (
                f"differs from this project after {COMPARED_STEPS} training steps or in pictures: "
                f"{differences}, expected within {limits}"
            )


def take_turns(
    stacks: dict[str, Worker],
    plan: Plan,
    repeats: int,
    measurements: report.Measurements,
    failed: dict[str, str],
) -> None:
    """Measures every call once per round; one that fails is left out, and told in `failed`."""
    for _ in range(repeats):
        for what, calls in plan.items():
            for variant, (name, call, arguments) in calls.items():
                if name not in stacks or f"{what}, {variant}" in failed:
                    continue
                try:
                    seconds, _ = timed(stacks[name], call, arguments)
                except StackError as error:
                    failed[f"{what}, {variant}"] = str(error)
                    measurements.leave_out(variant, what)
                    continue
                value = milliseconds(seconds, call, arguments)
                measurements.add(what, variant, value, "ms", is_first=False)


def memory(stacks: dict[str, Worker], workload: Workload, failed: dict[str, str]) -> dict[str, int]:
    """Bytes that training took of each stack; on a GPU nothing but training is in it."""
    sizes = {"batch": workload.batch}
    found = {}
    for name, stack in stacks.items():
        try:
            if name == "jax":
                found[name] = stack("memory", room=workload.room, **sizes)
                continue
            stack("train_time", profile=profiles(stacks, name)[0], steps=1, **sizes)
            found[name] = stack("memory")
        except StackError as error:
            failed[f"memory of training, {name}"] = str(error)
    return found


def beside(stack: Worker, call: str, arguments: dict, result: dict, failed: dict[str, str]) -> None:
    """Adds what is asked of this project alone to `result`; a failure, told, ends nothing else."""
    try:
        result[call] = stack(call, **arguments)
    except StackError as error:
        failed[call] = str(error)


def end(number: int, _) -> None:
    """Ends the program as Ctrl-C does: the stacks end, and the folder of inputs goes."""
    for other in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, end)
    sys.exit(main())
