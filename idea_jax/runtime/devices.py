"""The devices of a run: the mesh of a process, its share of the people, several processes."""

import functools
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

# The key-value store of the processes has no public name; orbax takes it from here, too.
from jax._src.distributed import global_state
from jax.experimental.multihost_utils import live_devices
from jax.sharding import AxisType, Mesh

from idea_jax.errors import InputError
from idea_jax.runtime.files import json_digest
from idea_jax.runtime.memory import keep_freed
from idea_jax.runtime.signals import Interrupted, first_signal

log = logging.getLogger(__name__)

AXES = ("identity", "data")

# Cores that are used as devices of their own, at most, and for weights of so many bytes, at most:
# each device holds all weights.
CORES, SMALL = 8, 2**30

# Whether a CPU's programs run in threads of JAX's own; read once, when JAX looks for devices.
ASYNC = "jax_cpu_enable_async_dispatch"

# Seconds that process 0 still waits for the others once it was told to stop. With a step, a
# checkpoint and the end of JAX's service it stays below the 30 that schedulers give.
GRACE = 20
# Seconds between two looks at what the others have done, and for which they wait for process 0.
PULSE, LISTING = 30, 300
# Where processes take steps together: seconds between two signs of life, and without one until a
# process counts as lost. A process that compiles still gives them: they are a thread's.
BEAT, LOST = 2.0, 90.0

# Settings of JAX that change numbers, as they are here whatever the environment says.
PINNED = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_numpy_dtype_promotion": "standard",
    "jax_disable_jit": False,
}


class DevicesError(InputError, ValueError):
    """The devices that are there are not those that were asked for."""


def pin_settings() -> None:
    """Sets what changes numbers in JAX to what this package is written for, and says so.

    The precision of matrix products is left to whoever sets it, as it trades time for rounding.
    """
    for name, value in PINNED.items():
        if getattr(jax.config, name) != value:
            log.warning(
                "%s is %s in the environment and would change the results; it is %s here",
                name.upper(),
                getattr(jax.config, name),
                value,
            )
            jax.config.update(name, value)
    precision = jax.config.jax_default_matmul_precision
    if precision is not None:
        log.warning("JAX_DEFAULT_MATMUL_PRECISION is %s: results differ by it", precision)


def check_backend() -> None:
    """Starts JAX's devices; where `use_cores` has asked for it, a CPU keeps what calls have freed.

    Raises:
      DevicesError: those that JAX_PLATFORMS names are not there.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # the latter of CUDA, without a word
        asked = jax.config.jax_platforms
        why = str(error) or "its plugin did not start"
        raise DevicesError(
            f"JAX has no device of JAX_PLATFORMS={asked} ({why}); "
            "install JAX for it (for NVIDIA: pip install 'jax[cuda13]', for a TPU: 'jax[tpu]') and "
            "see whether its driver works, or unset JAX_PLATFORMS to use what is there"
        ) from error
    if jax.default_backend() == "cpu" and not jax.config.read(ASYNC):
        keep_freed()


def use_cores(checkpoint: Path) -> None:
    """Decides how a CPU is used, for a model of this size; must come before JAX looks for devices.

    Of a small model each core is a device. XLA's programs for CPUs hardly gain from a second core:
    their operations are short. Half of the samples, people or pictures on each core take little
    more than half of the time. Whoever has said how many devices a CPU is (JAX_NUM_CPU_DEVICES,
    XLA_FLAGS) is obeyed. The memory of each call is kept for the next one.

    The programs of a large model run in the thread that calls them, and there their memory can be
    kept. In a thread of JAX's own the C library has the system map what a call needs, and unmap it
    after the call, whatever `keep_freed` says.

    Args:
      checkpoint: folder of the model; where it is no folder yet, nothing is known of its size.
    """
    is_told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    size = sum(file.stat().st_size for file in checkpoint.glob("*/*.safetensors"))
    if size > SMALL:
        jax.config.update(ASYNC, False)  # without any effect where a GPU or TPU is found
    if not 0 < size <= SMALL:
        return
    keep_freed()
    if is_told or jax.config.jax_num_cpu_devices != -1:
        return
    with suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", min(cores(), CORES))


def cores() -> int:
    """Returns how many cores this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS and Windows
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def start_processes() -> None:
    """Joins the processes of a run; must come before anything else touches JAX.

    Launchers that JAX knows (TPU pods, SLURM, Open MPI, Kubernetes) say everything themselves;
    others set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      DevicesError: the processes did not find each other.
    """
    numbers = {}
    for name, variable in (
        ("num_processes", "JAX_NUM_PROCESSES"),
        ("process_id", "JAX_PROCESS_ID"),
    ):
        if variable in os.environ:
            try:
                numbers[name] = int(os.environ[variable])
            except ValueError as error:
                raise DevicesError(
                    f"{variable} must be a whole number, got {os.environ[variable]!r}"
                ) from error
    # Processes train people of their own: one that ends must not take the others with it. And a
    # SIGTERM is for the training to see, not for a service that tells others of it.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**numbers)
    except (RuntimeError, ValueError) as error:
        raise DevicesError(
            f"--distributed: the processes did not find each other ({error}); on a launcher that "
            "JAX does not know set JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process"
        ) from error
    check_backend()
    log.info("process %d of %d", jax.process_index(), jax.process_count())


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes of a run, and leaves them so that none of them ends another.

    Process 0 holds what the others cannot live without, so it leaves last: after an error once all
    others have ended, after SIGINT or SIGTERM in any case after `GRACE` seconds. A signal that
    nothing else handles ends the block in order, with the exit code 130 or 143; a second one ends
    the process at once.

    Raises:
      DevicesError: the processes did not find each other.
    """
    start_processes()
    with first_signal(lambda signum: sys.exit(128 + signum)):
        try:
            yield
        except Interrupted:
            raise
        except Exception as error:
            log.warning("process %d ends: %s", jax.process_index(), error)
            await_others()
            raise
        finally:
            leave()


def leave() -> None:
    """Leaves the other processes of a run; process 0 waits for them, no longer than `GRACE`."""
    await_others(GRACE)
    is_watched = jax.process_count() > 1 and jax.process_index() == 0
    jax.distributed.shutdown()
    if is_watched:
        # Where they are still there, this is what ends the call in which the thread waits. If it
        # came back later, while the interpreter ends, Python would abort the process.
        watch_others().wait(BEAT)


def await_others(limit: float = math.inf, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Waits, in process 0, until each other process has left or died; no longer than `limit`.

    One that was killed counts as dead when nothing was heard of it for 100 seconds.

    Args:
      meanwhile: is called every `PULSE` seconds.
    """
    if jax.process_count() == 1 or jax.process_index() > 0:
        return
    are_gone, until = watch_others(), time.monotonic() + limit
    while not are_gone.wait(min(PULSE, until - time.monotonic())) and time.monotonic() < until:
        meanwhile()


