"""Drawing pictures of learned people: the command."""

import functools
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.config.settings import COMPUTE_DTYPES, ConfigError, SampleConfig, reading
from idea_jax.data import images, text
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.diffusion import samplers
from idea_jax.diffusion.schedule import ScheduleConfig
from idea_jax.faces import portraits
from idea_jax.formats import enhancer as enhancers
from idea_jax.formats.enhancer import introduce, warn_of_weights
from idea_jax.formats.identity import Identity, IdentityError, check_identity
from idea_jax.method import shared
from idea_jax.models import flash, hub, lora, sd
from idea_jax.runtime import compile_cache
from idea_jax.runtime.files import (
    check_writable,
    slug,
    write_json,
    write_together,
)
from idea_jax.runtime.versions import versions
from idea_jax.sampling import programs
from idea_jax.sampling.plan import (
    NOBODY,
    Sitter,
    is_for_each,
    padded,
    plan,
    read_prompts,
    read_sitters,
)
from idea_jax.sampling.programs import cast_keys_values, picture_size

log = logging.getLogger(__name__)


def check_guidance(cfg: SampleConfig, schedule: ScheduleConfig) -> None:
    """Raises ConfigError if guidance is asked for, in an interval that no step lies in."""
    if cfg.guidance_interval is None or cfg.guidance_scale == 1:
        return
    visited = samplers.visited_timesteps(cfg.scheduler, schedule, cfg.num_inference_steps)
    low, high = cfg.guidance_interval
    if not np.any(samplers.lies_between(visited, (low, high), schedule)):
        raise ConfigError(
            f"no step of --num_inference_steps {cfg.num_inference_steps} lies within "
            f"--guidance_interval {low} {high} (which --preset fast sets, too), so that nothing "
            "would be guided: take more steps, or --guidance_interval 0 1, which is everywhere"
        )


def check_prompts(prompts: list[str], sitters: list[Sitter]) -> None:
    """Reads all prompts before anything is loaded: the last one's mistake should not cost a run.

    Raises:
      TextError: a prompt names nobody, or somebody unknown.
    """
    people = {s.name: text.Placeholder(s.identity.placeholder, 1) for s in sitters}
    people = people or {"": text.Placeholder(NOBODY, 1)}
    for prompt in prompts:
        if is_for_each(prompt, list(people)):
            text.fill(prompt, next(iter(people.values())))
        else:
            text.fill_names(prompt, people)


