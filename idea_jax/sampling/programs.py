"""The programs that draw: prompts -> pictures, one compiled program per shape."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from idea_jax.config.settings import ConfigError, is_guided
from idea_jax.data import images
from idea_jax.data.tokenizer import Tokens
from idea_jax.diffusion import samplers
from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.runtime import traces

DECODED = 8  # pictures that the autoencoder decodes at once


@functools.partial(jax.jit, static_argnames=("method", "model"))
def prompt_keys_values(
    model: sd.StableDiffusion,
    method: condition.Method,
    frozen: sd.Frozen,
    trainable: condition.Trainable,
    given: condition.Given,
    prompt_ids: jax.Array,
    negative_ids: jax.Array,
    strength: jax.Array,
) -> dict:
    """Keys and values of a prompt, once for all of its pictures and steps: leaves [2, T, inner].

    Row 0 is the unguided condition (negative prompt), row 1 the prompt. The person's K/V delta acts
    on both, as a LoRA does in other programs, so that a person is drawn alike everywhere; the
    ID-Adapter acts where the person is named. docs/log/2026-11-29-both-halves.md has the measured
    difference to a delta on the prompt alone.

    Args:
      prompt_ids, negative_ids: int32[T].
      strength: float32[], scales adapter and K/V delta.
    """
    prompt = condition.drawing_keys_values(
        model, method, frozen, trainable, given, prompt_ids[None], strength=strength
    )
    negative = condition.unguided_keys_values(
        model, [method], frozen, [trainable], negative_ids[None], strength=strength
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), negative, prompt)


@functools.partial(jax.jit, static_argnames=("methods", "model"))
def named_keys_values(
    model: sd.StableDiffusion,
    methods: tuple[condition.Method, ...],
    frozen: sd.Frozen,
    trainables: Sequence[condition.Trainable],
    givens: Sequence[condition.Given],
    prompt: Tokens,
    strength: jax.Array,
) -> dict:
    """Keys and values of a prompt that names one person or several: leaves [1, K * T, inner].

    Each chunk is encoded by itself; all of them are attended to together. A token's weight
    multiplies its row of the condition (A1111's emphasis without its normalisation), and so its
    keys and values, which are linear in it.

    Args:
      prompt: K chunks; ids as in `condition.keys_values_together`.
      strength: float32[], scales adapter and K/V delta.
    """
    kv = condition.keys_values_together(
        model, methods, frozen, trainables, givens, prompt.ids, strength=strength
    )
    return _joined(kv, prompt.weights)


@functools.partial(jax.jit, static_argnames=("methods", "model"))
def unguided_keys_values(
    model: sd.StableDiffusion,
    methods: tuple[condition.Method, ...],
    frozen: sd.Frozen,
    trainables: Sequence[condition.Trainable],
    negative: Tokens,
    strength: jax.Array,
) -> dict:
    """Keys and values of the negative prompt beside a prompt that names people: leaves
    [1, K * T, inner]."""
    kv = condition.unguided_keys_values(
        model, methods, frozen, trainables, negative.ids, strength=strength
    )
    return _joined(kv, negative.weights)


@functools.partial(jax.jit, static_argnames="model")
def plain_keys_values(model: sd.StableDiffusion, frozen: sd.Frozen, tokens: Tokens) -> dict:
    """Keys and values of a negative prompt, as the plain model has them: leaves [1, K * T, inner].

    Of SDXL an empty one is zeros (`sd.encode_negative`).
    """
    encoded = sd.encode_negative(model, frozen, tokens.ids)
    return _joined(sd.text_keys_values(model, frozen, encoded), tokens.weights)


def _joined(kv: dict, weights: jax.Array) -> dict:
    """The chunks of a text, leaves [K, T, inner], with their weights [K, T], as one.

    The pooled output is that of the first chunk, as in AUTOMATIC1111 and ComfyUI.
    """

    def weighted(leaf):
        return (leaf * weights[..., None].astype(leaf.dtype)).reshape(1, -1, leaf.shape[-1])

    blocks = {name: own for name, own in kv.items() if name != "pooled"}
    pooled = {"pooled": kv["pooled"][:1]} if "pooled" in kv else {}
    return jax.tree.map(weighted, blocks) | pooled


@jax.jit
def stacked(plain: Sequence[dict], named: Sequence[dict]) -> dict:
    """Keys and values of R rows, leaves [R, 2, T, inner], from leaves [1, T, inner] of each."""
    halves = [jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *kv) for kv in (plain, named)]
    return jax.tree.map(lambda a, b: jnp.stack([a, b], axis=1), *halves)


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn, as far as the program that draws them depends on it.

    Attributes:
      size: height and width in pixels.
      scheduler: a name in `samplers.SAMPLERS`.
      eta: share of fresh noise in DDIM.
      interval: where there is guidance, see `samplers.guided_between`; None for everywhere.
      rescale: how much guidance keeps the contrast of the prompt alone, see `samplers.guided`.
      told: what SDXL is told instead of the picture's own size: height and width before it was
        scaled, top and left of the cut; None for a whole picture of its size.
    """

    size: tuple[int, int]
    scheduler: str
    steps: int
    eta: float = 0.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    told: tuple[int, int, int, int] | None = None


def choose_sampling(
    model: sd.StableDiffusion,
    cfg: Any,
    size: tuple[int, int],
    *,
    scheduler: str | None,
    steps: int,
    guidance: float,
) -> Sampling:
    """How pictures are drawn.

    Args:
      cfg: a SampleConfig or BatchConfig, for what pictures have in common.
      scheduler: None for the checkpoint's own.

    Raises:
      ConfigError: sampler or checkpoint have no use for a setting that is given, or no step is
        guided.
      ScheduleError: the sampler cannot take so many steps.
    """
    name = scheduler or model.schedule.sampler
    sampler = samplers.SAMPLERS[name]
    wrong = (
        ("eta", bool(cfg.eta) and not sampler.takes_eta),
        ("karras_sigmas", bool(cfg.karras_sigmas) and not sampler.takes_karras),
        ("timestep_spacing", cfg.timestep_spacing is not None and not sampler.takes_spacing),
    )
    for setting, is_unused in wrong:
        if is_unused:
            own = "" if scheduler else ", which is the checkpoint's own"
            raise ConfigError(
                f"{setting} {getattr(cfg, setting)} has no effect with sampler {name}{own}; "
                "choose another scheduler",
                advice=f", or leave --{setting} out",
            )
    told = told_of(model, cfg, size)
    visited, span = samplers.visited_timesteps(name, model.schedule, steps), cfg.guidance_interval
    if not is_guided(guidance):
        return Sampling(size, name, steps, cfg.eta, told=told)
    interval = (span[0], span[1]) if span is not None else None
    if interval and not np.any(samplers.lies_between(visited, interval, model.schedule)):
        raise ConfigError(
            f"no step of num_inference_steps {steps} lies within guidance_interval {span[0]} "
            f"{span[1]}, so that nothing would be guided: take more steps",
            advice=", or --guidance_interval 0 1, which is everywhere (--preset fast sets another)",
        )
    return Sampling(size, name, steps, cfg.eta, interval, cfg.guidance_rescale, told)


def told_of(
    model: sd.StableDiffusion, cfg: Any, size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """`Sampling.told` of the settings of a run.

    Raises:
      ConfigError: the checkpoint is not SDXL, and is told no sizes.
    """
    original, cut = cfg.original_size, cfg.crop_top_left
    if original is None and cut is None:
        return None
    if model.text_2 is None:
        name = "crop_top_left" if original is None else "original_size"
        raise ConfigError(f"--{name} is for SDXL, and this checkpoint is none: leave it out")
    height, width = original or size
    top, left = cut or (0, 0)
    return height, width, top, left


@functools.partial(jax.jit, static_argnames=("model", "sampling"))
def draw_rows(
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    kv: dict,
    numbers: jax.Array,
    guidance: jax.Array | None,
    sampling: Sampling,
) -> jax.Array:
    """Draws one picture a row: float32[R, height, width, 3] in [-1, 1].

    Args:
      kv: leaves [R, 2, T, inner]: of the negative prompt, and of the prompt.
      numbers: uint32[R, 2], seed and the picture's number; a row depends on nothing else in the
        call.
      guidance: float32[R]; None where there is none, which leaves half of the work out.
    """
    latent_size = tuple(side // model.vae.downscale for side in sampling.size)
    shape = (*latent_size, model.unet.in_channels)
    x, keys = jax.vmap(
        lambda number: samplers.initial_noise(number[0], number[1:].astype(jnp.int32), shape)
    )(numbers)
    x, keys = x[:, 0], keys[:, 0]

    visited = samplers.visited_timesteps(sampling.scheduler, model.schedule, sampling.steps)
    alike = None if "pooled" in kv else sd.embed_times(model, frozen, jnp.asarray(visited))

    def predict_from(first):
        # The unguided rows come first, then those of the prompts.
        def joined(leaf):
            return jnp.concatenate([leaf[:, half] for half in range(first, 2)])

        rows = jax.tree.map(joined, kv)
        embedded = alike or embed_rows(model, frozen, visited, rows["pooled"], sampling)

        def predict(x, timestep):
            step = jnp.argmax(visited == timestep)  # samplers tell the time, not the step

            def at_step(leaf):
                own = jax.lax.dynamic_slice_in_dim(leaf, step, 1)
                return own if alike else own[0]

            times = jax.tree.map(at_step, embedded)
            return sd.denoise(model, frozen, x, times, rows)

        return predict

    predict = predict_from(1)
    if guidance is not None:
        scale = guidance[:, None, None, None]
        both = samplers.guided(predict_from(0), scale, sampling.rescale)
        interval = sampling.interval
        if interval is None:
            predict = both
        else:
            predict = samplers.guided_between(both, predict, interval, model.schedule)
    name, steps, eta = sampling.scheduler, sampling.steps, sampling.eta
    x = samplers.sample(name, predict, x, model.schedule, steps, eta=eta, keys=keys)
    return decode(model, frozen, x)


def embed_rows(
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    visited: np.ndarray,
    pooled: jax.Array,
    sampling: Sampling,
) -> dict:
    """What SDXL's UNet adds at each of S timesteps to each of R rows: leaves [S, R, width].

    Args:
      pooled: float32[R, pooled_dim].
    """
    told = sampling.told or (*sampling.size, 0, 0)
    size_ids = jnp.broadcast_to(jnp.array([*told, *sampling.size])[None], (len(pooled), 6))

    def embed(timestep):
        return sd.embed_times(model, frozen, timestep[None], pooled, size_ids)

    return jax.vmap(embed)(jnp.asarray(visited))


@functools.partial(jax.jit, static_argnames=("model", "sampling"))
def draw(
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    kv: dict,
    seed: jax.Array,
    indices: jax.Array,
    guidance_scale: jax.Array | None,
    sampling: Sampling,
) -> jax.Array:
    """Draws the pictures `indices` of a seed: float32[B, height, width, 3] in [-1, 1].

    Args:
      kv: leaves [2, T, inner], from `prompt_keys_values`.
      seed: uint32[]; indices: int32[B]; picture i of a seed depends on nothing else in the call.
      guidance_scale: float32[]; None where there is none, which leaves half of the work out.
    """
    B = indices.shape[0]
    seeds = jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), (B,))
    numbers = jnp.stack([seeds, indices.astype(jnp.uint32)], axis=1)
    rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (B, *leaf.shape)), kv)
    scale = None if guidance_scale is None else jnp.broadcast_to(guidance_scale, (B,))
    return draw_rows(model, frozen, rows, numbers, scale, sampling)


