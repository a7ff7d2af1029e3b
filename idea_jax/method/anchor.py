"""Cross Initialization: where the pseudo tokens start, and what the regulariser pulls them to.

Run once per job, as one program. An encoder *output* becomes an encoder *input*: that is the
"cross" of the name.

Source: arXiv 2312.15905; `lyuPang/CrossInitialization` utils.py; arXiv 2507.11990, section on the
textual ID anchor.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.models import sd


@functools.partial(jax.jit, static_argnames=("model", "bos", "eos", "pad"))
def from_names(
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    name_ids: np.ndarray,
    *,
    bos: int,
    eos: int,
    pad: int,
) -> jax.Array:
    """Returns the anchor of a list of names, float32[n, d].

    Column j is the mean input embedding of the names' j-th token; the n means, between BOS and EOS
    and padded to the full window, go through the text encoder.

    Args:
      name_ids: int32[K, n], -1 where a name has fewer than n tokens; no column is all -1.
    """
    n = name_ids.shape[1]
    present = name_ids >= 0
    counts = jnp.maximum(present.sum(axis=0), 1)
    embeds = sd.embed_tokens(model, frozen, jnp.where(present, name_ids, 0))
    embeds = jnp.where(present[..., None], embeds.astype(jnp.float32), 0.0)
    means = embeds.sum(axis=0) / counts.astype(jnp.float32)[:, None]
    start, end, fill = sd.embed_tokens(model, frozen, np.array([bos, eos, pad])).astype(jnp.float32)
    fills = jnp.broadcast_to(
        fill[None], (model.text.max_position_embeddings - n - 2, fill.shape[0])
    )
    window = jnp.concatenate([start[None], means, end[None], fills])
    return sd.encode_token_embeds(model, frozen, window[None])[0, 1 : n + 1]


@functools.partial(jax.jit, static_argnames=("model", "bos", "eos"))
def from_words(
    model: sd.StableDiffusion, frozen: sd.Frozen, word_ids: np.ndarray, *, bos: int, eos: int
) -> jax.Array:
    """Returns the anchor of explicit words, float32[n, d]: encoder outputs at their positions.

    Args:
      word_ids: int32[n]; unlike the names, the words are encoded without padding.
    """
    ids = jnp.concatenate([jnp.array([bos]), word_ids, jnp.array([eos])])
    embeds = sd.embed_tokens(model, frozen, ids).astype(jnp.float32)
    return sd.encode_token_embeds(model, frozen, embeds[None])[0, 1 : len(word_ids) + 1]


def from_input_embeddings(
    model: sd.StableDiffusion, frozen: sd.Frozen, word_ids: np.ndarray
) -> jax.Array:
    """The words' own input embeddings, float32[n, d]: where plain textual inversion starts."""
    return sd.embed_tokens(model, frozen, np.asarray(word_ids)).astype(jnp.float32)
