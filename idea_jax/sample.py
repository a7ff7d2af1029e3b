"""Drawing pictures of a learned person: prompts -> images, one compiled program per shape."""

import functools
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from idea_jax import checkpoint, compile_cache, learned_embeds, portraits, pytrees
from idea_jax.config import COMPUTE_DTYPES, ConfigError, SampleConfig
from idea_jax.data import images, text
from idea_jax.diffusion import samplers
from idea_jax.diffusion.schedule import ScheduleConfig
from idea_jax.files import atomic_write, check_writable, file_digest, slug, write_together
from idea_jax.formats import enhancer as enhancers
from idea_jax.method import condition, shared
from idea_jax.models import flash, hub, sd
from idea_jax.models.unet import project_kv
from idea_jax.pytrees import abstract

log = logging.getLogger(__name__)

NOBODY = "<person>"  # the placeholder of people without a name of their own in prompts
DECODED = 8  # pictures that the autoencoder decodes at once


@functools.partial(jax.jit, static_argnames=("method", "model"))
def prompt_keys_values(
    method: condition.Method,
    model: sd.StableDiffusion,
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
        method, model, frozen, trainable, given, prompt_ids[None], strength=strength
    )
    negative = project_kv(
        frozen.cross_kv, sd.encode_text(model, frozen, negative_ids[None]), model.dtype
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), negative, prompt)


@functools.partial(jax.jit, static_argnames=("methods", "model"))
def cast_keys_values(
    methods: tuple[condition.Method, ...],
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    trainables: Sequence[condition.Trainable],
    givens: Sequence[condition.Given],
    prompt: text.Tokens,
    negative: text.Tokens,
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
        methods, model, frozen, trainables, givens, prompt.ids, strength=strength
    )
    plain = project_kv(frozen.cross_kv, sd.encode_text(model, frozen, negative.ids), model.dtype)
    return jax.tree.map(
        lambda a, b: jnp.concatenate([a, b]),
        joined(plain, negative.weights),
        joined(named, prompt.weights),
    )


@functools.partial(
    jax.jit,
    static_argnames=("model", "size", "scheduler", "steps", "is_guided", "eta", "interval"),
)
def draw(
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    kv: dict,
    seed: jax.Array,
    indices: jax.Array,
    guidance_scale: jax.Array,
    *,
    size: tuple[int, int],
    scheduler: str,
    steps: int,
    is_guided: bool,
    eta: float,
    interval: tuple[float, float] | None = None,
) -> jax.Array:
    """Draws the pictures `indices` of a seed: float32[B, height, width, 3] in [-1, 1].

    Args:
      kv: leaves [2, T, inner], from `prompt_keys_values`.
      seed: uint32[]; indices: int32[B]; picture i of a seed depends on nothing else in the call.
      size: height and width in pixels.
      is_guided: False leaves the unguided half of the work out (guidance scale 1).
      eta: share of fresh noise in DDIM.
      interval: where there is guidance, see `samplers.guided_between`; None for everywhere.
    """
    B = indices.shape[0]
    latent_size = tuple(side // model.vae.downscale for side in size)
    x, keys = samplers.initial_noise(seed, indices, (*latent_size, model.unet.in_channels))

    visited = samplers.visited_timesteps(scheduler, model.schedule, steps)
    embedded = sd.embed_times(model, frozen, jnp.asarray(visited))

    def predict_from(first):
        rows = jax.tree.map(lambda leaf: jnp.repeat(leaf[first:], B, axis=0), kv)

        def predict(x, timestep):
            step = jnp.argmax(visited == timestep)  # samplers tell the time, not the step
            times = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, step, 1), embedded)
            return sd.denoise(model, frozen, x, times, rows)

        return predict

    predict = predict_from(1)
    if is_guided:
        both = samplers.guided(predict_from(0), guidance_scale)
        if interval is None:
            predict = both
        else:
            predict = samplers.guided_between(both, predict, interval, model.schedule)
    fresh_noise = {"eta": eta, "keys": keys} if scheduler == "ddim" else {}
    x = samplers.SAMPLERS[scheduler](predict, x, model.schedule, steps, **fresh_noise)
    return decode(model, frozen, x)


