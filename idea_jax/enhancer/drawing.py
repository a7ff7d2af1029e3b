"""Pictures of many people at once: every row has keys and values and a number of its own."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from idea_jax.data.images import to_uint8
from idea_jax.models import sd
from idea_jax.sampling import programs

WHOLE = P()  # on every device


def mesh_of(devices: Sequence[jax.Device]) -> Mesh:
    """Devices in a row, on the axis `data`."""
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def put(tree: Any, mesh: Mesh, spec: Any = WHOLE) -> Any:
    """Arrays that every process holds whole, on the devices of all processes.

    Nothing is sent: each process puts its devices' parts there itself.

    Args:
      spec: of all leaves, or a tree of them.
    """
    if isinstance(spec, P):
        spec = jax.tree.map(lambda _, s=spec: s, tree)

    def place(leaf, spec):
        sharding = NamedSharding(mesh, spec)
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        if jnp.issubdtype(getattr(leaf, "dtype", np.float32), jax.dtypes.prng_key):
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(place, tree, spec)


def split_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays that are split over the mesh, of the rows that this process has."""
    sharding = NamedSharding(mesh, P("data"))

    def whole(leaf):
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(whole, tree)


@functools.partial(jax.jit, static_argnums=0)
def plain_keys_values(
    model: sd.StableDiffusion, frozen: sd.Frozen, token_ids: jax.Array, empty: jax.Array
) -> dict:
    """Keys and values of plain texts int32[R, T], the empty one before each: [R, 2, T, inner]."""
    kv = sd.text_keys_values(model, frozen, sd.encode_text(model, frozen, token_ids))
    return beside(kv, empty_keys_values(model, frozen, empty))


def empty_keys_values(model: sd.StableDiffusion, frozen: sd.Frozen, empty: jax.Array) -> dict:
    """Keys and values of the empty text int32[T]: leaves [1, T, inner]."""
    return sd.text_keys_values(model, frozen, sd.encode_negative(model, frozen, empty[None]))


def beside(kv: dict, empty: dict) -> dict:
    """Leaves [R, 2, T, inner] of [R, T, inner] and [1, T, inner], which comes first."""
    return jax.tree.map(
        lambda row, none: jnp.stack([jnp.broadcast_to(none, row.shape), row], axis=1), kv, empty
    )


def draw_in_batches(
    mesh: Mesh,
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    keys_values: Callable[[np.ndarray], dict],
    numbers: np.ndarray,
    each: int,
    sampling: programs.Sampling,
    guidance_scale: float,
) -> Iterator[np.ndarray]:
    """Yields uint8[R', height, width, 3], batch by batch, of rows in calls of one shape.

    All processes of the mesh call it together, and each gets all pictures.

    Args:
      frozen: on the mesh.
      keys_values: numbers of rows, int[B] -> leaves [B, 2, T, inner].
      numbers: uint32[R, 2], as of `programs.draw_rows`.
      each: rows that a device draws at once, at most.
      guidance_scale: more than 1.
    """
    size = min(each, -(-len(numbers) // mesh.size)) * mesh.size
    guidance = put(np.full(size, guidance_scale, np.float32), mesh, P("data"))
    for first in range(0, len(numbers), size):
        # The last call is filled up with its last row.
        rows = np.minimum(np.arange(first, first + size), len(numbers) - 1)
        kv = put(jax.device_get(keys_values(rows)), mesh, P("data"))
        own = put(numbers[rows], mesh, P("data"))
        drawn = programs.draw_everywhere(mesh, model, frozen, kv, own, guidance, sampling)
        if jax.process_count() > 1:
            drawn = process_allgather(drawn, tiled=True)
        yield to_uint8(np.asarray(drawn))[: len(numbers) - first]
