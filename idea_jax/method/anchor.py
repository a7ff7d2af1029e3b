"""Cross Initialization: where the pseudo tokens start, and what the regulariser pulls them to.

Run once per job, as one program. An encoder *output* becomes an encoder *input*: that is the
"cross" of the name. It is the output after the final LayerNorm, of SDXL's encoders as well: that is
of the size of an input, where the hidden states that its UNet reads have no norm.

Source: arXiv 2312.15905; `lyuPang/CrossInitialization` utils.py; arXiv 2507.11990, section on the
textual ID anchor.
"""

import functools
from typing import Any

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
) -> Any:
    """Returns the anchor of a list of names, float32[n, d]; of two text encoders a dict of that of
    each.

    Column j is the mean input embedding of the names' j-th token; the n means, between BOS and EOS
    and padded to the full window, go through the text encoder.

    Args:
      name_ids: int32[K, n], -1 where a name has fewer than n tokens; no column is all -1.
    """
    n = name_ids.shape[1]
    present = name_ids >= 0
    counts = jnp.maximum(present.sum(axis=0), 1)

    def window_of(config, embeds, special, number):
        embeds = jnp.where(present[..., None], embeds.astype(jnp.float32), 0.0)
        means = embeds.sum(axis=0) / counts.astype(jnp.float32)[:, None]
        special = special.astype(jnp.float32)
        start, end, fill = special[0], special[1], special[number]
        fills = jnp.broadcast_to(
            fill[None], (config.max_position_embeddings - n - 2, fill.shape[0])
        )
        return jnp.concatenate([start[None], means, end[None], fills])[None]

    embeds = sd.embed_tokens(model, frozen, jnp.where(present, name_ids, 0))
    # What fills a window up is told by its number: the second encoder of SDXL has its own.
    special = sd.embed_tokens(model, frozen, np.array([bos, eos, pad, sd.PADDING_2]))
    numbers = {"clip_l": 2, "clip_g": 3} if len(model.encoders) > 1 else 2
    windows = sd.each_encoder(model, window_of, embeds, special, numbers)
    encoded = sd.encode_token_embeds(model, frozen, windows)
    return jax.tree.map(lambda states: states[0, 1 : n + 1], encoded)


@functools.partial(jax.jit, static_argnames=("model", "bos", "eos"))
def from_words(
    model: sd.StableDiffusion, frozen: sd.Frozen, word_ids: np.ndarray, *, bos: int, eos: int
) -> Any:
    """Returns the anchor of explicit words, float32[n, d]: encoder outputs at their positions.

    Args:
      word_ids: int32[n]; unlike the names, the words are encoded without padding.
    """
    ids = jnp.concatenate([jnp.array([bos]), word_ids, jnp.array([eos])])
    embeds = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32)[None], sd.embed_tokens(model, frozen, ids)
    )
    encoded = sd.encode_token_embeds(model, frozen, embeds)
    return jax.tree.map(lambda states: states[0, 1 : len(word_ids) + 1], encoded)


def from_input_embeddings(
    model: sd.StableDiffusion, frozen: sd.Frozen, word_ids: np.ndarray
) -> Any:
    """The words' own input embeddings, float32[n, d]: where plain textual inversion starts."""
    embeds = sd.embed_tokens(model, frozen, np.asarray(word_ids))
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), embeds)