def decode(model: sd.StableDiffusion, frozen: sd.Frozen, latents: jax.Array) -> jax.Array:
    """`sd.decode` of latents [B, h, w, C], `DECODED` at a time.

    The decoder's last maps have 64 times the pixels of latents and 32 times their channels: with
    more pictures at once they would need more memory than all that went before.
    """
    if len(latents) <= DECODED:
        return sd.decode(model, frozen, latents)
    return jax.lax.map(lambda x: sd.decode(model, frozen, x[None])[0], latents, batch_size=DECODED)


def scale_of(guidance_scale: float) -> jax.Array | None:
    """A guidance scale as `draw` takes it."""
    return jnp.float32(guidance_scale) if is_guided(guidance_scale) else None


def draw_prompt(
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    kv: dict,
    sampling: Sampling,
    *,
    seed: int,
    count: int,
    batch_size: int,
    guidance_scale: float,
) -> np.ndarray:
    """Draws pictures 0..count-1 of a seed in calls of one shape: uint8[count, height, width, 3]."""
    batch_size = min(batch_size, count)
    seed, scale, pictures = jnp.uint32(seed), scale_of(guidance_scale), []
    for first in range(0, count, batch_size):
        # The last call is filled up with further pictures, so that one program serves all calls.
        indices = jnp.arange(first, first + batch_size, dtype=jnp.int32)
        drawn = draw(model, frozen, kv, seed, indices, scale, sampling)
        pictures.append(images.to_uint8(np.asarray(drawn)))
    return np.concatenate(pictures)[:count]


