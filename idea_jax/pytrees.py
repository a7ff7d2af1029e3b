"""Named random streams and small operations on nested dictionaries of arrays."""

import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def stream(key: jax.Array, name: str) -> jax.Array:
    """Returns the key of the random stream `name`: one root key serves every part of a run.

    The name is folded in through SHA-256, because Python's own `hash` of a string differs from
    process to process.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))


def flatten(tree: dict) -> dict:
    """Returns `{"a/b/c": leaf}` for a nested dict, in sorted order of the paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def unflatten(flat: dict) -> dict:
    """Inverse of `flatten`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def stack(trees: Sequence) -> Any:
    """Stacks equal trees leaf by leaf along a new first axis (the identity axis)."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any) -> list:
    """Inverse of `stack`. A tree that is spread over devices should be fetched first
    (`jax.device_get`): otherwise each row of each leaf is a collective of its own."""
    size = jax.tree.leaves(tree)[0].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(size)]


def cast(tree: Any, dtype: Any) -> Any:
    """Casts the floating leaves of a tree to `dtype`; the others stay as they are."""

    def cast_leaf(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast_leaf, tree)


def abstract(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    """What lowering a program needs of arrays: shapes, types and where they will be.

    Args:
      tree: of arrays or shapes.
      shardings: one for all leaves, or a tree of them.
      dtype: of all leaves; None for their own.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=where),
        tree,
        shardings,
    )


def count(tree: Any) -> int:
    """Number of values in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def tree_digest(tree: dict) -> str:
    """SHA-256 of the names and values of all leaves, hexadecimal."""
    digest = hashlib.sha256()
    for name, leaf in flatten(tree).items():
        digest.update(name.encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
