"""Drawing pictures of learned people: the command."""

import functools
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from idea_jax.config.settings import ConfigError, SampleConfig, is_guided
from idea_jax.data import images, text
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.faces import portraits
from idea_jax.formats import enhancer as enhancers
from idea_jax.formats.enhancer import introduce, warn_of_weights
from idea_jax.formats.identity import Identity, check_identity
from idea_jax.method import shared
from idea_jax.models import hub, lora, sd
from idea_jax.pytrees import tree_digest
from idea_jax.runtime import compile_cache
from idea_jax.runtime.files import (
    check_writable,
    slug,
    write_json,
    write_together,
)
from idea_jax.runtime.versions import versions
from idea_jax.sampling import engine, programs
from idea_jax.sampling.plan import (
    NOBODY,
    Drawing,
    Sitter,
    is_for_each,
    open_model,
    plan,
    read_prompts,
    read_sitters,
    said_of_levels,
)
from idea_jax.sampling.programs import picture_size

log = logging.getLogger(__name__)


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
    found, model, loading = open_model(cfg)
    size = picture_size(model, cfg.height, cfg.width)
    sampling = programs.choose_sampling(
        model,
        cfg,
        size,
        scheduler=cfg.scheduler,
        steps=cfg.num_inference_steps,
        guidance=cfg.guidance_scale,
    )
    enhancer = open_enhancer(cfg, found.folder, model, sitters)
    if cfg.photo:
        sitters = [see_sitter(cfg, enhancer, model, found)]
    length = model.text.max_position_embeddings
    plain = load_tokenizer(found.tokenizer, model.text.vocab_size, length, found.padding)
    drawings, negative = plan(cfg, prompts, sitters, plain)
    for sitter in sitters:
        check_identity(sitter.identity, model, sitter.source or "--photo")
        warn_of(cfg, sitter.identity, found)
    # The program is compiled while the weights are read.
    count = cfg.num_images_per_prompt * cfg.n_iter
    kinds = [
        engine.Kind(
            sampling, max(len(d.tokens.ids), len(negative.ids)), is_guided(cfg.guidance_scale)
        )
        for d in drawings
    ]
    most = count * max(kinds.count(kind) for kind in kinds)
    devices = jax.local_devices()
    each = engine.rows_of_each(most, len(devices), cfg.batch_size)
    devices = devices[: math.ceil(most / each)]
    sd.shapes(model)  # once, before two threads ask for them
    size_of_call = engine.size_for(count * kinds.count(kinds[0]), engine.sizes_on(devices, each))
    with compile_cache.ahead(
        functools.partial(engine.lower_call, model, kinds[0], size_of_call, devices, each)
    ):
        _, frozen = sd.load(found.folder, **loading)
    ours = None
    if enhancer is not None:
        warn_of_weights(enhancer, frozen, found.name)
        ours = shared.frozen_part(enhancer.shared)
    texts = engine.Texts(plain)
    artist = engine.Engine(model, frozen, texts, each=each, shared=ours, devices=devices)
    for sitter in sitters:
        trees = {"trainable": sitter.identity.trainable, "given": sitter.identity.given}
        artist.add(sitter.name, engine.person_of(sitter.identity, tree_digest(trees)))
    return draw(cfg, artist, drawings, sampling, (found, sitters))


def draw(
    cfg: SampleConfig,
    artist: engine.Engine,
    drawings: Sequence[Drawing],
    sampling: programs.Sampling,
    about: tuple[hub.Checkpoint, Sequence[Sitter]],
) -> list[Path]:
    """Draws and writes; the pictures of a prompt are written while the next ones are drawn."""
    found, sitters = about
    count = cfg.num_images_per_prompt * cfg.n_iter
    rows = [
        engine.PictureRow(
            tuple(sitters[k].name for k in drawing.cast),
            drawing.prompt,
            sampling,
            negative=cfg.negative_prompt,
            seed=cfg.seed,
            number=number,
            guidance=cfg.guidance_scale,
            strength=cfg.id_strength,
        )
        for drawing in drawings
        for number in range(count)
    ]
    folders: dict[int, Path] = {}
    drawn: dict[int, list[np.ndarray]] = {}  # of the prompts that are not complete yet
    with tqdm(total=len(rows), unit="picture", disable=None, leave=False) as progress:
        for place, picture in artist.draw(rows):
            which = place // count
            drawn.setdefault(which, []).append(images.to_uint8(picture))
            progress.update()
            if len(drawn[which]) == count:
                drawing, pictures = drawings[which], np.stack(drawn.pop(which))
                people = [sitters[k] for k in drawing.cast]
                settings = describe(cfg, found, sampling, people)
                where = Path(cfg.save_dir) / drawing.folder
                folders[which] = save_pictures(where, drawing.prompt, pictures, settings)
                log.info("%d pictures in %s", count, folders[which])
    return [folders[which] for which in sorted(folders)]


def open_enhancer(
    cfg: SampleConfig, checkpoint_folder: Path, model: sd.StableDiffusion, sitters: list[Sitter]
) -> enhancers.Enhancer | None:
    """The shared ID-Enhancer that the people of a run need; None if they need none.

    Raises:
      ConfigError: --photo needs one, and there is none.
      EnhancerError: there is none, its file cannot be used, or somebody began with another one.
    """
    needy = [sitter for sitter in sitters if sitter.identity.needs_enhancer]
    if not needy and not cfg.photo:
        if cfg.enhancer not in ("auto", "none"):
            log.warning("--enhancer has no effect: nobody here needs a shared ID-Enhancer")
        return None
    path, how = enhancers.find(cfg.enhancer, checkpoint_folder), "--enhancer FILE"
    if path is None and not needy:
        raise ConfigError(
            f"--photo needs a shared ID-Enhancer, and there is no {enhancers.FILE} in the folder "
            f"of this checkpoint, or --enhancer none was given; give the file with {how}"
        )
    if needy:
        first = needy[0]
        enhancer = enhancers.read_needed(path, first.identity.enhancer, first.source, how)
    else:
        enhancer = enhancers.read(path)
    for sitter in needy[1:]:
        enhancers.refuse_another(enhancer, path, sitter.identity.enhancer, sitter.source, how)
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
    cfg: SampleConfig, found: hub.Checkpoint, sampling: programs.Sampling, cast: list[Sitter]
) -> dict:
    """All that the pictures of a run depend on, but for the prompt."""
    same = "seed num_inference_steps guidance_scale guidance_interval eta".split()
    same += "negative_prompt id_strength mixed_precision clip_skip".split()
    people = [sitter.about() for sitter in cast]
    together = {s.name: about for s, about in zip(cast, people, strict=True)}
    return {
        **{name: getattr(cfg, name) for name in same},
        "scheduler": sampling.scheduler,
        **({"guidance_rescale": sampling.rescale} if sampling.rescale else {}),
        **({"told_sizes": list(sampling.told)} if sampling.told else {}),
        **said_of_levels(cfg),
        "pictures": cfg.num_images_per_prompt * cfg.n_iter,
        "height": sampling.size[0],
        "width": sampling.size[1],
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