@functools.partial(jax.jit, static_argnames=("mesh", "model", "sampling"))
def draw_everywhere(
    mesh: Mesh,
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    kv: dict,
    numbers: jax.Array,
    guidance: jax.Array | None,
    sampling: Sampling,
) -> jax.Array:
    """`draw_rows` with the rows spread over the first axis of a mesh, on all of its devices."""

    def own(frozen, kv, numbers, guidance):
        return draw_rows(model, frozen, kv, numbers, guidance, sampling)

    each = P(mesh.axis_names[0])
    # Nothing is communicated, so there is nothing that checking replication could find.
    spread = jax.shard_map(
        own, mesh=mesh, in_specs=(P(), each, each, each), out_specs=each, check_vma=False
    )
    return spread(frozen, kv, numbers, guidance)


# How `draw_everywhere` is kept.
DRAWING = traces.KeptFunction("draw_everywhere", (0, 1, 6), (), lambda *_: 0)


def picture_size(
    model: sd.StableDiffusion,
    height: int | None,
    width: int | None,
    names: tuple[str, str] = ("height", "width"),
) -> tuple[int, int]:
    """Height and width in pixels, the model's own where not given.

    Raises:
      ConfigError: the VAE cannot halve such a picture as often as it must; the message calls the
        sides by `names`.
    """
    own = model.unet.sample_size * model.vae.downscale
    size = (height or own, width or own)
    multiple = model.vae.downscale
    for name, side in zip(names, size, strict=True):
        if side % multiple:
            raise ConfigError(f"{name} must be a multiple of {multiple}, got {side}")
    return size
