"""What a training step needs of each device, and how many people and devices share one.

All of it is computed from shapes: weights and states exactly, what is held in between as an
estimate (`costs.memory`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from idea_jax import costs
from idea_jax.formats import enhancer as enhancers
from idea_jax.models import sd
from idea_jax.training.program import (
    Program,
    Shape,
    shard_axes,
    step_people,
    step_shapes,
    without_vae,
)

# What is added to the estimate, by how far it came out below what was held for SD 2.1: 16% on a
# TPU at most, 29% on a GPU (docs/scale.md). Of a v5e XLA takes 15.75 GiB and a plan 14.6: between
# these is room for the rest, and for the program itself.
SPARE = {"tpu": 0.15}
SPARE_ELSEWHERE = 0.45
# Samples that a device takes in a step, at most: beyond them no measured device gained anything,
# and a step, after which alone a signal is heard, only takes longer.
MOST_SAMPLES = 32
FEW = 1.02  # times as long as the fastest arrangement, which is as good


class Need(NamedTuple):
    """Bytes on a device.

    weights: the frozen ones that the step reads. beside: the autoencoder's, which a run holds for
    photos and validation. states: of people, with optimiser and gradient accumulators. photos: the
    moments of their pictures and their texts. temporary: an estimate of what is held within a step;
    spare: for its error.
    """

    weights: int
    beside: int
    states: int
    photos: int
    temporary: int
    spare: int

    def total(self) -> int:
        """All of them."""
        return sum(self)


def spare_of(temporary: int, platform: str) -> int:
    """Bytes that are added to an estimate on JAX's platform of this name."""
    return int(temporary * SPARE.get(platform, SPARE_ELSEWHERE))


class Arrangement(NamedTuple):
    """How the devices of one process share people.

    identity, data: the mesh's axes. people: of a device, in one step. shard_frozen: whether the
    weights are split over `data`.
    """

    identity: int
    data: int
    people: int
    shard_frozen: bool

    def places(self) -> int:
        """People in a step of the process."""
        return self.identity * self.people


def traced(kernel: str) -> str:
    """The attention kernel with which a model is traced for what it holds: both keep the same, and
    splash is traced without its device."""
    return "splash" if kernel == "cudnn" else kernel


def mesh_of(identity: int, data: int) -> AbstractMesh:
    """A mesh without devices, for programs that are only looked at."""
    return AbstractMesh((identity, data), ("identity", "data"), axis_types=(AxisType.Auto,) * 2)


def trace(program: Program, shape: Shape, enhancer: enhancers.Enhancer | None):
    """The jaxpr of `step_people`; its mesh may be abstract."""
    frozen, states, photos, last = step_shapes(program, shape, enhancer)
    key = jax.eval_shape(lambda: jax.random.key(0))
    given = (frozen, states, photos, key, last, jax.ShapeDtypeStruct((), np.int32))
    step = step_people.__wrapped__
    return jax.make_jaxpr(lambda *given: step(program, *given))(*given).jaxpr


def device_bytes(tree) -> int:
    """Bytes of the part of shapes with shardings that lies on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


class Sizes:
    """What steps of one kind need, for any number of people and devices.

    What a step holds in between grows evenly with the samples of a device, so two small ones that
    are traced say it of all.

    Args:
      program: of any mesh and number of samples; it is traced with plain attention or a kernel, as
        its model says.
      shape: of any number of people.
      platform: JAX's, such as "tpu".
    """

    def __init__(
        self,
        program: Program,
        shape: Shape,
        enhancer: enhancers.Enhancer | None,
        *,
        platform: str,
    ):
        one = replace(program, mesh=mesh_of(1, 1), steps_per_call=1, shard_frozen=False)
        alone = shape._replace(places=1)

        def temporary(samples):
            jaxpr = trace(replace(one, batch_size=samples), alone, enhancer)
            return np.array(costs.memory(jaxpr, pads_kernels=platform == "tpu"))

        first, second = temporary(1), temporary(2)
        self.each, self.base = second - first, np.maximum(0, 2 * first - second)
        self.batch_size, self.platform = program.batch_size, platform
        self.frozen, states, photos, last = step_shapes(one, alone, enhancer)
        self.states, self.photos = device_bytes(states), device_bytes((photos, last))

    def need(self, how: Arrangement) -> Need:
        """What one device needs."""
        weights, beside = weights_of(self.frozen, how.data if how.shard_frozen else 1)
        each = how.people * self.states, how.people * self.photos
        peak = self.held(how).peak
        # XLA gathers early, so that nothing waits: of SD 2.1 and of SDXL it held half to all of
        # the gathered weights at once.
        gathered = weights_of(self.frozen, 1)[0] - weights
        return Need(weights, beside, *each, peak + gathered, spare_of(peak, self.platform))

    def held(self, how: Arrangement) -> costs.Memory:
        """What one device holds within a step, beside that, and what it moves."""
        samples = self.batch_size // how.data
        both = how.people * (self.base + samples * self.each)
        return costs.Memory(*map(int, both))


def weights_of(frozen: sd.Frozen, parts: int) -> tuple[int, int]:
    """Bytes on a device of the frozen weights that a step reads, and of the autoencoder's.

    Args:
      frozen: shapes.
      parts: devices over which they are split; 1: whole.
    """

    def size(leaf, axis):
        return leaf.size * np.dtype(leaf.dtype).itemsize // (parts if axis >= 0 else 1)

    bytes_each = jax.tree.map(size, frozen, shard_axes(frozen, parts))
    read, whole = (sum(jax.tree.leaves(t)) for t in (without_vae(bytes_each), bytes_each))
    return read, whole - read


def choose(
    need: Callable[[Arrangement], Need],
    *,
    devices: int,
    room: int | None,
    people: int,
    batch: int,
    places: int | None = None,
    shard_frozen: bool = False,
) -> Arrangement | None:
    """The arrangement in which all people are through first; None if none fits.

    A step is taken to last as long as a device has samples, and of arrangements that are as fast
    the one with the fewest devices on `data` is taken, which sends the least, and of these the one
    with the most people, which share what a step costs by itself. The weights are split only if
    nothing fits without.

    Args:
      need: of an arrangement.
      devices, people: of one process.
      room: bytes of a device; None for enough.
      batch: samples of a step of one person.
      places: people in one step of the process, if that is given.
      shard_frozen: split the weights in any case.
    """
    for is_split in (True,) if shard_frozen else (False, True):
        found = []
        for how in arrangements(devices, people, batch, places, is_split):
            if room is None or need(how).total() <= room:
                steps = -(-people // how.places())
                found.append((steps * how.people * batch / how.data, how))
        if found:
            best = min(time for time, _ in found)
            good = [how for time, how in found if time <= best * FEW]
            return min(good, key=lambda how: (how.data, -how.people))
    return None


def arrangements(
    devices: int, people: int, batch: int, places: int | None, is_split: bool
) -> Iterator[Arrangement]:
    """All that are worth a look, as `choose` takes these arguments."""
    for data in range(2 if is_split else 1, devices + 1):
        if batch % data:
            continue
        # No more rows than people, and as many as divide those of a step.
        limit = min(devices // data, people if places is None else places)
        rows = next(n for n in range(limit, 0, -1) if places is None or places % n == 0)
        most = max(1, MOST_SAMPLES * data // batch)
        counts = range(1, most + 1) if places is None else (places // rows,)
        for count in counts:
            # Beyond that a place would be empty in each step.
            if places is not None or rows * (count - 1) < people:
                yield Arrangement(rows, data, count, is_split)
