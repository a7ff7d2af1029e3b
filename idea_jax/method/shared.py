"""One ID-Enhancer for everybody: from a face embedding to where a person's training begins.

It is trained once, over many people (`idea_jax.enhancer`). Then a person is one forward pass, and
few steps or none of their own. `Shared` is one tree: "enhancer", "adapter" and "kv" are trained,
"start", "scale", "names" and "basis" are constants of the checkpoint that it was trained for. With
two text encoders (SDXL) all but "kv" is a dict of a tree for each (`EnhancerConfig.each`).

Source: arXiv 2507.11990, whose enhancer "refines visual identity embeddings" with texts of many
people; how it is trained is this project's (docs/enhancer.md).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.method import condition
from idea_jax.method.modules import FACE_WIDTH, IDAdapter, SharedEnhancer
from idea_jax.models import sd
from idea_jax.models.precision import exact
from idea_jax.pytrees import stream

KINDS = ("mlp", "attention", "names", "linear")
TRAINED = ("enhancer", "adapter", "kv")  # what training changes of a shared tree
ACTS = ("adapter", "kv")  # what acts for everybody when pictures are drawn
# Directions of names that a person's tokens move in: as many as Celeb Basis takes, at most.
VARIANCE, LARGEST_BASIS = 0.99, 512
EACH_PREDICTED = ("pseudo_tokens", "enhanced")  # what is predicted of a person

# "enhancer", "adapter": network parameters; "kv": deltas shaped after `cross_kv`; "start":
# float32[N, D], what the offsets are added to; "scale": float32[], their unit; "names":
# float32[K, N, D] at unit scale, K = 0 unless the enhancer reads them; "basis": float32[B, N, D],
# the directions in which a person's tokens move (`basis_of`), B = 0 where they move freely.
Shared = dict


@dataclass(frozen=True)
class EnhancerConfig:
    """What a shared tree looks like. Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      dim: width D of the text encoder.
      dim_2: width of SDXL's second text encoder; 0 where there is one.
      basis: how many directions the tokens of a person move in; 0: in all.
    """

    kind: str
    dim: int
    num_tokens: int = 2
    width: int = 512
    kv_rank: int = 4
    beta: float = 0.4
    skip: bool = False  # an affine map from the face is added to the tokens
    dim_2: int = 0
    basis: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the text encoders, one or two."""
        return (self.dim, self.dim_2) if self.dim_2 else (self.dim,)

    def network(self, width: int) -> SharedEnhancer:
        """The network for a text encoder of this width."""
        return SharedEnhancer(self.kind, width, self.num_tokens, self.width, self.skip)

    def each(self, function: Callable, *trees: Any) -> Any:
        """`function(width, *trees)` of the only text encoder; of two, what it is of each, as a
        dict: as `sd.each_encoder`."""
        if not self.dim_2:
            return function(self.dim, *trees)
        return {
            name: function(width, *(tree[name] for tree in trees))
            for name, width in zip(sd.ENCODERS, self.widths, strict=True)
        }


def init_shared(
    config: EnhancerConfig,
    model: sd.StableDiffusion,
    key: jax.Array,
    start: Any,
    scale: Any,
    names: Any,
) -> Shared:
    """Returns a shared tree before training; it predicts `start` for everybody.

    Of two text encoders each of the last three is a dict of one for each.

    Args:
      start: float32[N, D], the pseudo tokens of nobody in particular.
      scale: unit of the tokens' offsets, such as the deviation of celebrities' token embeddings.
      names: float32[K, N, D], token embeddings of names; kept if the enhancer reads them.
    """
    N = config.num_tokens

    def known(D, start, scale, names):
        names = jnp.asarray(names, jnp.float32).reshape(-1, N, D)
        return (names - start[None]) / scale if config.kind == "names" else names[:0]

    def directions(D, names):
        if not config.basis:  # then there may be shapes alone
            return jnp.zeros((0, N, D))
        return jnp.asarray(basis_of(np.asarray(names).reshape(-1, N, D), config.basis))

    def init_enhancer(D, key, start, names):
        network = config.network(D)
        return network.init(key, jnp.ones(FACE_WIDTH), _anchor(start), names)["params"]

    def init_adapter(D, key):
        context, enhanced = jnp.zeros((1, 1, D)), jnp.zeros((N, 2 * D))
        return IDAdapter(D, config.beta).init(key, context, enhanced)["params"]

    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
    basis = config.each(directions, names)
    names = config.each(known, start, scale, names)
    keys = {part: condition.each_stream(model, key, part) for part in ("enhancer", "adapter")}
    return {
        "start": start,
        "scale": jax.tree.map(jnp.float32, scale),
        "names": names,
        "basis": basis,
        "enhancer": config.each(init_enhancer, keys["enhancer"], start, names),
        "adapter": config.each(init_adapter, keys["adapter"]),
        "kv": condition.init_kv(
            model, person_method(config, kv="low_rank", kv_rank=config.kv_rank), stream(key, "kv")
        ),
    }


