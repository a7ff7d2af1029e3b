"""Whole jobs: from the start of a process to an identity file, and on to pictures on the disk."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import Measurements
from benchmarks.settings import JOBS, read
from benchmarks.summary import person
from benchmarks.worker import StackError

ROOT = Path(__file__).resolve().parent.parent


def measure(
    folder: Path,
    device: str,
    stacks: Sequence[str],
    repeats: int,
    mode: str,
    variables: Mapping[str, str],
    failed: dict[str, str],
) -> dict:
    """Seconds of learning, of drawing 16 pictures, of both, and to a first picture; where the
    checkpoint has a shared ID-Enhancer, also those to a person with it.

    The first run of each starts with an empty cache of compiled programs and is kept apart.

    Args:
      folder: of the workload; checkpoint and photo are read from it.
      mode: of `torch.compile`.
      variables: environment of every process.
      failed: is told of stacks whose jobs fail, which are left out.
    """
    about = read(folder)
    sizes, measurements = JOBS[about["name"]], Measurements()
    kinds = (
        f"learning, {sizes['steps']} steps",
        f"drawing {sizes['pictures']} pictures",
        "both",
        "a first picture",
    )
    programs = folder / "programs"
    shutil.rmtree(programs, ignore_errors=True)
    environment = {**os.environ, **variables, "TORCHINDUCTOR_CACHE_DIR": str(programs / "inductor")}
    # Jobs keep their programs, whatever the shell says.
    environment.pop("JAX_ENABLE_COMPILATION_CACHE", None)
    for round_number in range(repeats + 1):
        for name in stacks:
            if name == "published" or f"whole jobs, {name}" in failed:
                continue
            out = folder / "jobs" / name
            shutil.rmtree(out, ignore_errors=True)
            lines = commands(name, folder, about, device, mode, out, sizes)
            try:
                learn, draw, first = (seconds_of(line, environment) for line in lines)
            except StackError as error:
                failed[f"whole jobs, {name}"] = str(error)
                for what in kinds:
                    measurements.leave_out(name, what)
                continue
            values = (learn, draw, learn + draw, first)
            for what, value in zip(kinds, values, strict=True):
                measurements.add(what, name, value, "s", is_first=round_number == 0)
        for what, line in quick(folder, about, device).items():
            if f"whole jobs, {what}" in failed:
                continue
            try:
                value = seconds_of(line, environment)
            except StackError as error:
                failed[f"whole jobs, {what}"] = str(error)
                measurements.leave_out("jax", what)
                continue
            measurements.add(what, "jax", value, "s", is_first=round_number == 0)
    return measurements.summary()


def commands(
    name: str, folder: Path, about: dict, device: str, mode: str, out: Path, sizes: dict
) -> list[list[str]]:
    """The three command lines of a stack: learn, draw, draw one picture."""
    pictures, steps = str(sizes["pictures"]), str(sizes["sampling_steps"])
    if name == "jax":
        # Without a shared ID-Enhancer, as PyTorch's stacks learn.
        learn = learning(folder, about, out, sizes["steps"])
        learn += ["--train_batch_size", str(sizes["batch"]), "--enhancer", "none"]
        draw = ["sample_jax.py", "--identity", str(out / "identity.safetensors")]
        draw += ["--prompt", "a photo of {} person", "--num_inference_steps", steps]
        many = ["--num_images_per_prompt", pictures, "--save_dir", str(out / "pictures")]
        many += ["--batch_size", pictures]
        one = ["--num_images_per_prompt", "1", "--save_dir", str(out / "one")]
        common = shared_flags(folder, about, device)
        lines = [[*learn, *common], [*draw, *many, *common], [*draw, *one, *common]]
        return [[sys.executable, *line] for line in lines]
    torch_device = {"cpu": "cpu", "gpu": "cuda"}[device]
    common = [str(folder / "workload.json"), torch_device, name, mode, str(out)]
    lines = [
        ["learn", *common, str(sizes["steps"]), str(sizes["batch"])],
        ["draw", *common, pictures, steps],
        ["draw", *common, "1", steps],
    ]
    return [[sys.executable, "-m", "benchmarks.torch_job", *line] for line in lines]


def learning(folder: Path, about: dict, out: Path, steps: int) -> list[str]:
    """Flags with which this project learns the person of a workload."""
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    shutil.copy(about["photo"], photos)
    flags = ["train_jax.py", "--profile", "paper", "--train_data_dir", str(photos)]
    flags += ["--max_train_steps", str(steps), "--output_dir", str(out)]
    return [*flags, "--report_to", "none", "--crop", "none"]


def shared_flags(folder: Path, about: dict, device: str) -> list[str]:
    """Flags of every command of this project."""
    model = ["--pretrained_model_name_or_path", about["checkpoint"]]
    precision = ["--mixed_precision", "no" if device == "cpu" else "bf16"]
    # By the flag that a user has, which also says what is kept and how much.
    return [*model, *precision, "--compile_cache", str(folder / "programs" / "jax")]


def quick(folder: Path, about: dict, device: str) -> dict[str, list[str]]:
    """The commands that learn a person with the checkpoint's shared ID-Enhancer, by what they are
    called; none where it has no such file."""
    if not (Path(about["checkpoint"]) / "enhancer" / "enhancer.safetensors").is_file():
        return {}
    found = {}
    for steps in (0, 25):
        out = folder / "jobs" / f"quick-{steps}"
        shutil.rmtree(out, ignore_errors=True)
        flags = [*learning(folder, about, out, steps), *shared_flags(folder, about, device)]
        found[person(steps)] = [sys.executable, *flags]
    return found


def seconds_of(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Wall-clock seconds of a process, its start included.

    Raises: StackError with what it wrote to standard error, if it fails.
    """
    started = time.perf_counter()
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.stderr.write(run.stderr)
        ending = f"{' '.join(command[1:4])} ... ended with exit code {run.returncode}"
        raise StackError(f"{ending}\n{run.stderr}")
    return time.perf_counter() - started
