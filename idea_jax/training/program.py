"""The step of many people as one program over the devices of a mesh.

It is lowered from shapes alone, and the frozen weights are placed where it wants them.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from idea_jax.config.settings import TrainConfig
from idea_jax.data import text
from idea_jax.faces import models as face_models
from idea_jax.formats import enhancer as enhancers
from idea_jax.method import condition, shared
from idea_jax.models import sd
from idea_jax.pytrees import abstract
from idea_jax.runtime import devices
from idea_jax.training.start import first_values
from idea_jax.training.step import (
    IdentityState,
    Metrics,
    Photos,
    draw_and_step,
    evaluate,
    init_state,
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


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6), donate_argnums=8)
def step_people(
    model: sd.StableDiffusion,
    method: condition.Method,
    optimizer: optax.GradientTransformation,
    size: int,
    mesh: Mesh,
    is_sharded: bool,
    room: int,
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
      size: samples of a step of one person; a multiple of the mesh's `data`.
      is_sharded: the frozen weights are split over `data` as `shard_specs` says, and put together
        where they are used.
      room: how many steps one call takes at most; all of them are one program, for which the
        devices need the host once.
      states, photos: of all people, stacked; donated and read respectively. I is a multiple of the
        mesh's `identity`.
      key: of the run; what is drawn for a person depends on it and on their step alone.
      last: int32[I]; whose state has taken as many steps already keeps it, so 0 is an empty place.
      count: int32[], steps that this call takes, from 1 to `room`.

    Returns: the states, and metrics with leaves [room, I], of which `count` rows are filled.
    """
    parts = mesh.shape["data"]
    gather = gatherer(frozen, mesh) if is_sharded else None
    step = functools.partial(
        *(draw_and_step, model, method, optimizer, size),
        data_axis="data" if parts > 1 else None,
        gather=gather,
    )

    def step_one(frozen, state, photos, key, last):
        taken, metrics = step(frozen, state, photos, key)
        is_open = state.step < last
        return jax.tree.map(lambda new, old: jnp.where(is_open, new, old), taken, state), metrics

    of_people = P("identity")
    spread = jax.shard_map(
        jax.vmap(step_one, in_axes=(None, 0, 0, None, 0)),
        mesh=mesh,
        in_specs=(
            shard_specs(frozen, parts) if gather else P(),
            *(of_people, of_people, P(), of_people),
        ),
        out_specs=of_people,
        check_vma=False,  # Pallas' kernels do not say over which axes their results vary
    )

    def take(states):
        return spread(frozen, states, photos, key, last)

    if room == 1:
        states, metrics = take(states)
        return states, jax.tree.map(lambda leaf: leaf[None], metrics)
    of_rows = NamedSharding(mesh, P(None, "identity"))

    def rows_for(leaf):
        return jax.lax.with_sharding_constraint(jnp.zeros((room, *leaf.shape), leaf.dtype), of_rows)

    def take_next(number, carry):
        states, rows = carry
        states, metrics = take(states)
        return states, jax.tree.map(lambda row, leaf: row.at[number].set(leaf), rows, metrics)

    rows = jax.tree.map(rows_for, jax.eval_shape(take, states)[1])
    return jax.lax.fori_loop(0, count, take_next, (states, rows))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def evaluate_people(
    model: sd.StableDiffusion,
    method: condition.Method,
    mesh: Mesh,
    is_sharded: bool,
    frozen: sd.Frozen,
    states: IdentityState,
    photos: Photos,
    key: jax.Array,
    due: jax.Array,
) -> IdentityState:
    """`evaluate` of many people, as `step_people` is the step of many.

    Args:
      due: bool[I], who is evaluated; the others stay as they are. The rest as in `step_people`.
    """
    gather = gatherer(frozen, mesh) if is_sharded else None

    def evaluate_one(frozen, state, photos, key, due):
        whole = gather(frozen) if gather else frozen
        evaluated = evaluate(model, method, whole, state, photos, key)
        return jax.tree.map(lambda new, old: jnp.where(due, new, old), evaluated, state)

    of_people = P("identity")
    spread = jax.shard_map(
        jax.vmap(evaluate_one, in_axes=(None, 0, 0, None, 0)),
        mesh=mesh,
        in_specs=(
            shard_specs(frozen, mesh.shape["data"]) if gather else P(),
            *(of_people, of_people, P(), of_people),
        ),
        out_specs=of_people,
        check_vma=False,  # every device on `data` evaluates all samples: what they share is equal
    )
    return spread(frozen, states, photos, key, due)


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


def lower_step(
    cfg: TrainConfig,
    method: condition.Method,
    model: sd.StableDiffusion,
    optimizer: optax.GradientTransformation,
    layout: devices.Layout,
    pictures: int,
    side: int,
    room: int,
    *,
    enhancer: enhancers.Enhancer | None = None,
) -> jax.stages.Lowered:
    """The program of `Work.step`, from shapes alone: before there are weights.

    The states are those that `begin` makes, the photos those of `encode_pixels` and `group.fill`.

    Args:
      method, ..., room, enhancer: as in `Work`.
    """
    shapes, mesh = frozen_shapes(model, enhancer), layout.mesh

    def one() -> tuple[IdentityState, Photos]:
        start = np.zeros((method.num_tokens, model.text.hidden_size))
        trainable, given = first_values(
            method, model, jax.random.key(0), enhancer, start, np.zeros(face_models.WIDTH)
        )
        latents = np.zeros(
            (pictures, 2, *(side // model.vae.downscale,) * 2, model.vae.latent_channels),
            np.float32,
        )
        ids = np.zeros((len(text.TEMPLATES), model.text.max_position_embeddings), np.int32)
        return init_state(optimizer, trainable, given), Photos(latents, latents, np.int32(0), ids)

    of_one = (*jax.eval_shape(one), jax.ShapeDtypeStruct((), np.int32))
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((layout.places, *x.shape), x.dtype), of_one
    )
    states, photos, last = abstract(stacked, NamedSharding(mesh, P("identity")))
    return step_people.lower(
        model,
        method,
        optimizer,
        cfg.train_batch_size,
        mesh,
        cfg.shard_frozen,
        room,
        abstract(shapes, frozen_shardings(shapes, mesh, cfg.shard_frozen)),
        states,
        photos,
        jax.random.key(cfg.seed),
        last,
        np.int32(1),
    )
