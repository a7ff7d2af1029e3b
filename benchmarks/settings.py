"""What every stack must agree on; imports neither JAX nor PyTorch."""

import json
from dataclasses import dataclass
from pathlib import Path

COMPARED_STEPS = 3  # training steps whose results are compared before anything is timed
COMPARED_SAMPLING = (2, 2)  # pictures and sampling steps, the same
RATE, REG_WEIGHT, WEIGHT_DECAY, EPSILON, BETA = 1e-3, 8e-4, 1e-2, 1e-7, 0.4
GUIDANCE = 7.5
DECODED = 8  # pictures that are decoded at once, what `sampling.programs.DECODED` is
RANK = 4  # of the low-rank deltas of keys and values
# Measures that are taken back one at a time, by device, and what the time without each is compared
# with: each step of "moments" and "trainables" is also a call of its own, on one device, and there
# is no flash attention in float32. On a CPU a step is one call anyway, and cores are devices.
ABLATIONS = {
    "cpu": {"cores": "best", "moments": "cores", "trainables": "cores"},
    "gpu": {
        "calls": "best",
        "moments": "calls",
        "trainables": "calls",
        "flash": "best",
        "bfloat16": "flash",
    },
}


@dataclass(frozen=True)
class Workload:
    """Sizes of what is timed.

    Attributes:
      batch: samples per training step.
      block: training steps in one measurement.
      room: steps in one call of this project, what `--steps_per_call` is by default.
      pictures: pictures in one measurement of the sampler; 1 is measured too where `single`.
      steps: sampling steps, each with guidance.
      repeats: measurements of each kind.
      ablations: whether more than training and drawing is measured: several people in a step,
        measures that are taken back one by one, kernels and convolutions. The gradient of a
        full-size UNet does not fit the memory of a small machine.
    """

    name: str
    batch: int
    block: int
    room: int
    pictures: int
    steps: int
    repeats: int
    single: bool = True
    ablations: bool = True


WORKLOADS = {
    ("tiny", "cpu"): Workload("tiny", 2, 2, 1, 2, 2, 2),
    ("tiny", "gpu"): Workload("tiny", 2, 8, 8, 2, 2, 2),
    ("mini", "cpu"): Workload("mini", 8, 10, 1, 16, 50, 7),
    ("mini", "gpu"): Workload("mini", 8, 48, 8, 16, 50, 7),
    ("mid", "cpu"): Workload("mid", 4, 4, 1, 4, 5, 5, single=False),
    ("mid", "gpu"): Workload("mid", 8, 24, 8, 16, 50, 7),
    # Steps one after the other, as in a training: the first one after a pause takes much longer.
    ("sd21", "cpu"): Workload("sd21", 1, 4, 1, 1, 2, 2, single=False, ablations=False),
    ("sd21", "gpu"): Workload("sd21", 8, 8, 8, 32, 50, 5),
}

# Whole jobs, by workload.
JOBS = {
    "tiny": {"steps": 2, "batch": 2, "pictures": 2, "sampling_steps": 2},
    "mini": {"steps": 320, "batch": 8, "pictures": 16, "sampling_steps": 50},
    "mid": {"steps": 10, "batch": 4, "pictures": 4, "sampling_steps": 10},
    "sd21": {"steps": 320, "batch": 8, "pictures": 16, "sampling_steps": 50},
}


def drawing(pictures: int, steps: int) -> str:
    """What a measurement of the sampler is called."""
    return f"drawing {pictures} at once, {steps} steps"


def read(folder: Path) -> dict:
    """What `workloads.write` has told about the inputs in a folder."""
    return json.loads((folder / "workload.json").read_text())