def spread(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The directions in which the tokens of K names differ, and how far, the farthest first.

    Args:
      names: float32[K, N, D].

    Returns:
      float64[R], standard deviations along each direction; float64[R, N, D] of unit norm; R is the
      least of K and N * D.
    """
    rows = np.asarray(names, np.float64).reshape(len(names), -1)
    _, singular, directions = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    return singular / np.sqrt(len(rows)), directions.reshape(-1, *names.shape[1:])


def basis_of(names: np.ndarray, count: int) -> np.ndarray:
    """The `count` directions in which the tokens of names differ most, each as long as the standard
    deviation along it: float32[count, N, D], zeros beyond those that there are.

    A person is a point in the space that names span; what lies outside of it names nobody.

    Args:
      names: float32[K, N, D].

    Source: arXiv 2306.00926 (Celeb Basis).
    """
    basis = np.zeros((count, *names.shape[1:]), np.float32)
    deviations, directions = spread(names)
    found = deviations[:count, None, None] * directions[:count]
    basis[: len(found)] = found
    return basis


def basis_size(names: np.ndarray) -> int:
    """In how many directions the tokens of names float32[K, N, D] differ: they hold `VARIANCE` of
    the variance, and are `LARGEST_BASIS` at most."""
    variances = spread(names)[0] ** 2
    share = np.cumsum(variances) / max(variances.sum(), np.finfo(np.float64).tiny)
    return min(int(np.searchsorted(share, VARIANCE)) + 1, len(variances), LARGEST_BASIS)


@functools.partial(jax.jit, static_argnums=0)
def predict(config: EnhancerConfig, shared: Shared, id_embed: jax.Array) -> condition.Trainable:
    """Returns the "pseudo_tokens" and "enhanced" of the person with this face.

    A pure function of float32[512] of unit norm; `jax.vmap` takes it over many faces.
    """

    def one(D, enhancer, start, scale, names):
        with exact(jnp.float32):
            offsets, enhanced = config.network(D).apply(
                {"params": enhancer}, id_embed, _anchor(start), names
            )
        return {"pseudo_tokens": start + scale * offsets, "enhanced": enhanced}

    parts = (shared[name] for name in ("enhancer", "start", "scale", "names"))
    found = config.each(one, *parts)
    if not config.dim_2:
        return found
    # A dict of two persons becomes a person whose parts are dicts.
    return {part: {name: own[part] for name, own in found.items()} for part in EACH_PREDICTED}


def _anchor(start: jax.Array) -> jax.Array:
    """A start at unit scale, as the network sees it."""
    return start * jax.lax.rsqrt(jnp.mean(start**2, axis=-1, keepdims=True) + 1e-12)


def frozen_part(shared: Shared) -> dict:
    """What `sd.Frozen.shared` holds of a shared tree, for training and drawing people."""
    return {name: shared[name] for name in (*ACTS, "basis")}


def keys_values(
    config: EnhancerConfig,
    model: sd.StableDiffusion,
    shared: Shared,
    frozen: sd.Frozen,
    id_embeds: jax.Array,
    token_ids: jax.Array,
    strength: jax.Array,
) -> dict:
    """Keys and values of texts that each name another person: leaves [B, T, inner].

    Args:
      id_embeds: float32[B, 512] of unit norm.
      token_ids: int32[B, T].
      strength: float32[B], of adapter and K/V delta; 0 leaves the tokens alone.
    """
    method = person_method(config, kv="none")
    frozen = frozen._replace(shared=frozen_part(shared))

    def one(id_embed, ids, strength):
        person = predict(config, shared, id_embed)
        text = condition.context(model, method, frozen, person, {}, ids[None], strength=strength)
        kv = condition.keys_values(model, method, frozen, person, text, strength=strength)
        return jax.tree.map(lambda leaf: leaf[0], kv)

    return jax.vmap(one)(id_embeds, token_ids, strength)


def unguided_keys_values(
    config: EnhancerConfig,
    model: sd.StableDiffusion,
    shared: Shared,
    frozen: sd.Frozen,
    token_ids: jax.Array,
    strength: float | jax.Array = 1.0,
) -> dict:
    """Keys and values of the negative prompt int32[B, T] beside texts that name a person: leaves
    [B, T, inner], with the shared K/V delta.

    Args:
      strength: of that delta.
    """
    method = person_method(config, kv="none")
    frozen = frozen._replace(shared=frozen_part(shared))
    text = sd.encode_negative(model, frozen, token_ids)
    return condition.keys_values(model, method, frozen, {}, text, strength=strength)


def person_method(
    config: EnhancerConfig,
    *,
    kv: str,
    kv_rank: int = 4,
    own_adapter: bool = False,
    regulariser: str | None = None,
    reg_weight: float = 0.0,
    basis: int = 0,
) -> condition.Method:
    """The method of a person who begins where a shared enhancer says.

    Args:
      kv: the person's own K/V delta, on top of the shared one; "none" for none.
      own_adapter: whether the person has an ID-Adapter of their own, which begins as the shared.
      regulariser: as of `condition.make_method`.
      basis: directions that the person's tokens move in; 0: in all.
    """
    return condition.make_method(
        "paper",
        regulariser=regulariser,
        kv=kv,
        kv_rank=kv_rank,
        num_tokens=config.num_tokens,
        beta=config.beta,
        reg_weight=reg_weight,
        enhanced=True,
        basis=basis,
        shared_adapter=not own_adapter,
        shared_kv=True,
    )


def begin_person(
    config: EnhancerConfig,
    model: sd.StableDiffusion,
    method: condition.Method,
    shared: Shared,
    key: jax.Array,
    id_embed: jax.Array,
) -> tuple[condition.Trainable, condition.Given]:
    """Returns a person before the first step of their own: what is trained of them, and their
    constants. Their anchor is what was predicted for them.

    Args:
      method: of `person_method`.
      key: the person's key.
      id_embed: float32[512] of unit norm.
    """
    person = _begin(config, model, method, shared, key, id_embed)
    given = condition.init_given(model, method, key, shared["start"], None)
    given["anchor"] = jax.tree.map(jnp.array, person["pseudo_tokens"])
    return person, given


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _begin(
    config: EnhancerConfig,
    model: sd.StableDiffusion,
    method: condition.Method,
    shared: Shared,
    key: jax.Array,
    id_embed: jax.Array,
) -> condition.Trainable:
    """What is trained of a person, in one program."""
    person = predict(config, shared, id_embed)
    if not method.shared_adapter:
        person["adapter"] = jax.tree.map(jnp.array, shared["adapter"])
    if method.kv != "none":
        person["kv"] = condition.init_kv(model, method, stream(key, "kv"))
    return person


def predicted_person(
    config: EnhancerConfig, shared: Shared, id_embed: jax.Array
) -> tuple[condition.Method, condition.Trainable]:
    """Returns a person as predicted: nothing but the prediction is their own.

    Args:
      id_embed: float32[512] of unit norm.
    """
    return person_method(config, kv="none"), predict(config, shared, id_embed)


def self_contained(
    config: EnhancerConfig,
    method: condition.Method,
    shared: Shared,
    trainable: condition.Trainable,
) -> tuple[condition.Method, condition.Trainable]:
    """Returns a person who draws the same without a shared tree: what acts of it becomes theirs.

    Low-rank K/V deltas are put side by side, which is their sum; into a full delta of the person's
    own the shared one is multiplied out.

    Args:
      method: of `person_method`; trainable: as it was trained with that.
    """

    def is_delta(node):
        return "down" in node

    def beside(ours, own):
        return {
            "down": jnp.concatenate([ours["down"], own["down"]], axis=1),
            "up": jnp.concatenate([ours["up"], own["up"]], axis=0),
        }

    kv, rank = shared["kv"], config.kv_rank
    if method.kv == "low_rank":
        kv = jax.tree.map(beside, kv, trainable["kv"], is_leaf=is_delta)
        rank += method.kv_rank
    elif method.kv == "full":
        kv = jax.tree.map(
            lambda ours, own: own + ours["down"] @ ours["up"], kv, trainable["kv"], is_leaf=is_delta
        )
    whole = {"adapter": shared["adapter"], **trainable, "kv": kv}
    ours: dict[str, Any] = {"shared_adapter": False, "shared_kv": False}
    if method.kv != "full":
        ours |= {"kv": "low_rank", "kv_rank": rank}
    return replace(method, **ours), whole
