"""Learning people: photos in, identity files out."""

import functools
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from jax.sharding import Mesh

from idea_jax import jobs, publish
from idea_jax.config.settings import COMPUTE_DTYPES, ConfigError, TrainConfig
from idea_jax.data import people, text
from idea_jax.data.tokenizer import (
    Tokenizer,
    check_unknown,
    load_tokenizer,
    training_ids,
    word_check,
)
from idea_jax.faces import models as face_models
from idea_jax.faces.portraits import Portraits
from idea_jax.formats import enhancer as enhancers
from idea_jax.method import condition, shared
from idea_jax.models import flash, hub, lora, sd
from idea_jax.models.bundle import remat_choices, rematerialises
from idea_jax.runtime import chips, compile_cache, devices, memory
from idea_jax.runtime.files import check_writable
from idea_jax.runtime.signals import Interrupted
from idea_jax.sampling import programs
from idea_jax.training import group, sizing
from idea_jax.training.fingerprint import fingerprint_of
from idea_jax.training.group import has_plateau
from idea_jax.training.learner import Work, begin, has_checkpoints, resume, write_results
from idea_jax.training.many import train_many
from idea_jax.training.photos import digest_of, open_eyes, people_of, person_of, portraits_of
from idea_jax.training.program import (
    Program,
    Shape,
    lower_step,
    place_frozen,
)
from idea_jax.training.results import (
    Base,
    Occupant,
    refuse_another,
    remove_unfinished,
)
from idea_jax.training.resume import refuse_checkpoints
from idea_jax.training.start import (
    how_read,
    known_names,
    method_of,
    optimizer_of,
    optimizer_settings,
    placeholder_of,
    settle,
    starting_ids,
    starting_tokens,
)

log = logging.getLogger(__name__)


def run(cfg: TrainConfig) -> list[Path]:
    """Trains one person, or several, some of them together; returns the paths of identity files.

    The files of one person are in `output_dir`, those of several in a folder each in it, and there
    `jobs.jsonl` says what became of whom: see `train_many`.

    Raises:
      ConfigError, ImageError, PeopleError, FaceError, TextError, CheckpointNotFound, WeightsError,
      UnsupportedConfig, EnhancerError, CheckpointError, DevicesError, JobsError: bad input, found
      before training starts; of several people, what concerns one of them alone is a
      `TrainingError` at the end.
      TrainingError: the loss became non-finite; the last good identity is on disk.
      Interrupted: SIGINT or SIGTERM; a checkpoint is on disk.
    """
    with devices.joined() if cfg.distributed else nullcontext():
        return train_people(cfg)


@dataclass(frozen=True)
class Crowd:
    """The people of a run.

    Attributes:
      everybody: the pictures of each, by name; the only person of a run has an empty name.
      own: names of those whom this process trains.
      alone: the only person of the run; None if there may be several.
    """

    everybody: dict[str, list]
    own: list[str]
    alone: people.Person | None


def train_people(cfg: TrainConfig) -> list[Path]:
    """`run`, once the processes are joined.

    Raises:
      as `run`.
    """
    started = time.monotonic()
    # What can be wrong and is cheap to see comes first.
    people.places(cfg.identities)
    if cfg.validation_prompt_file is not None:
        prompts = text.read_prompts(Path(cfg.validation_prompt_file))
        cfg = replace(cfg, validation_prompt=prompts, validation_prompt_file=None)
    face_models.check_select(cfg.face_select)
    everybody = people_of(cfg)
    sources = "--train_data_dir, --dataset_dir and --identities"
    devices.check_same(list(everybody), "people", sources)
    is_single = list(everybody) == [""]
    alone = person_of(cfg, "", everybody[""]) if is_single else None
    crowd = Crowd(everybody, devices.own_share(list(everybody)), alone)
    if not is_single and cfg.push_to_hub:
        raise ConfigError(
            "--push_to_hub is for one person; of several, each has to be asked: upload their "
            "folders one by one with hf upload"
        )
    if is_single and cfg.distributed:
        raise ConfigError("--distributed is for several people: each process trains its own")
    if cfg.overwrite and not is_single:
        raise ConfigError(
            "--overwrite is for one person; of several, delete the folder of whom you want to "
            f"replace in {cfg.output_dir}"
        )
    if cfg.mesh == "auto":
        cfg = arranged(cfg, crowd)
    layout = devices.layout(
        cfg.mesh_shape(), cfg.identities_per_step, max(len(crowd.own), 1), cfg.train_batch_size
    )
    if is_single and layout.places > 1:
        raise ConfigError(
            f"{cfg.train_data_dir} holds the photos of one person; --identities_per_step and "
            "--mesh identity=N are for several"
        )
    # Then all that people have in common, and each of them.
    with jobs.only_run(Path(cfg.output_dir), jax.process_index()):
        work, seen = prepare(cfg, crowd, layout)
        if is_single:
            return [train_one(work, alone, seen, started)]
        return train_many(work, everybody, crowd.own)


