"""The programs that draw: prompts -> pictures, one compiled program per shape."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from idea_jax.config.settings import ConfigError
from idea_jax.data import images
from idea_jax.data.tokenizer import Tokens
from idea_jax.diffusion import samplers
from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.models.unet import project_kv
from idea_jax.pytrees import abstract
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

    Row 0 is the unguided condition (negative prompt), row 1 the prompt. The person's adapter and
    K/V delta act on the prompt only: they were trained on texts that name the person, and the plain
    model as the other end lets guidance push towards the person too.

    Args:
      prompt_ids, negative_ids: int32[T].
      strength: float32[], scales adapter and K/V delta.
    """
    prompt = condition.drawing_keys_values(
        model, method, frozen, trainable, given, prompt_ids[None], strength=strength
    )
    negative = project_kv(
        frozen.cross_kv, sd.encode_text(model, frozen, negative_ids[None]), model.dtype
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), negative, prompt)


@functools.partial(jax.jit, static_argnames=("methods", "model"))
def cast_keys_values(
    model: sd.StableDiffusion,
    methods: tuple[condition.Method, ...],
    frozen: sd.Frozen,
    trainables: Sequence[condition.Trainable],
    givens: Sequence[condition.Given],
    prompt: Tokens,
    negative: Tokens,
    strength: jax.Array,
) -> dict:
    """What `prompt_keys_values` returns, of a prompt that names one person or several: leaves
    [2, K * T, inner].

    Each chunk is encoded by itself; all of them are attended to together. A token's weight
    multiplies its row of the condition (A1111's emphasis without its normalisation), and so its
    keys and values, which are linear in it.

    Args:
      prompt: K chunks; ids as in `condition.keys_values_together`.
      negative: as many.
    """

    def joined(kv, weights):
        def weighted(leaf):
            return (leaf * weights[..., None].astype(leaf.dtype)).reshape(1, -1, leaf.shape[-1])

        return jax.tree.map(weighted, kv)

    named = condition.keys_values_together(
        model, methods, frozen, trainables, givens, prompt.ids, strength=strength
    )
    plain = project_kv(frozen.cross_kv, sd.encode_text(model, frozen, negative.ids), model.dtype)
    return jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]),
        joined(plain, negative.weights),
        joined(named, prompt.weights),
    )


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn, as far as the program that draws them depends on it.

    Attributes:
      size: height and width in pixels.
      scheduler: a name in `samplers.SAMPLERS`.
      eta: share of fresh noise in DDIM.
      interval: where there is guidance, see `samplers.guided_between`; None for everywhere.
    """

    size: tuple[int, int]
    scheduler: str
    steps: int
    eta: float = 0.0
    interval: tuple[float, float] | None = None


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
      guidance_scale: float32[]; None for 1, which leaves the unguided half of the work out.
    """
    B = indices.shape[0]
    latent_size = tuple(side // model.vae.downscale for side in sampling.size)
    x, keys = samplers.initial_noise(seed, indices, (*latent_size, model.unet.in_channels))

    visited = samplers.visited_timesteps(sampling.scheduler, model.schedule, sampling.steps)
    embedded = sd.embed_times(model, frozen, jnp.asarray(visited))

    def predict_from(first):
        rows = jax.tree.map(lambda leaf: jnp.repeat(leaf[first:], B, axis=0), kv)

        def predict(x, timestep):
            step = jnp.argmax(visited == timestep)  # samplers tell the time, not the step
            times = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, step, 1), embedded)
            return sd.denoise(model, frozen, x, times, rows)

        return predict

    predict = predict_from(1)
    if guidance_scale is not None:
        both, interval = samplers.guided(predict_from(0), guidance_scale), sampling.interval
        if interval is None:
            predict = both
        else:
            predict = samplers.guided_between(both, predict, interval, model.schedule)
    fresh_noise = {"eta": sampling.eta, "keys": keys} if sampling.scheduler == "ddim" else {}
    sample = samplers.SAMPLERS[sampling.scheduler]
    x = sample(predict, x, model.schedule, sampling.steps, **fresh_noise)
    return decode(model, frozen, x)


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
    return None if guidance_scale == 1 else jnp.float32(guidance_scale)


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
    seed: jax.Array,
    indices: jax.Array,
    guidance_scale: jax.Array | None,
    sampling: Sampling,
) -> jax.Array:
    """`draw` on every device of a mesh, each with a prompt and picture numbers of its own.

    Args:
      mesh: of D devices, with the axis `pictures`.
      kv: leaves [D, 2, T, inner]; indices: int32[D, B].

    Returns:
      float32[D, B, height, width, 3] in [-1, 1].
    """

    def one(frozen, kv, seed, indices, guidance_scale):
        own = jax.tree.map(lambda leaf: leaf[0], kv)
        return draw(model, frozen, own, seed, indices[0], guidance_scale, sampling)[None]

    each = P("pictures")
    # Nothing is communicated, so there is nothing that checking replication could find.
    spread = jax.shard_map(
        one,
        mesh=mesh,
        in_specs=(P(), each, P(), each, P()),
        out_specs=each,
        check_vma=False,
    )
    return spread(frozen, kv, seed, indices, guidance_scale)


