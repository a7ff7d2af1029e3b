"""What accelerators can do, by their makers' own tables, and how much memory a device has."""

import re
from dataclasses import dataclass

import jax

from idea_jax.errors import InputError
from idea_jax.runtime.memory import host_memory

# Products of bfloat16 that a TPU takes for one product in float32.
PASSES = 6
_TPU, _NVIDIA = "https://cloud.google.com/tpu/docs", "https://www.nvidia.com/en-us/data-center"


class ChipError(InputError, ValueError):
    """No device of this name is known."""


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as `--device` has it.
      platform: JAX's: "tpu", "gpu" or "cpu".
      bf16, float32: most FLOP/s of products in these types; 0 where nothing is known.
      memory: bytes.
      usable: part of the memory that JAX takes.
      bandwidth: bytes/s of the memory; 0 where nothing is known.
      per_host: devices of one process.
      axes: of the topologies that a name may end in; 0 for a number of devices.
      source: where the numbers are from.
    """

    name: str
    platform: str
    bf16: float
    float32: float
    memory: int
    usable: float
    bandwidth: float
    per_host: int
    axes: int
    source: str

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in "float32" or "bfloat16"."""
        return self.float32 if dtype == "float32" else self.bf16

    def room(self) -> int:
        """Bytes that a program may use."""
        return int(self.memory * self.usable)


def _tpu(name, tera, gigabytes, bandwidth, *, per_host, axes):
    # XLA keeps a little of the memory for itself.
    numbers = tera * 1e12, tera * 1e12 / PASSES, int(gigabytes * 1e9), 0.98, bandwidth * 1e9
    return Chip(name, "tpu", *numbers, per_host, axes, f"{_TPU}/{name}")


def _gpu(name, tera, single, gigabytes, bandwidth):
    # JAX takes three quarters of a GPU's memory unless it is told otherwise. The products are
    # those of dense matrices; float32 is without TF32.
    numbers = tera * 1e12, single * 1e12, int(gigabytes * 1e9), 0.75, bandwidth * 1e9
    return Chip(name, "gpu", *numbers, 8, 0, f"{_NVIDIA}/{name}/ (SXM)")


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 275, 32, 1228, per_host=4, axes=3),
        _tpu("v5e", 197, 16, 819, per_host=4, axes=2),
        _tpu("v5p", 459, 95, 2765, per_host=4, axes=3),
        _tpu("v6e", 918, 32, 1640, per_host=4, axes=2),
        _gpu("a100", 312, 19.5, 80, 2039),
        _gpu("h100", 989, 67, 80, 3350),
        _gpu("h200", 989, 67, 141, 4800),
    )
}
# What JAX calls these devices: the most particular words come first.
KINDS = (
    (r"\bh200\b", "h200"),
    (r"\bh100\b", "h100"),
    (r"\ba100\b", "a100"),
    (r"tpu v6 ?(lite|e)", "v6e"),
    (r"tpu v5 ?(lite|e)", "v5e"),
    (r"tpu v5", "v5p"),
    (r"tpu v4$", "v4"),
)
# One host of these has all of them.
WHOLE_HOSTS = {("v5e", 8), ("v6e", 8)}


def find(name: str) -> tuple[Chip, int]:
    """The chip and the number of devices of a name such as v5e:2x4, h100:8, h200 or cpu.

    Raises:
      ChipError: there is no such device.
    """
    kind, _, shape = name.partition(":")
    chip = _cpu() if kind == "cpu" else CHIPS.get(kind)
    sides = shape.split("x") if shape else ["1"]
    sound = all(side.isdecimal() and int(side) for side in sides)
    if chip is None or not sound or (shape and len(sides) != max(chip.axes, 1)):
        raise ChipError(
            f"--device {name} is not known: expected one of {', '.join(CHIPS)} or cpu, and after a "
            "colon how many, such as h100:8, or for a TPU its topology, such as v5e:4x4 or "
            "v5p:2x2x1"
        )
    count = 1
    for side in sides:
        count *= int(side)
    return chip, count


def of_device(device: jax.Device) -> Chip:
    """The chip that a device of this process is; one of which nothing but its memory is known, if
    it is in no table here."""
    kind = device.device_kind.lower()
    for words, name in KINDS:
        if re.search(words, kind):
            return CHIPS[name]
    memory = room_of(device, 1) or 0
    return Chip(device.platform, device.platform, 0, 0, memory, 1, 0, 8, 0, "this machine")


def hosts_of(chip: Chip, count: int) -> int:
    """How many processes there are, one a host, for so many devices."""
    if (chip.name, count) in WHOLE_HOSTS or count <= chip.per_host or chip.platform == "cpu":
        return 1
    return -(-count // chip.per_host)


def _cpu() -> Chip:
    return Chip("cpu", "cpu", 0, 0, host_memory() or 0, 1, 0, 1, 0, "this machine")


def room_of(device: jax.Device, beside: int) -> int | None:
    """Bytes that a program may use on a device that is here; None: not known.

    Args:
      beside: devices of this process, which share the memory of a CPU.
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    total = host_memory()
    return total // beside if total and device.platform == "cpu" else None