def decode(model: sd.StableDiffusion, frozen: sd.Frozen, latents: jax.Array) -> jax.Array:
    """`sd.decode` of latents [B, h, w, C], `DECODED` at a time.

    The decoder's last maps have 64 times the pixels of latents and 32 times their channels: with
    more pictures at once they would need more memory than all that went before.
    """
    if len(latents) <= DECODED:
        return sd.decode(model, frozen, latents)
    return jax.lax.map(lambda x: sd.decode(model, frozen, x[None])[0], latents, batch_size=DECODED)


def draw_prompt(
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    kv: dict,
    *,
    seed: int,
    count: int,
    batch_size: int,
    size: tuple[int, int],
    scheduler: str,
    steps: int,
    guidance_scale: float,
    eta: float = 0.0,
    interval: tuple[float, float] | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Draws pictures 0..count-1 of a seed in calls of one shape: uint8[count, height, width, 3]."""
    batch_size = min(batch_size, count)
    pictures = []
    calls = range(0, count, batch_size)
    for first in tqdm(calls, unit="batch", disable=None if progress else True, leave=False):
        # The last call is filled up with further pictures, so that one program serves all calls.
        drawn = draw(
            model,
            frozen,
            kv,
            jnp.uint32(seed),
            jnp.arange(first, first + batch_size, dtype=jnp.int32),
            jnp.float32(guidance_scale),
            size=size,
            scheduler=scheduler,
            steps=steps,
            is_guided=guidance_scale != 1,
            eta=eta,
            interval=interval,
        )
        pictures.append(images.to_uint8(np.asarray(drawn)))
    return np.concatenate(pictures)[:count]


@functools.partial(
    jax.jit,
    static_argnames=("mesh", "model", "size", "scheduler", "steps", "is_guided", "eta", "interval"),
)
def draw_everywhere(
    mesh: Mesh,
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    kv: dict,
    seed: jax.Array,
    indices: jax.Array,
    guidance_scale: jax.Array,
    **settings,
) -> jax.Array:
    """`draw` on every device of a mesh, each with a prompt and picture numbers of its own.

    Args:
      mesh: of D devices, with the axis `pictures`.
      kv: leaves [D, 2, T, inner]; indices: int32[D, B].
      settings: as of `draw`.

    Returns:
      float32[D, B, height, width, 3] in [-1, 1].
    """

    def one(frozen, kv, seed, indices, guidance_scale):
        own = jax.tree.map(lambda leaf: leaf[0], kv)
        return draw(model, frozen, own, seed, indices[0], guidance_scale, **settings)[None]

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
    chunks: int = 1,
    *,
    count: int,
    batch_size: int,
    guidance_scale: float,
    **settings,
) -> jax.stages.Lowered:
    """The program of `draw_all` with these arguments, from shapes alone: weights may be missing.

    One program draws all seeds. The prompts have `chunks` chunks each.
    """
    mesh, _, batch_size = arrange(prompts, count, batch_size)
    each, shapes = NamedSharding(mesh, P("pictures")), sd.shapes(model)
    T = chunks * model.text.max_position_embeddings
    kv = jax.tree.map(
        lambda kernel: jax.ShapeDtypeStruct((mesh.size, 2, T, kernel.shape[1]), model.dtype),
        shapes.cross_kv,
    )
    numbers = jax.ShapeDtypeStruct((mesh.size, batch_size), jnp.int32)
    return draw_everywhere.lower(
        mesh,
        model,
        abstract(shapes, NamedSharding(mesh, P()), model.dtype),
        abstract(kv, each),
        jax.ShapeDtypeStruct((), jnp.uint32),  # of the seed
        abstract(numbers, each),
        jax.ShapeDtypeStruct((), jnp.float32),  # of the guidance
        is_guided=guidance_scale != 1,
        **settings,
    )


def draw_all(
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    keys_values: Callable[[sd.Frozen, int], dict],
    prompts: int,
    *,
    seed: int,
    count: int,
    batch_size: int,
    guidance_scale: float,
    **settings,
) -> Iterator[np.ndarray]:
    """Yields pictures 0..count-1 of a seed for each prompt: uint8[count, height, width, 3].

    The pictures are spread over all devices of the process, in calls of one shape.

    Args:
      keys_values: (frozen, prompt's number) -> leaves [2, T, inner].
      prompts: number of prompts.
      batch_size: pictures of one prompt that a device draws at once, at most.
      settings: as of `draw`.
    """
    mesh, units, batch_size = arrange(prompts, count, batch_size)
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
            n: known[n] if n in known else jax.device_get(keys_values(frozen, n)) for n, _ in now
        }
        filled = [*now, *[now[-1]] * (mesh.size - len(now))]
        kv = jax.tree.map(lambda *leaves: np.stack(leaves), *(known[n] for n, _ in filled))
        numbers = np.array([range(first, first + batch_size) for _, first in filled], np.int32)
        pictures = draw_everywhere(
            mesh,
            model,
            frozen,
            jax.device_put(kv, each),
            jnp.uint32(seed),
            jax.device_put(numbers, each),
            jnp.float32(guidance_scale),
            is_guided=guidance_scale != 1,
            **settings,
        )
        # While the devices draw the one just called, the pictures of the one before are fetched
        # here, and written to the disk by whoever takes them.
        if called:
            yield from complete(*called)
        called = now, pictures
    yield from complete(*called)
    progress.close()


def read_prompts(cfg: SampleConfig) -> list[str]:
    """The prompts of a run, in order, each once.

    Raises:
      TextError: the prompt file cannot be read or is empty.
    """
    prompts = cfg.prompt if cfg.prompt_file is None else text.read_prompts(Path(cfg.prompt_file))
    unique = list(dict.fromkeys(prompts))
    if len(unique) < len(prompts):
        log.warning("%d repeated prompts are drawn once", len(prompts) - len(unique))
    return unique


@dataclass(frozen=True)
class Sitter:
    """Somebody who is drawn: their identity, the file it came from, their name in prompts; or the
    photos instead of a file."""

    name: str
    identity: checkpoint.Identity
    source: Path | None
    photos: tuple[images.PictureFile, ...] = ()

    def about(self) -> dict:
        """What pictures of them depend on; of paths no more than the files' own names."""
        if self.source is not None:
            where = {"file": self.source.name, "sha256": file_digest(self.source)}
        else:
            where = {"photo": [{"file": p.name, "sha256": p.sha256()} for p in self.photos]}
        method, enhancer = self.identity.method, self.identity.enhancer
        ours = {"enhancer": enhancer} if enhancer is not None else {}
        return {**where, "profile": method.profile, "steps": self.identity.steps, **ours}


def read_sitters(cfg: SampleConfig) -> list[Sitter]:
    """The people that a run draws, in order.

    Raises:
      ConfigError: two have the same name.
      IdentityError, EmbedsError, FileNotFoundError: a file cannot be used.
    """
    if cfg.identity is None:
        return [Sitter("", *read_tokens(cfg))]
    sitters = []
    for given in cfg.identity:
        named = re.fullmatch(r"([^={}/]+)=(.+)", given)
        path = Path(given)
        if named and not path.exists():
            path = Path(named[2])
        is_named = named and path == Path(named[2])
        if path.is_dir():
            path = path / "identity.safetensors"
        # Training calls all of them identity.safetensors, in a folder with the person's name.
        own = path.resolve().parent.name if path.stem == "identity" else path.stem
        name = named[1] if is_named else own
        sitters.append(Sitter(name, checkpoint.read_identity(path), path))
    names = [sitter.name for sitter in sitters]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"several of --identity are called {', '.join(twice)}; tell them apart with NAME=FILE"
        )
    return sitters


def read_tokens(cfg: SampleConfig) -> tuple[checkpoint.Identity, Path]:
    """The token embeddings that a run draws with, as an identity, and their file."""
    path, notice = learned_embeds.locate(Path(cfg.learned_embedding_path))
    if notice:
        log.warning(notice)
    whole = path.with_name("identity.safetensors")
    if whole.is_file():
        log.warning(
            "drawing with the token embeddings alone; --identity %s holds all that was learned",
            whole,
        )
    tokens = learned_embeds.read(path)
    if cfg.token is None and len(tokens) > 1:
        raise ConfigError(
            f"{path} holds {len(tokens)} learned tokens, {', '.join(tokens)}: choose one with "
            "--token NAME"
        )
    # Legacy files leave out the angle brackets that the token was trained with.
    named = {name: vectors for name, vectors in tokens.items() if is_same(name, cfg.token)}
    if cfg.token in tokens:
        named = {cfg.token: tokens[cfg.token]}
    if len(named) != 1:
        raise ConfigError(f"--token {cfg.token} is not in {path}, which holds {', '.join(tokens)}")
    (vectors,) = named.values()
    identity = checkpoint.Identity(
        method=condition.make_method("textual_inversion", num_tokens=len(vectors)),
        trainable={"pseudo_tokens": vectors},
        given={},
        # Prompts say {}; the file's own name for the token may be a word of the vocabulary.
        placeholder=NOBODY,
        base_model="unknown",
        revision=None,
        seed=0,
        steps=0,
        embeds_only=True,
    )
    return identity, path


def is_same(name: str, asked: str | None) -> bool:
    """Whether a token of a file is the one that was asked for, if any was."""
    return asked is None or name.strip("<>").lower() == asked.strip("<>").lower()


@dataclass(frozen=True)
class Drawing:
    """One folder of pictures: a prompt, and whom it shows.

    Attributes:
      prompt: as it was given.
      cast: numbers of the people in it.
      tokens: the tokens of the first of the cast follow the vocabulary, then the second's.
      folder: in which the prompt's folder lies, below the run's.
    """

    prompt: str
    cast: tuple[int, ...]
    tokens: text.Tokens
    folder: str


def plan(
    cfg: SampleConfig, prompts: list[str], sitters: list[Sitter], plain: text.Tokenizer
) -> tuple[list[Drawing], text.Tokens]:
    """The drawings of a run, and the tokens of the negative prompt.

    A prompt with {} is drawn once for each person, one with {NAME} once.

    Raises:
      TextError: a prompt names nobody, or somebody unknown, or is far too long.
      ConfigError: the negative prompt names a person.
    """
    drawings = []
    sizes = [sitter.identity.method.num_tokens for sitter in sitters]
    own = [
        plain.with_placeholder(s.identity.placeholder, s.identity.method.num_tokens)
        for s in sitters
    ]
    for prompt in prompts:
        if is_for_each(prompt, [sitter.name for sitter in sitters]):
            for number, (sitter, tokenizer) in enumerate(zip(sitters, own, strict=True)):
                own_text = tokenizer.placeholder.text
                tokens = weighted_tokens(tokenizer, prompt, {"{}": own_text})
                folder = safe_name(sitter.name) if len(sitters) > 1 else "."
                drawings.append(Drawing(prompt, (number,), tokens, folder))
            continue
        # Whatever they are called in their files, here they need words of their own.
        words = {
            s.name: text.Placeholder(f"<sitter-{k}>", n)
            for k, (s, n) in enumerate(zip(sitters, sizes, strict=True))
        }
        _, names = text.fill_names(prompt, words)
        tokenizer = plain
        for name in names:
            tokenizer = tokenizer.with_placeholder(words[name].token, words[name].n)
        tokens = weighted_tokens(
            tokenizer, prompt, {f"{{{name}}}": words[name].text for name in names}
        )
        cast = tuple(k for k, sitter in enumerate(sitters) if sitter.name in names)
        drawings.append(Drawing(prompt, cast, tokens, "."))
    for tokenizer in own:
        negative = weighted_tokens(tokenizer, cfg.negative_prompt, {})
        token = re.escape(tokenizer.placeholder.token)
        names_them = re.search(rf"(?<!\w){token}(?!\w)", cfg.negative_prompt.lower())
        if names_them or (negative.ids >= tokenizer.vocab_size).any():
            raise ConfigError(
                "--negative_prompt is drawn by the plain model, without the person; leave "
                f"{tokenizer.placeholder.token} out of it"
            )
    return drawings, negative


def weighted_tokens(
    tokenizer: text.Tokenizer, prompt: str, words: Mapping[str, str]
) -> text.Tokens:
    """The tokens of a prompt with weights, each of `words` replaced by what it stands for."""
    pieces = []
    for piece, weight in text.parse_weights(prompt):
        for field, word in words.items():
            piece = piece.replace(field, word)
        pieces.append((piece, weight))
    return tokenizer.chunks(pieces)


def padded(tokens: text.Tokens, empty: text.Tokens, count: int) -> text.Tokens:
    """A prompt with empty chunks at its end, so that it has `count` of them."""
    rest = count - len(tokens.ids)
    return text.Tokens(
        *(np.concatenate([own, *[none] * rest]) for own, none in zip(tokens, empty, strict=True))
    )


def is_for_each(prompt: str, names: Sequence[str]) -> bool:
    """Whether a prompt is drawn once for each of the people with these names; otherwise it says by
    name whom it shows."""
    return "{}" in prompt or (len(names) == 1 and f"{{{names[0]}}}" not in prompt)


def safe_name(name: str) -> str:
    """A person's name if it can be that of a folder, else a slug of it."""
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else slug(name)


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


def check_guidance(cfg: SampleConfig, schedule: ScheduleConfig) -> None:
    """Raises ConfigError if guidance is asked for, in an interval that no step lies in."""
    if cfg.guidance_interval is None or cfg.guidance_scale == 1:
        return
    visited = samplers.visited_timesteps(cfg.scheduler, schedule, cfg.num_inference_steps)
    if not np.any(samplers.lies_between(visited, cfg.guidance_interval, schedule)):
        low, high = cfg.guidance_interval
        raise ConfigError(
            f"no step of --num_inference_steps {cfg.num_inference_steps} lies within "
            f"--guidance_interval {low} {high} (which --preset fast sets, too), so that nothing "
            "would be guided: take more steps, or --guidance_interval 0 1, which is everywhere"
        )


def run(cfg: SampleConfig) -> list[Path]:
    """Draws every prompt of a run; returns the folders written, one per prompt and person."""
    prompts = read_prompts(cfg)
    sitters = [] if cfg.photo else read_sitters(cfg)
    # All prompts are read before anything is loaded: the last one's mistake should not cost a run.
    people = {s.name: text.Placeholder(s.identity.placeholder, 1) for s in sitters}
    people = people or {"": text.Placeholder(NOBODY, 1)}
    for prompt in prompts:
        if is_for_each(prompt, list(people)):
            text.fill(prompt, next(iter(people.values())))
        else:
            text.fill_names(prompt, people)
    check_writable(cfg.save_dir)
    found = hub.resolve(cfg.pretrained_model_name_or_path, cfg.revision, cfg.variant)
    compute_dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    attention = flash.resolve(cfg.attention, jax.local_devices()[0], compute_dtype)
    changes = {"vae": hub.resolve_vae(cfg.vae) if cfg.vae else None, "clip_skip": cfg.clip_skip}
    model = sd.read_configs(found.folder, compute_dtype, **changes)
    model = replace(model, attention=attention)
    size = picture_size(model, cfg.height, cfg.width)
    check_guidance(cfg, model.schedule)
    enhancer = open_enhancer(cfg, found.folder, model, sitters)
    if cfg.photo:
        sitters = [see_sitter(cfg, enhancer, model, found)]
    plain = text.load_tokenizer(
        found.folder / "tokenizer", model.text.vocab_size, model.text.max_position_embeddings
    )
    drawings, negative = plan(cfg, prompts, sitters, plain)
    # The prompts of one length are drawn together: one program each.
    empty = plain.chunks([("", 1.0)])
    lengths = [max(len(drawing.tokens.ids), len(negative.ids)) for drawing in drawings]
    groups = {n: [k for k, own in enumerate(lengths) if own == n] for n in dict.fromkeys(lengths)}
    settings = {
        "count": cfg.num_images_per_prompt * cfg.n_iter,
        "batch_size": cfg.batch_size,
        "guidance_scale": cfg.guidance_scale,
        "size": size,
        "scheduler": cfg.scheduler,
        "steps": cfg.num_inference_steps,
        "eta": cfg.eta,
        "interval": tuple(cfg.guidance_interval) if cfg.guidance_interval else None,
    }
    for sitter in sitters:
        checkpoint.check_identity(sitter.identity, model, sitter.source or "--photo")
        warn_of(cfg, sitter.identity, found)
    sd.shapes(model)  # once, before two threads ask for them
    first = next(iter(groups))
    lower = functools.partial(lower_drawing, model, len(groups[first]), first, **settings)
    with compile_cache.ahead(lower):
        _, frozen = sd.load(
            found.folder, variant=cfg.variant, compute_dtype=compute_dtype, **changes
        )
    ours = {}
    if enhancer is not None:
        warn_of_weights(enhancer, frozen, found.name)
        ours = jax.tree.map(jnp.asarray, shared.frozen_part(enhancer.shared))

    def keys_values(numbers, frozen, index):
        number = numbers[index]
        cast = [sitters[k].identity for k in drawings[number].cast]
        return cast_keys_values(
            tuple(identity.method for identity in cast),
            model,
            frozen._replace(shared=ours),
            tuple(identity.trainable for identity in cast),
            tuple(identity.given for identity in cast),
            padded(drawings[number].tokens, empty, lengths[number]),
            padded(negative, empty, lengths[number]),
            jnp.float32(cfg.id_strength),
        )

    folders = {}
    for numbers in groups.values():
        own = functools.partial(keys_values, numbers)
        pictures = draw_all(model, frozen, own, len(numbers), seed=cfg.seed, **settings)
        for number, drawn in zip(numbers, pictures, strict=True):
            drawing = drawings[number]
            about = describe(cfg, found, size, [sitters[k] for k in drawing.cast])
            folder = Path(cfg.save_dir) / drawing.folder
            folders[number] = save_pictures(folder, drawing.prompt, drawn, about)
            log.info("%d pictures in %s", len(drawn), folders[number])
    return [folders[number] for number in sorted(folders)]


def open_enhancer(
    cfg: SampleConfig, checkpoint_folder: Path, model: sd.StableDiffusion, sitters: list[Sitter]
) -> enhancers.Enhancer | None:
    """The shared ID-Enhancer that the people of a run need; None if they need none.

    Raises:
      ConfigError: there is none.
      EnhancerError: its file cannot be used.
      IdentityError: somebody began with another one.
    """
    needy = [sitter for sitter in sitters if sitter.identity.needs_enhancer]
    if not needy and not cfg.photo:
        if cfg.enhancer not in ("auto", "none"):
            log.warning("--enhancer has no effect: nobody here needs a shared ID-Enhancer")
        return None
    path = enhancers.find(cfg.enhancer, checkpoint_folder)
    if path is None:
        who = "--photo needs a shared ID-Enhancer"
        if needy:
            who = f"{needy[0].source} needs the ID-Enhancer that it was trained with (its file has "
            who += f"the SHA-256 {needy[0].identity.enhancer})"
        raise ConfigError(
            f"{who}, and there is no {enhancers.FILE} in the folder of this checkpoint, or "
            "--enhancer none was given; give the file with --enhancer FILE"
        )
    enhancer = enhancers.read(path)
    for sitter in needy:
        if sitter.identity.enhancer != enhancer.sha256:
            raise checkpoint.IdentityError(
                f"{sitter.source} was trained with the ID-Enhancer whose file has the SHA-256 "
                f"{sitter.identity.enhancer}, and that of {path} is {enhancer.sha256}; give the "
                "right file with --enhancer FILE, or train again with this one"
            )
    enhancers.check(enhancer, model, path, face_model=None)
    log.info("%s", introduce(path, enhancer))
    return enhancer


def introduce(path: Path, enhancer: enhancers.Enhancer) -> str:
    """What a user should know of a shared ID-Enhancer, in a line."""
    about = enhancer.about
    return (
        f"shared ID-Enhancer: {path}, trained on {about['people']} people for "
        f"{about['base_model']}; {about['licence']}"
    )


def warn_of_weights(enhancer: enhancers.Enhancer, frozen: sd.Frozen, name: str) -> None:
    """Says if a shared ID-Enhancer was trained on other weights than these.

    Args:
      frozen: in bfloat16 nothing is said, as its digest may be that of the float32 weights.
      name: of the checkpoint.
    """
    kernels = jax.device_get(frozen.cross_kv)
    if jax.tree.leaves(kernels)[0].dtype != np.float32:
        return
    types = (kernels, pytrees.cast(kernels, jnp.bfloat16))
    if not enhancers.is_for_weights(enhancer, [checkpoint.tree_digest(tree) for tree in types]):
        log.warning(
            "the shared ID-Enhancer was trained for %s, on other weights than those of %s: people "
            "may be less like themselves",
            enhancer.about["base_model"],
            name,
        )


def see_sitter(
    cfg: SampleConfig,
    enhancer: enhancers.Enhancer,
    model: sd.StableDiffusion,
    found: hub.Checkpoint,
) -> Sitter:
    """The person on --photo, as a shared ID-Enhancer predicts them.

    Raises:
      ImageError, FaceError: a photo or a face model cannot be used.
      EnhancerError: it is for another recogniser.
    """
    pictures = images.without_copies([images.PictureFile(Path(path)) for path in cfg.photo])
    eyes = portraits.open_eyes(cfg, found.folder, embeds=True, places=False)
    path, face_model = enhancers.find(cfg.enhancer, found.folder), eyes.about.face_model
    enhancers.check(enhancer, model, path, face_model=face_model)
    seen = portraits.look(eyes, pictures, embeds=True, drop_outliers=cfg.drop_outliers)
    method, trainable = shared.predicted_person(enhancer.config, enhancer.shared, seen.id_embed)
    identity = checkpoint.Identity(
        method=method,
        trainable=trainable,
        given={},
        placeholder=NOBODY,
        base_model=found.name,
        revision=found.revision,
        seed=0,
        steps=0,
        enhancer=enhancer.sha256,
    )
    return Sitter("", identity, None, tuple(seen.pictures))


def warn_of(cfg: SampleConfig, identity: checkpoint.Identity, found: hub.Checkpoint) -> None:
    """Says what a user may not expect of an identity."""
    if cfg.id_strength != 1 and not identity.method.acts_at_sampling:
        log.warning(
            "--id_strength has no effect: an identity of profile %r draws with its tokens alone",
            identity.method.profile,
        )
    if identity.base_model not in ("unknown", found.name):
        log.warning(
            "the identity was learned on %s and is drawn with %s", identity.base_model, found.name
        )


def describe(
    cfg: SampleConfig, found: hub.Checkpoint, size: tuple[int, int], cast: list[Sitter]
) -> dict:
    """All that the pictures of a run depend on, but for the prompt."""
    same = (
        *("seed", "scheduler", "num_inference_steps", "guidance_scale", "guidance_interval", "eta"),
        *("negative_prompt", "id_strength", "mixed_precision", "clip_skip"),
    )
    people = [sitter.about() for sitter in cast]
    together = {s.name: about for s, about in zip(cast, people, strict=True)}
    return {
        **{name: getattr(cfg, name) for name in same},
        "pictures": cfg.num_images_per_prompt * cfg.n_iter,
        "height": size[0],
        "width": size[1],
        "model": found.name,
        "revision": found.revision,
        **({"vae": Path(cfg.vae).name} if cfg.vae else {}),
        **({"token": cfg.token} if cfg.token else {}),
        **({"identity": people[0]} if len(cast) == 1 else {"identities": together}),
    }


def save_pictures(save_dir: Path, prompt: str, drawn: np.ndarray, settings: dict) -> Path:
    """Writes the pictures of a prompt, a grid and what made them; returns their folder.

    The same settings write to the same folder again; other settings get a folder of their own.
    """
    about = {"prompt": prompt, **settings, "versions": checkpoint.versions()}
    folder = free_folder(save_dir / slug(prompt), about)
    grid = images.image_grid(list(drawn), math.ceil(math.sqrt(len(drawn))))
    with write_together(folder) as temporary:
        write_json(temporary / "run.json", about)
        for index, pixels in enumerate(drawn):
            note = {"parameters": json.dumps({**about, "picture": index})}
            images.save_png(temporary / f"{index:05d}.png", pixels, note)
        images.save_png(temporary / "grid.png", grid, {"parameters": json.dumps(about)})
    return folder


def free_folder(folder: Path, about: dict) -> Path:
    """`folder`, or `folder-2`, ...: the first that is new or holds a run of the same settings."""
    number, candidate = 1, folder
    while candidate.exists():
        try:
            if json.loads((candidate / "run.json").read_text(encoding="utf-8")) == about:
                return candidate
        except (OSError, ValueError):
            pass  # not a run of ours, or cut off before it was described: leave it alone
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def write_json(path: Path, values: dict | Sequence) -> None:
    """Writes readable JSON, atomically."""
    content = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    with atomic_write(path) as temporary:
        # Lone surrogates (file names that are no UTF-8) become JSON's own escapes.
        temporary.write_bytes(content.encode("utf-8", "backslashreplace"))
