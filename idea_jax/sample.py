"""Drawing pictures of a learned person: prompts -> images, one compiled program per shape."""

import functools
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from idea_jax import checkpoint, learned_embeds
from idea_jax.config import COMPUTE_DTYPES, ConfigError, SampleConfig
from idea_jax.data import images, text
from idea_jax.diffusion import samplers
from idea_jax.files import atomic_write, check_writable, slug, write_together
from idea_jax.method import condition
from idea_jax.models import flash, hub, sd
from idea_jax.models.unet import project_kv

log = logging.getLogger(__name__)


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

    def predict_from(first):
        rows = jax.tree.map(lambda leaf: jnp.repeat(leaf[first:], B, axis=0), kv)
        return lambda x, timestep: sd.predict(model, frozen, x, timestep, rows)

    predict = predict_from(1)
    if is_guided:
        both = samplers.guided(predict_from(0), guidance_scale)
        if interval is None:
            predict = both
        else:
            predict = samplers.guided_between(both, predict, interval, model.schedule)
    fresh_noise = {"eta": eta, "keys": keys} if scheduler == "ddim" else {}
    x = samplers.SAMPLERS[scheduler](predict, x, model.schedule, steps, **fresh_noise)
    return sd.decode(model, frozen, x)


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


def read_prompts(cfg: SampleConfig) -> list[str]:
    """The prompts of a run, in order, each once.

    Raises:
      ConfigError: the prompt file cannot be read or is empty.
    """
    prompts = cfg.prompt
    if prompts is None:
        try:
            lines = Path(cfg.prompt_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the prompt file {cfg.prompt_file}: {error}") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ConfigError(f"the prompt file {cfg.prompt_file} holds no prompt")
    unique = list(dict.fromkeys(prompts))
    if len(unique) < len(prompts):
        log.warning("%d repeated prompts are drawn once", len(prompts) - len(unique))
    return unique


def read_person(cfg: SampleConfig) -> tuple[checkpoint.Identity, Path]:
    """The identity that a run draws, and the file it came from."""
    if cfg.identity is not None:
        path = Path(cfg.identity)
        return checkpoint.read_identity(path), path
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
    if len(tokens) != 1:
        raise ConfigError(f"expected one learned token in {path}, found {', '.join(tokens)}")
    (vectors,) = tokens.values()
    identity = checkpoint.Identity(
        method=condition.make_method("textual_inversion", num_tokens=len(vectors)),
        trainable={"pseudo_tokens": vectors},
        given={},
        # Prompts say {}; the file's own name for the token may be a word of the vocabulary.
        placeholder="<person>",
        base_model="unknown",
        revision=None,
        seed=0,
        steps=0,
        embeds_only=True,
    )
    return identity, path


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


def run(cfg: SampleConfig) -> list[Path]:
    """Draws every prompt of a run; returns the folders written, one per prompt."""
    prompts = read_prompts(cfg)
    identity, source = read_person(cfg)
    # All prompts are read before anything is loaded: the last one's mistake should not cost a run.
    person = text.Placeholder(identity.placeholder, identity.method.num_tokens)
    filled = [text.fill(prompt, person) for prompt in prompts]
    check_writable(cfg.save_dir)
    found = hub.resolve(cfg.pretrained_model_name_or_path, cfg.revision, cfg.variant)
    compute_dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    attention = flash.resolve(cfg.attention, jax.default_backend(), compute_dtype)
    model = sd.read_configs(found.folder, compute_dtype)
    size = picture_size(model, cfg.height, cfg.width)
    tokenizer = text.load_tokenizer(
        found.folder / "tokenizer", model.text.vocab_size, model.text.max_position_embeddings
    ).with_placeholder(person.token, person.n)
    token_ids = tokenizer([*filled, cfg.negative_prompt])
    if (token_ids[-1] >= tokenizer.vocab_size).any():
        raise ConfigError(
            "--negative_prompt is drawn by the plain model, without the person; leave "
            f"{person.token} out of it"
        )
    model, frozen = sd.load(found.folder, variant=cfg.variant, compute_dtype=compute_dtype)
    model = replace(model, attention=attention)
    checkpoint.check_identity(identity, model, frozen, source)
    if cfg.id_strength != 1 and not identity.method.acts_at_sampling:
        log.warning(
            "--id_strength has no effect: an identity of profile %r draws with its tokens alone",
            identity.method.profile,
        )
    if identity.base_model not in ("unknown", found.name):
        log.warning(
            "the identity was learned on %s and is drawn with %s", identity.base_model, found.name
        )
    settings = describe(cfg, found, size, identity, source)
    folders = []
    for prompt, prompt_ids in zip(prompts, token_ids[:-1], strict=True):
        kv = prompt_keys_values(
            identity.method,
            model,
            frozen,
            identity.trainable,
            identity.given,
            prompt_ids,
            token_ids[-1],
            jnp.float32(cfg.id_strength),
        )
        drawn = draw_prompt(
            model,
            frozen,
            kv,
            seed=cfg.seed,
            count=cfg.num_images_per_prompt * cfg.n_iter,
            batch_size=cfg.batch_size,
            size=size,
            scheduler=cfg.scheduler,
            steps=cfg.num_inference_steps,
            guidance_scale=cfg.guidance_scale,
            eta=cfg.eta,
            interval=tuple(cfg.guidance_interval) if cfg.guidance_interval else None,
            progress=True,
        )
        folders.append(save_pictures(Path(cfg.save_dir), prompt, drawn, settings))
        log.info("%d pictures in %s", len(drawn), folders[-1])
    return folders


def describe(
    cfg: SampleConfig,
    found: hub.Checkpoint,
    size: tuple[int, int],
    identity: checkpoint.Identity,
    source: Path,
) -> dict:
    """All that the pictures of a run depend on, but for the prompt."""
    same = (
        *("seed", "scheduler", "num_inference_steps", "guidance_scale", "guidance_interval", "eta"),
        *("negative_prompt", "id_strength", "mixed_precision"),
    )
    return {
        **{name: getattr(cfg, name) for name in same},
        "pictures": cfg.num_images_per_prompt * cfg.n_iter,
        "height": size[0],
        "width": size[1],
        "model": found.name,
        "revision": found.revision,
        "identity": {
            "file": source.name,
            "sha256": checkpoint.file_digest(source),
            "profile": identity.method.profile,
            "steps": identity.steps,
        },
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
