"""What is learned for one person, and how it enters Stable Diffusion.

Training and sampling both go through `context` and `keys_values`, so that what is trained is what
draws. With two text encoders (SDXL) each has tokens, anchor, ID-Enhancer and ID-Adapter of its own,
as a dict (`sd.each_encoder`). Three trees are kept apart: `Frozen` (one for everybody), the
trainables (one per person; the only tree that is differentiated) and what is given (one per person,
not trained).
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.method import loss
from idea_jax.method.modules import FACE_WIDTH, IDAdapter, IDEnhancer
from idea_jax.models import sd
from idea_jax.models.precision import exact
from idea_jax.models.unet import cross_kv_shapes
from idea_jax.pytrees import stream

# One person's trainables: a dict with "pseudo_tokens" float32[N, D] and, where the method has them,
# "enhancer", "adapter" (network parameters), "enhanced" float32[N, 2D] (the ID-Adapter's input,
# where no enhancer of the person's own makes it) and "kv" (deltas shaped after `cross_kv`).
Trainable = dict
# One person's constants: "anchor" float32[N, D]; where the profile uses them, "id_embed"
# float32[512], "metric" (the regulariser's `AnchorMetric`), and "enhancer" when it is not trained.
Given = dict


@dataclass(frozen=True)
class Method:
    """Which parts exist, which of them are trained, and which act when pictures are drawn.

    Hashable, so that it can be a static argument of a jitted function.
    """

    profile: str
    adapter: bool  # an ID-Adapter is trained, fed by an ID-Enhancer
    train_enhancer: bool  # otherwise it keeps its random start, as in the published code
    acts_at_sampling: bool  # adapter and K/V draw too; otherwise the tokens alone
    regulariser: str | None  # one of the values of `REGULARISERS`
    cross_init: bool  # start from the encoder's output; otherwise from its input embeddings
    kv: str = "none"  # "low_rank", "full", "none"
    kv_rank: int = 4
    num_tokens: int = 2
    beta: float = 0.4
    reg_weight: float = 0.0
    # With a shared ID-Enhancer: what it says is a trained part, and these are `Frozen.shared`'s.
    enhanced: bool = False
    shared_adapter: bool = False
    shared_kv: bool = False
    basis: int = 0  # directions that the tokens move in; 0: in all

    @property
    def uses_face(self) -> bool:
        """Whether a person begins with a face embedding."""
        return self.adapter

    @property
    def keeps_face(self) -> bool:
        """Whether the face embedding is a constant of a person: not after a shared enhancer."""
        return self.adapter and not self.enhanced

    @property
    def changes_kv(self) -> bool:
        """Whether K/V deltas act when pictures are drawn."""
        return self.acts_at_sampling and (self.kv != "none" or self.shared_kv)

    def parts(self) -> tuple[str, ...]:
        """Names of the trained parts: the keys of the trainables."""
        present = {
            "pseudo_tokens": True,
            "enhanced": self.enhanced,
            "adapter": self.adapter and not self.shared_adapter,
            "enhancer": self.adapter and self.train_enhancer and not self.enhanced,
            "kv": self.kv != "none",
        }
        return tuple(name for name, is_present in present.items() if is_present)


# The setting `--regulariser` -> what a method, and so an identity file, calls it.
REGULARISERS: dict[str, str | None] = {
    "exact": "mahalanobis",
    "truncated": "mahalanobis_truncated",
    "euclidean": "euclidean",
    "none": None,
}

PROFILES: dict[str, dict] = {
    "paper": {
        "adapter": True,
        "train_enhancer": True,
        "acts_at_sampling": True,
        # As in the published code, with which the published results were made. The exact inverse
        # keeps the tokens of a real checkpoint at the anchor: docs/method.md has the numbers.
        "regulariser": "mahalanobis_truncated",
        "cross_init": True,
    },
    "official": {
        "adapter": True,
        "train_enhancer": False,
        "acts_at_sampling": False,
        "regulariser": "mahalanobis_truncated",
        "cross_init": True,
    },
    "cross_init": {
        "adapter": False,
        "train_enhancer": False,
        "acts_at_sampling": False,
        "regulariser": "euclidean",
        "cross_init": True,
    },
    "textual_inversion": {
        "adapter": False,
        "train_enhancer": False,
        "acts_at_sampling": False,
        "regulariser": None,
        "cross_init": False,
    },
}


def make_method(profile: str, *, regulariser: str | None = None, **settings) -> Method:
    """Returns the method of a named profile.

    Args:
      regulariser: a key of `REGULARISERS`; None for the profile's own.
      settings: the further fields of `Method`.
    """
    parts = dict(PROFILES[profile])
    if regulariser is not None:
        parts["regulariser"] = REGULARISERS[regulariser]
    return Method(profile=profile, **parts, **settings)


# One program each, which is kept for the next run: operation by operation a start takes seconds.
@functools.partial(jax.jit, static_argnums=(0, 1))
def init_trainable(
    model: sd.StableDiffusion, method: Method, key: jax.Array, start: jax.Array
) -> Trainable:
    """Returns one person's trainables at step 0; the drawing is then that of plain tokens.

    Args:
      key: the person's key.
      start: float32[N, D], the pseudo tokens' first value; of two encoders a dict.
    """
    # Copies: a step that donates its state must not own two names for one buffer.
    start = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), start)
    trainable: Trainable = {"pseudo_tokens": start}
    parts = method.parts()

    def init_adapter(config, key):
        D = config.hidden_size
        context, enhanced = jnp.zeros((1, 1, D)), jnp.zeros((method.num_tokens, 2 * D))
        return IDAdapter(D, method.beta).init(key, context, enhanced)["params"]

    def zeros(config):
        return jnp.zeros((method.num_tokens, 2 * config.hidden_size))

    if "enhanced" in parts:
        trainable["enhanced"] = sd.each_encoder(model, zeros)
    if "adapter" in parts:
        keys = each_stream(model, key, "adapter")
        trainable["adapter"] = sd.each_encoder(model, init_adapter, keys)
    if "enhancer" in parts:
        trainable["enhancer"] = init_enhancer(model, method, key)
    if "kv" in parts:
        trainable["kv"] = init_kv(model, method, stream(key, "kv"))
    return trainable


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_enhancer(model: sd.StableDiffusion, method: Method, key: jax.Array) -> dict:
    """Random ID-Enhancer parameters of the person with this key."""

    def init(config, key):
        anchor = jnp.zeros((method.num_tokens, config.hidden_size))
        enhancer = IDEnhancer(config.hidden_size)
        return enhancer.init(key, jnp.zeros(FACE_WIDTH), anchor)["params"]

    return sd.each_encoder(model, init, each_stream(model, key, "enhancer"))


def each_stream(model: sd.StableDiffusion, key: jax.Array, name: str) -> Any:
    """The stream of a part; of two encoders one for each."""
    own = stream(key, name)
    if len(model.encoders) == 1:
        return own
    return {encoder: stream(own, encoder) for encoder in sd.ENCODERS}


def init_kv(model: sd.StableDiffusion, method: Method, key: jax.Array) -> dict:
    """K/V deltas that start at zero effect, in the structure of `Frozen.cross_kv`.

    A full delta is a zero kernel. A low-rank one is {"down": [D, r], "up": [r, inner]} with a
    random down and a zero up, so that the gradient of `up` is alive at the first step (LoRA,
    arXiv 2106.09685, section 4.1).
    """
    kernels, structure = jax.tree.flatten(cross_kv_shapes(model.unet))

    def delta(index, kernel):
        D, inner = kernel.shape
        if method.kv == "full":
            return jnp.zeros((D, inner))
        down = jax.random.normal(jax.random.fold_in(key, index), (D, method.kv_rank))
        return {"down": down / math.sqrt(D), "up": jnp.zeros((method.kv_rank, inner))}

    return jax.tree.unflatten(structure, [delta(i, kernel) for i, kernel in enumerate(kernels)])


def init_given(
    model: sd.StableDiffusion,
    method: Method,
    key: jax.Array,
    anchor: jax.Array,
    id_embed: np.ndarray | None,
) -> Given:
    """Returns one person's constants.

    Args:
      anchor: float32[N, D], the textual ID anchor; of two encoders a dict.
      id_embed: float32[512] of unit norm; None for methods that keep none.
    """
    given: Given = {"anchor": jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), anchor)}
    if method.regulariser in ("mahalanobis", "mahalanobis_truncated"):
        truncated = method.regulariser == "mahalanobis_truncated"

        def metric_of(_, anchor):
            metric = loss.anchor_metric(np.asarray(anchor), truncated=truncated)
            return {k: jnp.asarray(v) for k, v in metric._asdict().items()}

        given["metric"] = sd.each_encoder(model, metric_of, anchor)
    if method.keeps_face:
        given["id_embed"] = jnp.array(id_embed, jnp.float32)
        if not method.train_enhancer:
            given["enhancer"] = init_enhancer(model, method, key)
    return given


def context(
    model: sd.StableDiffusion,
    method: Method,
    frozen: sd.Frozen,
    trainable: Trainable,
    given: Given,
    token_ids: jax.Array,
    *,
    strength: float | jax.Array = 1.0,
) -> Any:
    """The text condition of prompts that name the person, as `sd.encode_text` returns it.

    Args:
      token_ids: int32[B, T]; ids from the vocabulary's size on are the pseudo tokens.
      strength: scales the ID-Adapter's contribution.
    """
    encoded = sd.encode_text(model, frozen, token_ids, trainable["pseudo_tokens"])
    if not method.adapter:
        return encoded
    added = adapter_contribution(model, method, frozen, trainable, given, encoded, strength)
    return with_contribution(model, encoded, added)


def with_contribution(model: sd.StableDiffusion, encoded: Any, added: Any) -> Any:
    """A text condition with what is added to what each encoder says; a pooled output stays."""
    if len(model.encoders) == 1:
        return encoded + added
    return encoded | {name: encoded[name] + added[name] for name in sd.ENCODERS}


def adapter_contribution(
    model: sd.StableDiffusion,
    method: Method,
    frozen: sd.Frozen,
    trainable: Trainable,
    given: Given,
    encoded: Any,
    strength: float | jax.Array,
) -> Any:
    """What a person's ID-Adapter adds to a text condition, float32[B, T, D]; of two encoders a dict
    of what the adapter of each adds."""

    def enhance(config, enhancer, anchor):
        network = IDEnhancer(config.hidden_size)
        with exact(jnp.float32):
            return network.apply({"params": enhancer}, given["id_embed"], anchor)

    def adapt(config, adapter, encoded, enhanced):
        network = IDAdapter(config.hidden_size, method.beta)
        with exact(jnp.float32):
            return network.apply(
                {"params": adapter}, encoded, enhanced, strength, method=IDAdapter.contribution
            )

    if method.enhanced:
        enhanced = trainable["enhanced"]
    else:
        enhancer = trainable["enhancer"] if method.train_enhancer else given["enhancer"]
        enhanced = sd.each_encoder(model, enhance, enhancer, given["anchor"])
    adapter = frozen.shared["adapter"] if method.shared_adapter else trainable["adapter"]
    return sd.each_encoder(model, adapt, adapter, encoded, enhanced)


def keys_values(
    model: sd.StableDiffusion,
    method: Method,
    frozen: sd.Frozen,
    trainable: Trainable,
    context: Any,
    *,
    strength: float | jax.Array = 1.0,
) -> dict:
    """Cross-attention keys and values of a text condition, with the person's K/V deltas.

    The delta is applied to the context and added, never to the kernel: a low-rank delta then costs
    two thin products, and the frozen kernel stays one array for all people under `jax.vmap`.
    """
    kv = sd.text_keys_values(model, frozen, context)
    joined = sd.context_of(model, context)
    for deltas in kv_contributions(model, method, frozen, trainable, joined, strength):
        kv = with_deltas(kv, deltas)
    return kv


def with_deltas(kv: dict, deltas: dict, share: jax.Array | None = None) -> dict:
    """Keys and values with deltas in the structure of `cross_kv`; what else is in `kv` stays.

    Args:
      share: of each position, float32[B, T, 1]; None for all of it.
    """

    def add(plain, delta):
        return plain + (delta if share is None else share * delta).astype(plain.dtype)

    return kv | jax.tree.map(add, {block: kv[block] for block in deltas}, deltas)


def kv_contributions(
    model: sd.StableDiffusion,
    method: Method,
    frozen: sd.Frozen,
    trainable: Trainable,
    context: jax.Array,
    strength: float | jax.Array,
) -> list[dict]:
    """What K/V deltas add to the keys and values of a text condition: the shared one, a person's
    own, both or none.

    They act on every text that is drawn beside the person's, the negative prompt too, as a LoRA
    does in other programs.
    """

    def low_rank(deltas):
        with exact(jnp.float32):
            return jax.tree.map(
                lambda delta: (context @ delta["down"]) @ (strength * delta["up"]),
                deltas,
                is_leaf=lambda node: "down" in node,
            )

    contributions = [low_rank(frozen.shared["kv"])] if method.shared_kv else []
    if method.kv == "full":
        narrow = context.astype(model.dtype)
        with exact(model.dtype):
            wide = jax.tree.map(
                lambda kernel: strength * (narrow @ kernel.astype(model.dtype)), trainable["kv"]
            )
        contributions.append(wide)
    elif method.kv == "low_rank":
        contributions.append(low_rank(trainable["kv"]))
    return contributions


def drawing_keys_values(
    model: sd.StableDiffusion,
    method: Method,
    frozen: sd.Frozen,
    trainable: Trainable,
    given: Given,
    token_ids: jax.Array,
    *,
    strength: float | jax.Array = 1.0,
) -> dict:
    """Keys and values with which a prompt is drawn.

    Profiles whose adapter and K/V do not act at sampling draw with the tokens alone.
    """
    if not method.acts_at_sampling:
        encoded = sd.encode_text(model, frozen, token_ids, trainable["pseudo_tokens"])
        return sd.text_keys_values(model, frozen, encoded)
    condition = context(model, method, frozen, trainable, given, token_ids, strength=strength)
    return keys_values(model, method, frozen, trainable, condition, strength=strength)


def keys_values_together(
    model: sd.StableDiffusion,
    methods: Sequence[Method],
    frozen: sd.Frozen,
    trainables: Sequence[Trainable],
    givens: Sequence[Given],
    token_ids: jax.Array,
    *,
    strength: float | jax.Array = 1.0,
    encode: Callable = sd.encode_text,
) -> dict:
    """Keys and values with which a prompt that names several people is drawn.

    The rule: at the positions of somebody's tokens only that person's adapter and K/V delta act; at
    all other positions the mean of everybody's does. So nobody's face leaks into the other's words,
    the shared words are changed no more than one person changes them, the order does not matter,
    one person alone is drawn as `drawing_keys_values` does, and a person who is given twice as
    that one person. People whose method draws with tokens alone add nothing.

    Args:
      token_ids: int32[B, T]; the first person's tokens have the ids from the vocabulary's size on,
        the second person's the next ones, and so on.
      encode: `sd.encode_text`, or what is to make the text condition instead.
    """
    everybody = [trainable["pseudo_tokens"] for trainable in trainables]
    tokens = jax.tree.map(lambda *own: jnp.concatenate(own), *everybody)
    people = list(zip(methods, trainables, givens, strict=True))
    counts = [len(jax.tree.leaves(own)[0]) for own in everybody]
    shares = position_shares(counts, model.text.vocab_size, token_ids)[..., None]
    encoded = encode(model, frozen, token_ids, tokens)
    context = encoded
    for share, (method, trainable, given) in zip(shares, people, strict=True):
        if method.acts_at_sampling and method.adapter:
            added = adapter_contribution(model, method, frozen, trainable, given, encoded, strength)
            own = jax.tree.map(lambda leaf, share=share: share * leaf, added)
            context = with_contribution(model, context, own)
    kv = sd.text_keys_values(model, frozen, context)
    joined = sd.context_of(model, context)
    for share, (method, trainable, _) in zip(shares, people, strict=True):
        if not method.acts_at_sampling:
            continue
        for deltas in kv_contributions(model, method, frozen, trainable, joined, strength):
            kv = with_deltas(kv, deltas, share)
    return kv


def unguided_keys_values(
    model: sd.StableDiffusion,
    methods: Sequence[Method],
    frozen: sd.Frozen,
    trainables: Sequence[Trainable],
    token_ids: jax.Array,
    *,
    strength: float | jax.Array = 1.0,
) -> dict:
    """Keys and values of the negative prompt int32[B, T] beside a prompt that names people.

    It names nobody, so no ID-Adapter acts; K/V deltas do, as `keys_values_together` says of the
    positions of shared words.
    """
    plain = [replace(method, adapter=False) for method in methods]
    nothing: list[Given] = [{} for _ in plain]
    return keys_values_together(
        model,
        plain,
        frozen,
        trainables,
        nothing,
        token_ids,
        strength=strength,
        encode=sd.encode_negative,
    )


def position_shares(counts: Sequence[int], vocab_size: int, token_ids: jax.Array) -> jax.Array:
    """How much of each person acts at each position of a text, float32[P, B, T]; sums to 1.

    Args:
      counts: pseudo tokens of each person.
      token_ids: int32[B, T], as in `keys_values_together`.
    """
    ends = vocab_size + np.cumsum(counts)
    own = jnp.stack(
        [(token_ids >= end - n) & (token_ids < end) for n, end in zip(counts, ends, strict=True)]
    )
    is_shared = jnp.broadcast_to(~own.any(axis=0), own.shape)
    return jnp.where(is_shared, jnp.float32(1 / len(counts)), own.astype(jnp.float32))


def regulariser(method: Method, trainable: Trainable, given: Given) -> jax.Array:
    """Mean distance of the pseudo tokens from the anchor, unweighted; zero without regulariser, of
    two encoders the mean over both."""
    if method.regulariser is None:
        return jnp.zeros(())
    tokens, anchor, metric = trainable["pseudo_tokens"], given["anchor"], given.get("metric")
    if not isinstance(tokens, dict):
        return loss.distance(tokens, anchor, metric)
    each = [
        loss.distance(tokens[name], anchor[name], metric and metric[name]) for name in sd.ENCODERS
    ]
    return jnp.mean(jnp.stack(each))
