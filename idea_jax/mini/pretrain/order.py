"""Runs the stages that are not done yet, one after the other or several at once."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from idea_jax.mini.pretrain import stages as all_stages
from idea_jax.mini.pretrain.run import RECORD, PretrainError, Run, write_record

STOP_SECONDS = 10  # that a stage has to end by itself


def pretrain(run: Run, stages: Collection[str] = ()) -> None:
    """Runs the stages that are not done yet, or of these only the ones that are named.

    Raises: PretrainError if one of its folders is of another seed or budget, a stage is to run
        before one that it needs, or another process runs it.
    """
    about = begin(run)
    for name in all_stages.STAGES:
        done = read_record(run.folder, about)["stages"]
        if name in done or (stages and name not in stages):
            continue
        check_needs(name, done)
        started, run.before = time.monotonic(), 0.0
        try:
            with FileLock(run.work / f".{name}.lock", timeout=0):
                result = all_stages.STAGES[name](run)
        except Timeout as error:
            raise PretrainError(
                f"stage {name} of {run.folder} is being run by another process"
            ) from error
        result["seconds"] = round(run.before + time.monotonic() - started)
        with run.lock():
            record = read_record(run.folder, about)
            known = {**record["stages"], name: result}
            if name != "finish":  # its sums are those of all files
                known.pop("finish", None)
            # In one order, whatever was done first.
            record["stages"] = {n: known[n] for n in all_stages.STAGES if n in known} | known
            write_record(run.folder, record)


def pretrain_at_once(run: Run, stages: Collection[str], jobs: int, command: Sequence[str]) -> None:
    """As `pretrain`, with up to `jobs` stages at a time that do not need each other.

    Each runs in a process of its own and writes to STAGE.log in the work folder.

    Args:
      command: what runs a single stage when `--stages NAME` is added.

    Raises: PretrainError as `pretrain`; ChildProcessError if a stage fails, with its last words,
        once the others were stopped.
    """
    about = begin(run)
    # Each process would otherwise take three quarters of a GPU's memory.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    running: dict[str, subprocess.Popen] = {}
    try:
        while True:
            ended = [name for name, process in running.items() if process.poll() is not None]
            for name in ended:
                if code := running.pop(name).returncode:
                    said = (run.work / f"{name}.log").read_text(errors="replace").splitlines()
                    words = "\n".join(said[-20:])
                    raise ChildProcessError(f"stage {name} failed with exit code {code}:\n{words}")
                print(f"{name}: done", file=sys.stderr)
            done = read_record(run.folder, about)["stages"].keys() - running.keys()
            left = [
                n
                for n in all_stages.STAGES
                if n not in done | running.keys() and n in (stages or all_stages.STAGES)
            ]
            if not left and not running:
                return
            ready = [
                name for name in left if all(n in done for n in all_stages.NEEDS.get(name, ()))
            ]
            if not ready and not running:
                check_needs(left[0], done)
            for name in ready[: jobs - len(running)]:
                log = run.work / f"{name}.log"
                print(f"{name}: begun, see {log}", file=sys.stderr)
                with open(log, "wb") as output:
                    # Ctrl-C reaches this process only, which then stops all of them.
                    running[name] = subprocess.Popen(
                        [*command, "--stages", name],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
            time.sleep(0.2)
    finally:
        stop(running.values())


def stop(running: Collection[subprocess.Popen]) -> None:
    """Ends processes that lead a group each, and all that is in the group."""
    for process in running:
        process.send_signal(signal.SIGINT)
    until = time.monotonic() + STOP_SECONDS
    for process in running:
        try:
            process.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:  # it compiles, perhaps, and hears nothing
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def begin(run: Run) -> dict:
    """Makes the work folder and returns what a record says of a run.

    Raises: PretrainError if there is something else in one of the folders. Drawings and states of
        another run would pass for this one's, and what is no mini at all would be overwritten.
    """
    if run.work.resolve().is_relative_to(run.folder.resolve()):
        raise PretrainError(f"--work {run.work} must not lie in {run.folder}, the checkpoint")
    for folder in (run.folder, run.work):
        if not (folder / RECORD).is_file() and folder.is_dir() and any(folder.iterdir()):
            raise PretrainError(
                f"{folder} is not empty and has no {RECORD}: it was not begun by this program; "
                "choose another folder"
            )
    about = {"seed": run.seed, "budget": dataclasses.asdict(run.budget)}
    about = json.loads(json.dumps(about))
    run.work.mkdir(parents=True, exist_ok=True)
    read_record(run.work, about)
    read_record(run.folder, about)
    write_record(run.work, {**about, "stages": {}})
    if not (run.folder / RECORD).is_file():
        write_record(run.folder, {**about, "stages": {}})
    return about


def check_needs(name: str, done: Collection[str]) -> None:
    if missing := [needed for needed in all_stages.NEEDS.get(name, ()) if needed not in done]:
        raise PretrainError(f"stage {name} needs {' and '.join(missing)}, which is not done yet")


def read_record(folder: Path, about: dict) -> dict:
    """Returns what is known of a run: seed, budget, and the results of the stages that are done.

    A record made before there was some stage knows nothing of its budget, and is continued.
    """
    path = folder / RECORD
    if not path.is_file():
        return {**about, "stages": {}}
    record = json.loads(path.read_text())
    budget = {**about["budget"], **record["budget"]}
    if {"seed": record["seed"], "budget": budget} != about:
        raise PretrainError(f"{folder} was made with another seed or budget; choose another folder")
    return {**record, **about}
