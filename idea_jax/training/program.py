"""The step of many people as one program over the devices of a mesh.

It is lowered from shapes alone, and the frozen weights are placed where it wants them.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from idea_jax.data import text
from idea_jax.faces import models as face_models
from idea_jax.formats import enhancer as enhancers
from idea_jax.method import condition, shared
from idea_jax.models import sd
from idea_jax.models.unet import SIZE_IDS
from idea_jax.pytrees import abstract
from idea_jax.runtime import traces
from idea_jax.training.start import first_values
from idea_jax.training.step import (
    IdentityState,
    Metrics,
    Photos,
    check_plateau,
    draw_batch,
    init_state,
    train_step,
)


def shard_axes(frozen: sd.Frozen, parts: int) -> sd.Frozen:
    """Which axis of each frozen weight is split into `parts`: the longest that can be; -1: none.

    Vectors stay whole: there are many of them, and they are a thousandth of the weights.

    Args:
      frozen: arrays or their shapes.
    """

    def axis_of(leaf):
        lengths = [side if side % parts == 0 else 0 for side in leaf.shape]
        longest = max(lengths, default=0)
        return lengths.index(longest) if longest and leaf.ndim > 1 and parts > 1 else -1

    return jax.tree.map(axis_of, frozen)


def shard_specs(frozen: sd.Frozen, parts: int) -> sd.Frozen:
    """The partition of each frozen weight over the mesh axis `data`, as `shard_axes` splits it."""

    def spec(axis):
        return P() if axis < 0 else P(*(None,) * axis, "data")

    return jax.tree.map(spec, shard_axes(frozen, parts))


@dataclass(frozen=True)
class Program:
    """All that the step of people is compiled for, besides the shapes of its arrays.

    Attributes:
      batch_size: samples of a step of one person; a multiple of the mesh's `data`.
      mesh: of devices, with the axes `identity` and `data`; None for a person alone, without one.
      shard_frozen: the frozen weights are split over `data` as `shard_specs` says, and put together
        where they are used.
      steps_per_call: how many steps one call takes at most; all of them are one program, for which
        the devices need the host once.
    """

    model: sd.StableDiffusion
    method: condition.Method
    optimizer: optax.GradientTransformation
    batch_size: int
    mesh: Mesh | None = None
    shard_frozen: bool = False
    steps_per_call: int = 1


def draw_and_step(
    program: Program,
    frozen: sd.Frozen,
    state: IdentityState,
    photos: Photos,
    key: jax.Array,
    *,
    data_axis: str | None = None,
    gather: Callable[[sd.Frozen], sd.Frozen] | None = None,
) -> tuple[IdentityState, Metrics]:
    """Draws the batch of the state's step and takes the step: one program, one dispatch.

    Args:
      data_axis, gather: as in `train_step`; the program's samples are those over all devices of
        that axis, and the batch is cut to this device's part here.
    """
    model, size = program.model, program.batch_size
    batch = draw_batch(model, photos, key, state.step, size)
    if data_axis is not None:
        # Each device draws all samples, which costs next to nothing, and keeps its own: the
        # numbers are then those of one device.
        part = size // jax.lax.axis_size(data_axis)
        first = jax.lax.axis_index(data_axis) * part
        batch = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, part), batch)
    step = functools.partial(train_step, model, program.method, program.optimizer)
    return step(frozen, state, batch, data_axis=data_axis, gather=gather)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def step_people(
    program: Program,
    frozen: sd.Frozen,
    states: IdentityState,
    photos: Photos,
    key: jax.Array,
    last: jax.Array,
    count: jax.Array,
) -> tuple[IdentityState, Metrics]:
    """Steps of I people at once: `draw_and_step`, vmapped over people, over a mesh's devices.

    People are spread over the axis `identity`, on which nothing is communicated, and each person's
    samples over the axis `data`, on which the gradients are averaged in one all-reduce. The frozen
    weights have no axis for people, so each product with them, convolutions included, stays one
    product over the samples of all people.

    Compiled once for all people who are trained with the same method and optimiser object.

    Args:
      states, photos: of all people, stacked; donated and read respectively. I is a multiple of the
        mesh's `identity`.
      key: of the run; what is drawn for a person depends on it and on their step alone.
      last: int32[I]; whose state has taken as many steps already keeps it, so 0 is an empty place.
      count: int32[], steps that this call takes, from 1 to the program's `steps_per_call`.

    Returns: the states, and metrics with leaves [steps_per_call, I], of which `count` rows are
      filled.
    """
    frozen = without_vae(frozen)
    gather = gatherer(frozen, program.mesh) if program.shard_frozen else None
    data_axis = "data" if program.mesh.shape["data"] > 1 else None

    def step_one(frozen, state, photos, key, last):
        taken, metrics = draw_and_step(
            program, frozen, state, photos, key, data_axis=data_axis, gather=gather
        )
        is_open = state.step < last
        return jax.tree.map(lambda new, old: jnp.where(is_open, new, old), taken, state), metrics

    spread = over_people(program, frozen, step_one)

    def take(states):
        return spread(frozen, states, photos, key, last)

    if program.steps_per_call == 1:
        states, metrics = take(states)
        return states, jax.tree.map(lambda leaf: leaf[None], metrics)
    of_rows = NamedSharding(program.mesh, P(None, "identity"))

    def rows_for(leaf):
        rows = jnp.zeros((program.steps_per_call, *leaf.shape), leaf.dtype)
        return jax.lax.with_sharding_constraint(rows, of_rows)

    def take_next(number, carry):
        states, rows = carry
        states, metrics = take(states)
        return states, jax.tree.map(lambda row, leaf: row.at[number].set(leaf), rows, metrics)

    rows = jax.tree.map(rows_for, jax.eval_shape(take, states)[1])
    return jax.lax.fori_loop(0, count, take_next, (states, rows))


# How `step_people` is kept: its results are states as it was given, and metrics.
STEP = traces.KeptFunction(
    "step_people", (0,), (2,), lambda program, frozen, states, *_: (states, Metrics(0, 0, 0, 0, 0))
)


def take_steps(program: Program, *arguments: Any) -> tuple[IdentityState, Metrics]:
    """`step_people`, which is not traced anew if `lower_step` has found it as it was traced."""
    return traces.call(STEP, step_people, program, *arguments)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def check_plateaus(
    program: Program,
    frozen: sd.Frozen,
    states: IdentityState,
    photos: Photos,
    key: jax.Array,
    due: jax.Array,
) -> IdentityState:
    """`check_plateau` of many people, as `step_people` is the step of many.

    Args:
      due: bool[I], who is looked at; the others stay as they are. The rest as in `step_people`.
    """
    frozen = without_vae(frozen)
    gather = gatherer(frozen, program.mesh) if program.shard_frozen else None

    def check_one(frozen, state, photos, key, due):
        whole = gather(frozen) if gather else frozen
        checked = check_plateau(program.model, program.method, whole, state, photos, key)
        return jax.tree.map(lambda new, old: jnp.where(due, new, old), checked, state)

    return over_people(program, frozen, check_one)(frozen, states, photos, key, due)


def without_vae(frozen: sd.Frozen) -> sd.Frozen:
    """The weights that a step reads: photos were encoded before. As an argument that nothing
    reads, the autoencoder would still have to be on each device of the step."""
    return frozen._replace(vae={})


def over_people(program: Program, frozen: sd.Frozen, one: Callable) -> Callable:
    """A function of (frozen, state, photos, key, number) of one person, for many over the mesh."""
    parts, of_people = program.mesh.shape["data"], P("identity")
    of_frozen = shard_specs(frozen, parts) if program.shard_frozen and parts > 1 else P()
    return jax.shard_map(
        jax.vmap(one, in_axes=(None, 0, 0, None, 0)),
        mesh=program.mesh,
        in_specs=(of_frozen, of_people, of_people, P(), of_people),
        out_specs=of_people,
        # Pallas' kernels do not say over which axes their results vary; and where every device on
        # `data` computes the same, what they share is equal.
        check_vma=False,
    )


def gatherer(frozen: sd.Frozen, mesh: Mesh) -> Callable[[sd.Frozen], sd.Frozen] | None:
    """What puts shards of the frozen weights together, inside a `jax.shard_map`; None for one."""
    parts = mesh.shape["data"]
    if parts == 1:
        return None
    axes = shard_axes(frozen, parts)

    def whole(leaf, axis):
        return leaf if axis < 0 else jax.lax.all_gather(leaf, "data", axis=axis, tiled=True)

    return lambda shards: jax.tree.map(whole, shards, axes)


def place_frozen(frozen: sd.Frozen, mesh: Mesh, is_sharded: bool) -> sd.Frozen:
    """The frozen weights on every device of a mesh: whole, or split over its axis `data`."""
    return jax.device_put(frozen, frozen_shardings(frozen, mesh, is_sharded))


def frozen_shardings(frozen: sd.Frozen, mesh: Mesh, is_sharded: bool) -> sd.Frozen:
    """Where `place_frozen` puts each weight; of weights or their shapes."""
    if is_sharded:
        specs = shard_specs(frozen, mesh.shape["data"])
    else:
        specs = jax.tree.map(lambda _: P(), frozen)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def frozen_shapes(model: sd.StableDiffusion, enhancer: enhancers.Enhancer | None) -> sd.Frozen:
    """Shapes and types of the frozen weights that people are trained against."""

    def as_type(tree, dtype):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree)

    shapes = as_type(sd.shapes(model), model.dtype)
    ours = shared.frozen_part(enhancer.shared) if enhancer is not None else {}
    return shapes._replace(shared=as_type(ours, np.float32))


class Shape(NamedTuple):
    """Sizes of the arrays that a step is compiled for.

    places: people in a step; photo_slots: photos of a person that there is room for; side: of the
    training images, in pixels.
    """

    places: int
    photo_slots: int
    side: int


def lower_step(
    program: Program,
    shape: Shape,
    seed: int,
    enhancer: enhancers.Enhancer | None,
    optimizer: Mapping | None = None,
) -> jax.stages.Lowered:
    """`step_people`, lowered from shapes alone: before there are weights.

    Args:
      seed: of the run.
      enhancer: the shared one, if people begin with it.
      optimizer: all that the program's optimiser is made of; None if it is not known, so that the
        step is traced anew in each run.
    """
    frozen, states, photos, last = step_shapes(program, shape, enhancer)
    arguments = program, frozen, states, photos, jax.random.key(seed), last, np.int32(1)
    if optimizer is None:
        return step_people.lower(*arguments)
    about = [value for name, value in vars(program).items() if name != "optimizer"]
    return traces.lower(STEP, step_people, arguments, [dict(optimizer), *about])


def step_shapes(
    program: Program, shape: Shape, enhancer: enhancers.Enhancer | None
) -> tuple[sd.Frozen, IdentityState, Photos, jax.ShapeDtypeStruct]:
    """Frozen weights, states, photos and ends that `step_people` takes: shapes, types, places.

    The states are those that `begin` makes, the photos those of `encode_pixels` and `group.fill`.
    """
    model, method = program.model, program.method
    shapes = frozen_shapes(model, enhancer)

    def one() -> tuple[IdentityState, Photos]:
        start = sd.each_encoder(
            model, lambda config: np.zeros((method.num_tokens, config.hidden_size))
        )
        trainable, given = first_values(
            model, method, jax.random.key(0), enhancer, start, np.zeros(face_models.WIDTH)
        )
        height = shape.side // model.vae.downscale
        latents = np.zeros(
            (shape.photo_slots, 2, height, height, model.vae.latent_channels), np.float32
        )
        ids = np.zeros((len(text.TEMPLATES), model.text.max_position_embeddings), np.int32)
        sizes = None
        if len(model.encoders) > 1:
            sizes = np.zeros((shape.photo_slots, SIZE_IDS), np.int32)
        state = init_state(program.optimizer, trainable, given)
        return state, Photos(latents, latents, np.int32(0), ids, sizes)

    of_one = (*jax.eval_shape(one), jax.ShapeDtypeStruct((), np.int32))
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((shape.places, *x.shape), x.dtype), of_one
    )
    states, photos, last = abstract(stacked, NamedSharding(program.mesh, P("identity")))
    frozen = abstract(shapes, frozen_shardings(shapes, program.mesh, program.shard_frozen))
    return frozen, states, photos, last