# How `draw_everywhere` is kept.
DRAWING = traces.Kind("draw_everywhere", (0, 1, 7), (), lambda *_: 0)


def arrange(prompts: int, count: int, batch_size: int) -> tuple[Mesh, list[tuple[int, int]], int]:
    """How the pictures of some prompts are spread over the devices of the process.

    Returns:
      The devices that draw; the units of work, each a batch of one prompt, as prompt's number and
      first picture; and the pictures of a unit. The last unit of a prompt is filled up with further
      pictures.
    """
    devices = jax.local_devices()
    batch_size = min(batch_size, count, math.ceil(prompts * count / len(devices)))
    units = [(n, first) for n in range(prompts) for first in range(0, count, batch_size)]
    devices = np.array(devices[: len(units)])
    return Mesh(devices, ("pictures",), axis_types=(AxisType.Auto,)), units, batch_size


def lower_drawing(
    model: sd.StableDiffusion,
    prompts: int,
    chunks: int,
    sampling: Sampling,
    *,
    count: int,
    batch_size: int,
    guidance_scale: float,
) -> jax.stages.Lowered:
    """The program of `draw_all` with these arguments, from shapes alone: weights may be missing.

    One program draws all seeds. There are so many prompts, with `chunks` chunks each.
    """
    mesh, _, batch_size = arrange(prompts, count, batch_size)
    each, shapes = NamedSharding(mesh, P("pictures")), sd.shapes(model)
    T = chunks * model.text.max_position_embeddings
    kv = jax.tree.map(
        lambda kernel: jax.ShapeDtypeStruct((mesh.size, 2, T, kernel.shape[1]), model.dtype),
        shapes.cross_kv,
    )
    numbers = jax.ShapeDtypeStruct((mesh.size, batch_size), jnp.int32)
    scale = None if guidance_scale == 1 else jax.ShapeDtypeStruct((), jnp.float32)
    arguments = (
        mesh,
        model,
        abstract(shapes, NamedSharding(mesh, P()), model.dtype),
        abstract(kv, each),
        jax.ShapeDtypeStruct((), jnp.uint32),  # of the seed
        abstract(numbers, each),
        scale,
        sampling,
    )
    return traces.lower(DRAWING, draw_everywhere, arguments)


def draw_all(
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    keys_values: Sequence[Callable[[sd.Frozen], dict]],
    sampling: Sampling,
    *,
    seed: int,
    count: int,
    batch_size: int,
    guidance_scale: float,
) -> Iterator[np.ndarray]:
    """Yields pictures 0..count-1 of a seed for each prompt: uint8[count, height, width, 3].

    The pictures are spread over all devices of the process, in calls of one shape.

    Args:
      keys_values: of each prompt a function of the frozen weights, to leaves [2, T, inner].
      batch_size: pictures of one prompt that a device draws at once, at most.
    """
    mesh, units, batch_size = arrange(len(keys_values), count, batch_size)
    frozen = jax.device_put(frozen, NamedSharding(mesh, P()))
    each = NamedSharding(mesh, P("pictures"))
    known: dict[int, dict] = {}  # keys and values of the prompts under way
    called = None  # units and pictures of the call that is not fetched yet
    drawn: list[np.ndarray] = []  # of the prompt that is not complete yet

    def complete(units, pictures):
        for (_, first), part in zip(units, np.asarray(pictures), strict=False):
            drawn.append(images.to_uint8(part))
            progress.update()
            if first + batch_size >= count:
                yield np.concatenate(drawn)[:count]
                drawn.clear()

    progress = tqdm(total=len(units), unit="batch", disable=None, leave=False)
    for start in range(0, len(units), mesh.size):
        now = units[start : start + mesh.size]
        known = {
            n: known[n] if n in known else jax.device_get(keys_values[n](frozen)) for n, _ in now
        }
        filled = [*now, *[now[-1]] * (mesh.size - len(now))]
        kv = jax.tree.map(lambda *leaves: np.stack(leaves), *(known[n] for n, _ in filled))
        numbers = np.array([range(first, first + batch_size) for _, first in filled], np.int32)
        pictures = traces.call(
            DRAWING,
            draw_everywhere,
            mesh,
            model,
            frozen,
            jax.device_put(kv, each),
            jnp.uint32(seed),
            jax.device_put(numbers, each),
            scale_of(guidance_scale),
            sampling,
        )
        # While the devices draw the one just called, the pictures of the one before are fetched
        # here, and written to the disk by whoever takes them.
        if called:
            yield from complete(*called)
        called = now, pictures
    yield from complete(*called)
    progress.close()


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
            raise ConfigError(f"--{name} must be a multiple of {multiple}, got {side}")
    return size