@functools.cache
def watch_others() -> threading.Event:
    """What is set once each other process has left or died.

    A thread waits for it, because JAX's own wait has no limit and hears no signal.
    """
    are_gone = threading.Event()

    def wait():
        # It is a wait for all to come here or to go, and nobody else comes here.
        with suppress(Exception), live_devices(jax.devices()):
            pass
        are_gone.set()

    threading.Thread(target=wait, daemon=True).start()
    return are_gone


@contextmanager
def together() -> Iterator[None]:
    """Ends this process, with one message, once another one has failed or was lost.

    For processes that take every step together, where each would wait for a lost one for ever, in a
    call that hears nothing. What they have written is whole, so nothing is lost but the steps since
    the newest checkpoint.

    Raises:
      DevicesError: the block met an error of the devices, or of the network between them.
    """
    if jax.process_count() == 1:
        yield
        return
    client, own, is_over = global_state.client, jax.process_index(), threading.Event()
    others = [number for number in range(jax.process_count()) if number != own]

    def key(number):
        return f"idea_jax/beat/{number}"

    def watch():
        seen = {number: ("", time.monotonic()) for number in others}
        beat = 0
        while not is_over.wait(BEAT):
            beat += 1
            for number in others:
                said = ""
                with suppress(jax.errors.JaxRuntimeError):  # of a lost process 0, too
                    said = client.key_value_try_get(key(number))
                if said and said != seen[number][0]:
                    seen[number] = said, time.monotonic()
                if said == "failed" or time.monotonic() - seen[number][1] > LOST:
                    end_lost(number, said)
                if said == "done":
                    seen[number] = said, math.inf
            with suppress(jax.errors.JaxRuntimeError):
                client.key_value_set(key(own), str(beat), allow_overwrite=True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    last = "failed"
    try:
        yield
        last = "done"
    except Interrupted:  # all stop after the same step
        last = "done"
        raise
    except jax.errors.JaxRuntimeError as error:
        raise DevicesError(
            f"a step could not be taken ({str(error).splitlines()[0][:200]}); if another process "
            "was lost, start all processes again with --resume_from_checkpoint latest"
        ) from error
    finally:
        is_over.set()
        thread.join(BEAT)
        with suppress(jax.errors.JaxRuntimeError):
            client.key_value_set(key(own), last, allow_overwrite=True)


def end_lost(number: int, said: str) -> None:
    """Ends this process because another one is gone."""
    why = "failed" if said == "failed" else f"gave no sign of life for {LOST:g} seconds"
    print(
        f"error: process {number} {why}, and no step can be taken without it; start all processes "
        "again with --resume_from_checkpoint latest",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def check_same(names: Sequence[str], what: str, sources: str) -> None:
    """Makes sure that this process shares out the same work, in the same order, as process 0.

    Otherwise some of it would be done twice, and some by nobody.

    Args:
      names: of the people, or hashes of the rows.
      what: they are, for the message.
      sources: where they come from, for the message.

    Raises:
      DevicesError: they differ, or process 0 does not say what it has.
    """
    if jax.process_count() == 1:
        return
    ours = f"{len(names)} {what}, {json_digest(names)[:16]}"
    client, key = global_state.client, f"idea_jax/{what}"
    if jax.process_index() == 0:
        client.key_value_set(key, ours)
        return
    theirs, until = None, time.monotonic() + LISTING
    while theirs is None and time.monotonic() < until:
        with suppress(jax.errors.JaxRuntimeError):  # not yet; short, so that signals are heard
            theirs = client.blocking_key_value_get(key, 1000)
    if theirs is None:
        raise DevicesError(f"process 0 did not say within {LISTING} seconds which {what} it has")
    if theirs != ours:
        raise DevicesError(
            f"process {jax.process_index()} sees other {what} than process 0 ({ours}; there: "
            f"{theirs}); {sources} must name the same ones everywhere"
        )


def own_share(names: Sequence[str]) -> list[str]:
    """Those of the people that this process trains: every n-th, of n processes."""
    return list(names)[jax.process_index() :: jax.process_count()]


def host() -> jax.Device:
    """The CPU as a device, on which what is too much for one accelerator can be held.

    Raises:
      DevicesError: JAX was told to leave it out.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise DevicesError(
            "--shard_frozen reads the weights on the CPU before it splits them; JAX_PLATFORMS must "
            "name cpu as well, such as cuda,cpu"
        ) from error


def steps_per_call() -> int:
    """How many training steps one call to the devices takes, if nothing else is asked for.

    On an accelerator steps are short, and several in one program spare the host. On a CPU the host
    has nothing to wait for, and a step of a large network may take a minute, after which a signal
    to stop must be heard.
    """
    return 1 if jax.default_backend() == "cpu" else 8


@dataclass(frozen=True)
class Layout:
    """How a process spreads its work.

    Attributes:
      mesh: of this process's devices, with the axes `identity` and `data`.
      places: people in one step of this process, a multiple of the mesh's `identity`.
    """

    mesh: Mesh
    places: int

    def halved(self) -> "Layout | None":
        """The same devices with half of the people in a step; None if each device has one."""
        rows = self.mesh.shape["identity"]
        places = self.places // 2 // rows * rows
        return Layout(self.mesh, places) if places else None


def layout(
    asked: dict[str, int] | None,
    identities_per_step: int | None,
    people: int,
    batch: int,
    local: Sequence[jax.Device] | None = None,
) -> Layout:
    """Spreads the devices of this process over people and over the samples of a person.

    The mesh that is asked for is that of all processes together. Its `identity` axis is cut into
    equal parts, one for each process: people need nothing of each other, so no program runs on
    more than one process, and one that fails or is slow stops nobody else's steps.

    Args:
      asked: sizes of the axes; None: all devices on `identity` if there are several people, else
        on `data`.
      identities_per_step: people in one step, over all processes; None: as many as `identity`.
      people: of this process.
      batch: samples of a person's step.
      local: devices of this process that may be used; default: all.

    Raises:
      DevicesError: the sizes do not fit the devices, the processes or the batch.
    """
    processes, local = jax.process_count(), list(local or jax.local_devices())
    if asked is None and people > 1:
        # No more devices than people, and as many as divide those of a step.
        each = (identities_per_step or 0) // processes  # 0 is a multiple of all
        sizes = range(min(len(local), people), 0, -1)
        asked = {"identity": processes * next(n for n in sizes if each % n == 0), "data": 1}
    elif asked is None:
        data = next(n for n in range(len(local), 0, -1) if batch % n == 0)
        asked = {"identity": processes, "data": data}
    identity, data = asked["identity"], asked["data"]
    if identity % processes:
        raise DevicesError(
            f"--mesh identity={identity} cannot be divided over {processes} processes: each trains "
            f"people of its own; take a multiple of {processes}"
        )
    rows = identity // processes
    if rows * data > len(local):
        raise DevicesError(
            f"--mesh identity={identity},data={data} needs {rows * data} devices in each process, "
            f"and there are {len(local)}; on a CPU, simulated ones are had with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={rows * data}"
        )
    if batch % data:
        raise DevicesError(
            f"--mesh data={data} cannot divide the {batch} samples of a step; take a "
            "--train_batch_size that is a multiple, or fewer devices on data"
        )
    each = identity if identities_per_step is None else identities_per_step
    if each % identity:
        raise DevicesError(
            f"--identities_per_step {each} is no multiple of --mesh identity={identity}"
        )
    used = np.array(local[: rows * data]).reshape(rows, data)
    if used.size < len(local):
        log.info("%d of %d devices are used", used.size, len(local))
    return Layout(Mesh(used, AXES, axis_types=(AxisType.Auto,) * 2), each // processes)
