"""The two small networks of ID-EA: the ID-Enhancer and the ID-Adapter.

Initial values follow torch (`nn.Linear`, `nn.MultiheadAttention`), because the published profile
never trains the enhancer: its random projection of the face is part of that method.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from idea_jax.models.config_reader import UnsupportedConfig

NUM_HEADS = 8  # arXiv 2507.11990 and the published code use eight heads everywhere

FACE_WIDTH = 512  # of a face embedding, as ArcFace gives it


def uniform(bound: float):
    """Initialiser: uniform in [-bound, bound]."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(fan_in: int, features: int) -> nn.Dense:
    """Dense layer that starts as torch's `nn.Linear`: weight and bias in +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Dense(features, kernel_init=uniform(bound), bias_init=uniform(bound))


class MultiheadAttention(nn.Module):
    """torch's `nn.MultiheadAttention(dim, 8, batch_first=True)` without masks or dropout.

    torch packs the three input projections into one (3 dim, dim) matrix; its Xavier bound,
    sqrt(6 / (dim + 3 dim)), is kept for the three separate kernels here.
    """

    dim: int

    def setup(self):
        if self.dim % NUM_HEADS:
            raise UnsupportedConfig(
                f"ID-EA's attention has {NUM_HEADS} heads; the text width {self.dim} of this "
                "checkpoint is no multiple of that"
            )
        packed = uniform(math.sqrt(6 / (4 * self.dim)))
        self.to_q = nn.Dense(self.dim, kernel_init=packed)
        self.to_k = nn.Dense(self.dim, kernel_init=packed)
        self.to_v = nn.Dense(self.dim, kernel_init=packed)
        bound = 1 / math.sqrt(self.dim)
        self.to_out = nn.Dense(self.dim, kernel_init=uniform(bound))

    def __call__(self, query: jax.Array, key_value: jax.Array) -> jax.Array:
        """float32[..., Q, dim], float32[..., K, dim] -> float32[..., Q, dim]."""

        def split(x):
            return x.reshape(*x.shape[:-1], NUM_HEADS, self.dim // NUM_HEADS)

        q, k, v = split(self.to_q(query)), split(self.to_k(key_value)), split(self.to_v(key_value))
        scores = jnp.einsum("...qhd,...khd->...hqk", q, k) / math.sqrt(self.dim // NUM_HEADS)
        mixed = jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(scores, axis=-1), v)
        return self.to_out(mixed.reshape(query.shape))


class IDEnhancer(nn.Module):
    """Fuses a face embedding with the textual ID anchor.

    Source: arXiv 2507.11990; `Whslee/ID-EA` train.py, `CrossAttentionFusion` and the expander.
    """

    dim: int

    def setup(self):
        self.expand = linear(FACE_WIDTH, self.dim)
        self.query = linear(self.dim, self.dim)
        self.key_value = linear(self.dim, self.dim)
        self.attention = MultiheadAttention(self.dim)
        self.out = linear(self.dim, 2 * self.dim)

    def __call__(self, id_embed: jax.Array, anchor: jax.Array) -> jax.Array:
        """Returns the identity-enhanced embedding, float32[N, 2 dim].

        Args:
          id_embed: float32[512], unit norm.
          anchor: float32[N, dim].
        """
        face = jnp.broadcast_to(self.expand(id_embed)[None, :], anchor.shape)
        return self.out(self.attention(self.query(face), self.key_value(anchor)))


class IDAdapter(nn.Module):
    """Gated self-attention over the text condition and the identity-enhanced embedding.

    The gate starts at zero, so a fresh adapter returns its input.

    Source: arXiv 2507.11990; `Whslee/ID-EA` train.py, `AdapterLayer`.
    """

    dim: int
    beta: float

    def setup(self):
        self.project = linear(2 * self.dim, self.dim)
        self.attention = MultiheadAttention(self.dim)
        self.gamma = self.param("gamma", nn.initializers.zeros, ())

    def __call__(self, context: jax.Array, enhanced_id: jax.Array, strength=1.0) -> jax.Array:
        """Returns context + strength * beta * tanh(gamma) * attention, float32[B, T, dim].

        Args:
          context: float32[B, T, dim], the text encoder's output.
          enhanced_id: float32[N, 2 dim].
          strength: scales the contribution; 0 returns the context as it is.
        """
        return context + self.contribution(context, enhanced_id, strength)

    def contribution(self, context: jax.Array, enhanced_id: jax.Array, strength=1.0) -> jax.Array:
        """Returns what is added to the context: strength * beta * tanh(gamma) * attention."""
        B, T, D = context.shape
        face = self.project(enhanced_id)
        joined = jnp.concatenate([context, jnp.broadcast_to(face[None], (B, *face.shape))], axis=1)
        # Only the text positions are read back, so only they are used as queries: the published
        # code computes the other rows as well and drops them.
        attended = self.attention(context, joined)
        return strength * self.beta * jnp.tanh(self.gamma) * attended


class SharedEnhancer(nn.Module):
    """An ID-Enhancer for everybody: says of a face alone where a person's training begins.

    Four ways from the face to one row per pseudo token. All of the face gets through each of them;
    through the published enhancer (`IDEnhancer`), whose queries are alike for all tokens and whose
    keys and values are the anchor's few rows, eight numbers do.

    * `mlp`: two layers, the second one residual (after arXiv 2309.05793 and StableIdentity,
      arXiv 2401.15975).
    * `attention`: the published attention over the anchor, added to its own query.
    * `names`: attention over many celebrities' names, whose token embeddings are keys and values:
      a soft celebrity basis (after Celeb Basis, arXiv 2306.00926).
    * `linear`: an affine map to the tokens, and F is zero: what a regression says, exactly.

    Attributes:
      kind: one of the four.
      dim: width D of the text encoder.
      tokens: pseudo tokens N.
      width: of hidden layers.
      skip: the affine map of `linear`, zero at first, is added to the tokens of the other kinds.
    """

    kind: str
    dim: int
    tokens: int
    width: int
    skip: bool = False

    @nn.compact
    def __call__(
        self, id_embed: jax.Array, anchor: jax.Array, names: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns offsets of the pseudo tokens, float32[N, D], zero at first, and F [N, 2D].

        Args:
          id_embed: float32[512], unit norm.
          anchor: float32[N, D], what the tokens start from, at unit scale.
          names: float32[K, N, D], token embeddings of names at unit scale; read by `names` alone.
        """
        N, D = self.tokens, self.dim
        face = id_embed * math.sqrt(id_embed.shape[0])  # values of unit size

        def each(rows, features, name, init):
            """A dense layer of its own for each token."""
            kernel = self.param(f"{name}_kernel", init, (N, rows.shape[1], features))
            bias = self.param(f"{name}_bias", nn.initializers.zeros, (N, features))
            return jnp.einsum("ni,nio->no", rows, kernel) + bias

        affine = jnp.zeros((N, D))
        if self.skip or self.kind == "linear":
            faces = jnp.broadcast_to(face, (N, face.shape[0]))
            affine = each(faces, D, "skip", nn.initializers.zeros)
        if self.kind == "linear":
            return affine, jnp.zeros((N, 2 * D))
        if self.kind == "mlp":
            hidden = nn.gelu(nn.Dense(self.width, name="in")(face))
            hidden = hidden + nn.gelu(nn.Dense(self.width, name="mid")(nn.LayerNorm()(hidden)))
            rows = jnp.broadcast_to(nn.LayerNorm()(hidden), (N, self.width))
        else:
            query = nn.Dense(N * D, name="query")(face).reshape(N, D)
            if self.kind == "attention":
                mixed = MultiheadAttention(D, name="attention")(query, anchor)
            else:  # each token looks at the names' tokens of its own place
                mixed = MultiheadAttention(D, name="attention")(
                    query[:, None], jnp.swapaxes(names, 0, 1)
                )[:, 0]
            rows = query + mixed
            rows = rows + nn.gelu(nn.Dense(D, name="mid")(nn.LayerNorm()(rows)))
            rows = nn.LayerNorm()(rows)

        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)
        offsets = each(rows, D, "tokens", nn.initializers.zeros) + affine
        return offsets, each(rows, 2 * D, "enhanced", init)