def run(cfg: SampleConfig) -> list[Path]:
    """Draws every prompt of a run; returns the folders written, one per prompt and person."""
    # Who is drawn, and on what.
    prompts = read_prompts(cfg)
    sitters = [] if cfg.photo else read_sitters(cfg)
    check_prompts(prompts, sitters)
    check_writable(cfg.save_dir)
    # The model; a person on photos is seen with its shared ID-Enhancer.
    loras = lora.named(cfg.lora)
    found = hub.resolve_for(cfg)
    compute_dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    attention = flash.resolve(cfg.attention, jax.local_devices()[0], compute_dtype)
    changes = changes_of(cfg)
    model = replace(sd.read_configs(found.folder, compute_dtype, **changes), attention=attention)
    size = picture_size(model, cfg.height, cfg.width)
    check_guidance(cfg, model.schedule)
    enhancer = open_enhancer(cfg, found.folder, model, sitters)
    if cfg.photo:
        sitters = [see_sitter(cfg, enhancer, model, found)]
    length = model.text.max_position_embeddings
    plain = load_tokenizer(found.tokenizer, model.text.vocab_size, length, found.padding)
    # The drawings; the prompts of one length are drawn together: one program each.
    drawings, negative = plan(cfg, prompts, sitters, plain)
    empty = plain.chunks([("", 1.0)])
    lengths = [max(len(drawing.tokens.ids), len(negative.ids)) for drawing in drawings]
    groups = {n: [k for k, own in enumerate(lengths) if own == n] for n in dict.fromkeys(lengths)}
    settings: dict = {
        "count": cfg.num_images_per_prompt * cfg.n_iter,
        "batch_size": cfg.batch_size,
        "guidance_scale": cfg.guidance_scale,
    }
    span = cfg.guidance_interval
    interval = (span[0], span[1]) if span else None
    sampling = programs.Sampling(size, cfg.scheduler, cfg.num_inference_steps, cfg.eta, interval)
    for sitter in sitters:
        check_identity(sitter.identity, model, sitter.source or "--photo")
        warn_of(cfg, sitter.identity, found)
    # The program is compiled while the weights are read.
    sd.shapes(model)  # once, before two threads ask for them
    first = next(iter(groups))
    lower = functools.partial(
        programs.lower_drawing, model, len(groups[first]), first, sampling, **settings
    )
    with compile_cache.ahead(lower):
        changes |= {"variant": cfg.variant, "compute_dtype": compute_dtype, "loras": loras}
        _, frozen = sd.load(found.folder, **changes)
    ours = {}
    if enhancer is not None:
        warn_of_weights(enhancer, frozen, found.name)
        ours = jax.tree.map(jnp.asarray, shared.frozen_part(enhancer.shared))

    def keys_values(number, frozen):
        cast = [sitters[k].identity for k in drawings[number].cast]
        return cast_keys_values(
            model,
            tuple(identity.method for identity in cast),
            frozen._replace(shared=ours),
            tuple(identity.trainable for identity in cast),
            tuple(identity.given for identity in cast),
            padded(drawings[number].tokens, empty, lengths[number]),
            padded(negative, empty, lengths[number]),
            jnp.float32(cfg.id_strength),
        )

    # The pictures; those of a prompt are written while the next ones are drawn.
    folders = {}
    for numbers in groups.values():
        own = [functools.partial(keys_values, number) for number in numbers]
        pictures = programs.draw_all(model, frozen, own, sampling, seed=cfg.seed, **settings)
        for number, drawn in zip(numbers, pictures, strict=True):
            drawing = drawings[number]
            about = describe(cfg, found, size, [sitters[k] for k in drawing.cast])
            where = Path(cfg.save_dir) / drawing.folder
            folders[number] = save_pictures(where, drawing.prompt, drawn, about)
            log.info("%d pictures in %s", len(drawn), folders[number])
    return [folders[number] for number in sorted(folders)]


def changes_of(cfg: SampleConfig) -> dict[str, Any]:
    """What a run reads otherwise than the checkpoint has it, as `sd.read_configs` takes it."""
    vae = hub.resolve_vae(cfg.vae) if cfg.vae else None
    return {"vae": vae, "clip_skip": cfg.clip_skip, **reading(cfg)}


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
            raise IdentityError(
                f"{sitter.source} was trained with the ID-Enhancer whose file has the SHA-256 "
                f"{sitter.identity.enhancer}, and that of {path} is {enhancer.sha256}; give the "
                "right file with --enhancer FILE, or train again with this one"
            )
    enhancers.check(enhancer, model, path, face_model=None)
    log.info("%s", introduce(path, enhancer))
    return enhancer


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
    identity = Identity(
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


def warn_of(cfg: SampleConfig, identity: Identity, found: hub.Checkpoint) -> None:
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
    same = "seed scheduler num_inference_steps guidance_scale guidance_interval eta".split()
    same += "negative_prompt id_strength mixed_precision clip_skip".split()
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
        **({"lora": lora.about(lora.named(cfg.lora))} if cfg.lora else {}),
        **({"prediction_type": cfg.prediction_type} if cfg.prediction_type else {}),
        **({"token": cfg.token} if cfg.token else {}),
        **({"identity": people[0]} if len(cast) == 1 else {"identities": together}),
    }


def save_pictures(save_dir: Path, prompt: str, drawn: np.ndarray, settings: dict) -> Path:
    """Writes the pictures of a prompt, a grid and what made them; returns their folder.

    The same settings write to the same folder again; other settings get a folder of their own.
    """
    about = {"prompt": prompt, **settings, "versions": versions()}
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