def arranged(cfg: TrainConfig, crowd: Crowd) -> TrainConfig:
    """The settings with the mesh, and the people of a step, that `sizing.choose` takes for the
    devices that are here, as numbers.

    Raises:
      DevicesError: a step of one person needs more memory than there is.
      as `run`.
    """
    found = hub.resolve_for(cfg)
    settled, enhancer = settle(cfg, found.folder)
    if not settled.max_train_steps:
        return replace(cfg, mesh=None)
    local, processes = jax.local_devices(), jax.process_count()
    dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    kernel = flash.resolve(cfg.attention, local[0], dtype)
    model = sd.read_configs(found.folder, dtype, **how_read(cfg))
    model = replace(model, attention=sizing.traced(kernel))
    side, _ = programs.picture_size(model, cfg.resolution, cfg.resolution, ("resolution",) * 2)
    method = method_of(settled, enhancer)
    program = Program(model, method, optimizer_of(settled, method), cfg.train_batch_size)
    shape = Shape(1, most_photos(cfg, crowd), side)
    room = chips.room_of(local[0], len(local))
    step = cfg.identities_per_step
    if step is not None and step % processes:
        raise devices.DevicesError(
            f"--identities_per_step {step} is no multiple of the {processes} processes"
        )
    for remat in remat_choices(cfg.remat):
        own = replace(program, model=replace(model, remat=remat))
        sizes = sizing.Sizes(own, shape, enhancer, platform=local[0].platform)
        how = sizing.choose(
            sizes.need,
            devices=len(local),
            room=room,
            # Of all processes alike, so that a person's numbers are the same in each.
            people=-(-len(crowd.everybody) // processes),
            batch=cfg.train_batch_size,
            places=None if step is None else step // processes,
            shard_frozen=cfg.shard_frozen,
        )
        if how is not None:
            break
    if how is None:
        alone = sizes.need(sizing.Arrangement(1, 1, 1, False)).total()
        raise devices.DevicesError(
            f"--mesh auto finds no way: a step of one person on one device needs about "
            f"{memory.gigabytes(alone)} of {memory.gigabytes(room or 0)}, and more devices on "
            "data help no further; take --mixed_precision bf16, a smaller --resolution or "
            "--train_batch_size, or another --identities_per_step (idea-plan says what each needs)"
        )
    mesh = f"identity={how.identity * processes},data={how.data}"
    places = how.places() * processes
    about = memory.gigabytes(sizes.need(how).total())
    split = (" --shard_frozen" if how.shard_frozen else "") + (" --remat blocks" if remat else "")
    log.info(
        "--mesh auto: --mesh %s --identities_per_step %d%s; about %s on a device",
        mesh,
        places,
        split,
        about,
    )
    return replace(
        cfg,
        mesh=mesh,
        identities_per_step=places,
        shard_frozen=how.shard_frozen,
        remat="blocks" if remat else "none",
    )


def most_photos(cfg: TrainConfig, crowd: Crowd) -> int:
    """The most photos of any person, also of those who are done or in another process: one program
    for all."""
    counts = (min(len(p), cfg.pictures_per_person or len(p)) for p in crowd.everybody.values())
    return max(counts)


def prepare(
    cfg: TrainConfig, crowd: Crowd, layout: devices.Layout
) -> tuple[Work, Portraits | None]:
    """What the training of all people has in common; and the photos of the only one, looked at.

    Raises:
      as `run`.
    """
    alone, out = crowd.alone, Path(cfg.output_dir)
    # The folders that are written to, and the texts with the person's name.
    for name in crowd.own:
        check_writable(out / name)
    placeholder = placeholder_of(cfg)
    validation = cfg.validation_prompt or []
    for prompt in validation:
        text.fill(prompt, placeholder)
    given_names = text.read_names(cfg.celeb_path) if cfg.celeb_path else None
    if alone and not cfg.resume_from_checkpoint and not cfg.overwrite:
        refuse_checkpoints(out / "checkpoints")
    # The checkpoint, and what it says of the method.
    lora.named(cfg.lora)  # a file that is not there is said before anything is read
    found = hub.resolve_for(cfg)
    own = enhancers.find(cfg.enhancer, found.folder)
    cfg, enhancer = settle(cfg, found.folder)
    if enhancer is not None:
        log.info("%s", enhancers.introduce(own, enhancer))
    method = method_of(cfg, enhancer)
    placeholder = replace(placeholder, n=cfg.n_pseudo_tokens)
    validation = [text.fill(prompt, placeholder) for prompt in validation]
    dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    attention = flash.resolve(cfg.attention, jax.local_devices()[0], dtype)
    model = replace(sd.read_configs(found.folder, dtype, **how_read(cfg)), attention=attention)
    model = replace(model, remat=rematerialises(cfg.remat, model))
    side, _ = programs.picture_size(model, cfg.resolution, cfg.resolution, ("resolution",) * 2)
    tokenizer, is_word = read_tokenizer(cfg, found, model, placeholder)
    if enhancer is None:
        names = given_names or known_names(found.folder)
        start_ids = starting_ids(cfg, method, tokenizer, names)
    # The face models, and the photos of a person who is alone.
    eyes, seen = open_eyes(cfg, method, found.folder), None
    if enhancer is not None:
        enhancers.check(
            enhancer,
            model,
            enhancers.find(cfg.enhancer, found.folder),
            face_model=eyes.about.face_model,
            num_tokens=placeholder.n,
        )
    if alone:
        seen = portraits_of(cfg, method, eyes, alone)
        refuse_somebody_else(cfg, seen, placeholder)
    # The step and the weights, and with them what people begin with.
    shape = Shape(layout.places, most_photos(cfg, crowd), side)
    program, frozen, start = None, None, None
    if cfg.max_train_steps:
        program = program_of(cfg, method, model, layout.mesh)
        made_of = optimizer_settings(cfg, method)
        lower = functools.partial(lower_step, program, shape, cfg.seed, enhancer, made_of)
        with compile_cache.ahead(lower) if crowd.own else nullcontext():
            frozen = load_frozen(cfg, found.folder, layout.mesh, enhancer)
        if enhancer is not None:
            enhancers.warn_of_weights(enhancer, frozen, found.name)
    base = Base(model, frozen, tokenizer, found.name, found.revision)
    if enhancer is None:
        start = starting_tokens(cfg, method, base, start_ids)
    about = fingerprint_of(cfg, method, base, eyes, enhancer)
    return Work(
        cfg=cfg,
        method=method,
        base=base,
        program=program,
        enhancer=enhancer,
        start=start,
        shape=shape,
        eyes=eyes,
        validation=validation,
        layout=layout,
        about=about,
        is_word=is_word,
    ), seen


def refuse_somebody_else(cfg: TrainConfig, seen: Portraits, placeholder: text.Placeholder) -> None:
    """Raises OccupiedError if the output folder holds a person who is not the one of these photos.

    A checkpoint says for itself whose it is.
    """
    if not cfg.overwrite and not (cfg.resume_from_checkpoint and has_checkpoints(cfg)):
        new = Occupant(placeholder.token, digest_of(seen.pictures), cfg.train_data_dir)
        refuse_another(Path(cfg.output_dir), new)


def read_tokenizer(
    cfg: TrainConfig,
    found: hub.Checkpoint,
    model: sd.StableDiffusion,
    placeholder: text.Placeholder,
) -> tuple[Tokenizer | None, Callable[[str], bool]]:
    """The tokenizer, which knows the placeholder; None where no step is taken. And what tells
    whether the vocabulary has a text as one word.

    Raises:
      TextError: the tokenizer or the placeholder cannot be used.
    """
    if not cfg.max_train_steps:
        check_unknown(found.tokenizer, placeholder)
        return None, word_check(found.tokenizer)
    tokenizer = load_tokenizer(
        found.tokenizer,
        model.text.vocab_size,
        model.text.max_position_embeddings,
        found.padding,
    ).with_placeholder(placeholder.token, placeholder.n)
    training_ids(tokenizer)  # here: what is too long is said before weights are read
    return tokenizer, tokenizer.is_word


def program_of(
    cfg: TrainConfig, method: condition.Method, model: sd.StableDiffusion, mesh: Mesh
) -> Program:
    """What the step of a run is compiled for."""
    sd.shapes(model)  # once, before two threads ask for them
    return Program(
        model,
        method,
        optimizer_of(cfg, method),
        cfg.train_batch_size,
        mesh,
        cfg.shard_frozen,
        cfg.steps_per_call or devices.steps_per_call(),
    )


def load_frozen(
    cfg: TrainConfig, checkpoint_folder: Path, mesh: Mesh, enhancer: enhancers.Enhancer | None
) -> sd.Frozen:
    """The frozen weights of a checkpoint, and what of a shared ID-Enhancer is frozen beside them,
    on every device of a mesh.

    Raises:
      WeightsError, UnsupportedConfig: the checkpoint cannot be used.
    """
    # Where they are sharded, the whole of them may be too much for one device.
    host = devices.host() if cfg.shard_frozen else None
    with jax.default_device(host):
        _, frozen = sd.load(
            checkpoint_folder,
            variant=cfg.variant,
            compute_dtype=COMPUTE_DTYPES[cfg.mixed_precision],
            loras=lora.named(cfg.lora),
            **how_read(cfg),
        )
    if enhancer is not None:
        frozen = frozen._replace(shared=shared.frozen_part(enhancer.shared))
    return place_frozen(frozen, mesh, cfg.shard_frozen)


def train_one(work: Work, person: people.Person, seen: Portraits, started: float) -> Path:
    """Trains the only person of a run; returns the path of the identity file.

    Raises:
      as `run`.
    """
    cfg, folder = work.cfg, Path(work.cfg.output_dir)
    if cfg.overwrite:
        remove_unfinished(cfg, folder)
    learner = begin(work, person, seen, folder)
    if cfg.resume_from_checkpoint:
        resume(learner, cfg, cfg.resume_from_checkpoint)
    signum = group.train_together(
        work,
        [learner],
        lambda learner: write_results(learner, folder, time.monotonic() - started),
    )
    if learner.error is not None:
        raise learner.error
    step, last = int(learner.state.step), cfg.max_train_steps
    if signum is not None and step < last and not has_plateau(cfg, learner.state):
        raise Interrupted(
            signum,
            f"stopped after step {step} of {last}, which is kept in {learner.checkpoints.folder}; "
            "add --resume_from_checkpoint latest to go on",
        )
    if cfg.push_to_hub:
        results = learner.results
        card = publish.card(
            results.token,
            work.base.name,
            work.method.profile,
            step,
            holds_face=work.method.keeps_face,
        )
        token, name = cfg.hub_token, cfg.hub_model_id or folder.resolve().name
        log.info("uploaded to %s", publish.push(folder, card, name, token))
    return folder / jobs.RESULT
