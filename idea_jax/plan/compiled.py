"""Programs compiled for TPUs on a machine without one, where libtpu is installed."""

import importlib.util
import os
import re
import time
from typing import NamedTuple

import jax

from idea_jax.runtime import compile_cache, memory
from idea_jax.runtime.chips import Chip

# Of a chip that is named without one: the least that its compiler describes.
SMALLEST = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}


class Compiled(NamedTuple):
    """What XLA says of a program: bytes on a device, and how long it took to compile.

    arguments, temporary, code: None of a program that does not fit.
    code: of the program itself, which lies in the memory of a TPU, too.
    collectives: instructions of the program by kind, a loop's body counted once.
    """

    arguments: int | None
    temporary: int | None
    code: int | None
    total: int
    collectives: dict[str, int]
    seconds: float


def is_there() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def devices_of(name: str) -> list[jax.Device]:
    """The chips of a topology such as v5e:2x4, which need not be there."""
    # Without it a second process on this machine would be refused.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    kind, _, shape = name.partition(":")
    shape = shape or SMALLEST[kind]
    if shape in ("1x1", "1x1x1"):
        shape = SMALLEST[kind]
    return list(
        topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}").devices
    )


def compile_for(chip: Chip, name: str, count: int, lower) -> Compiled | None:
    """Compiles a program for the first chips of a topology; None for what is no TPU.

    Args:
      count: chips of one process, which the program runs on.
      lower: as of `work.Planned`.

    Raises:
      JaxRuntimeError: it cannot be compiled, for another reason than the chip's memory.
    """
    if chip.platform != "tpu" or not is_there():
        return None
    began = time.monotonic()
    lowered = lower(devices_of(name)[:count])
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = memory.needed_and_there(str(error))
        if not memory.is_out_of_memory(error) or sizes is None:
            raise
        return Compiled(None, None, None, int(sizes[0]), {}, time.monotonic() - began)
    stats, text = program.memory_analysis(), program.as_text()
    kinds = re.findall(
        r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    )
    return Compiled(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
        compile_cache.bytes_needed(program),
        {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        time.monotonic() - began,
    )
