"""A training of the shared enhancer before its first step: checks, first values, resumption."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh

from idea_jax.config.reading import read_yaml
from idea_jax.config.settings import COMPUTE_DTYPES, ConfigError, held_on_resume, reading
from idea_jax.data import text
from idea_jax.data.tokenizer import name_token_ids
from idea_jax.enhancer import likeness, ridge, samples
from idea_jax.enhancer.identity_loss import IdentityLoss
from idea_jax.enhancer.samples import Folder, Plan
from idea_jax.enhancer.settings import EnhancerTrainConfig, PrepareConfig
from idea_jax.enhancer.shards import ShardsError
from idea_jax.enhancer.step import (
    EnhancerProgram,
    EnhancerState,
    make_optimizer,
)
from idea_jax.faces import finding
from idea_jax.formats import enhancer
from idea_jax.method import anchor, shared
from idea_jax.models import flash, hub, lora, sd
from idea_jax.models.bundle import rematerialises
from idea_jax.runtime import devices
from idea_jax.runtime.files import json_digest
from idea_jax.runtime.versions import versions
from idea_jax.training import results
from idea_jax.training.results import Base, OccupiedError
from idea_jax.training.resume import Checkpoints

log = logging.getLogger(__name__)

DECIDED = ("kind", "width", "kv_rank", "beta")  # by the file that a training goes on from


@dataclass(frozen=True)
class EnhancerWork:
    """All that does not change while the enhancer is trained.

    Attributes:
      base: its frozen weights lie on the mesh.
      constants: parts of the shared tree that are not trained.
      plan: what each sample is made of.
      sitters, finder: who is drawn on the way, and what looks at the drawings; none if nobody is.
      first: whether this process writes and shows.
      likening: makes the identity loss of some steps; None without it.
    """

    cfg: EnhancerTrainConfig
    base: Base
    folders: list[Folder]
    constants: dict
    plan: Plan
    program: EnhancerProgram
    sitters: list
    finder: finding.Finder | None
    side: int
    about: dict
    first: bool
    likening: Callable[[range], IdentityLoss] | None = None


def open_model(
    cfg: EnhancerTrainConfig | PrepareConfig,
) -> tuple[hub.Checkpoint, sd.StableDiffusion, dict[str, Any]]:
    """The checkpoint that a run names, its networks, and what `sd.load` takes besides its folder.

    Raises:
      CheckpointNotFound, WeightsError, UnsupportedConfig: it cannot be used, or a LoRA cannot.
    """
    loras = lora.named(cfg.lora)  # a file that is not there is said before anything is fetched
    found = hub.resolve_for(cfg)
    dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    attention = flash.resolve(cfg.attention, jax.local_devices()[0], dtype)
    model = replace(sd.read_configs(found.folder, dtype, **reading(cfg)), attention=attention)
    if isinstance(cfg, EnhancerTrainConfig):
        model = replace(model, remat=rematerialises(cfg.remat, model))
    weights = {"variant": cfg.variant, "compute_dtype": dtype, "loras": loras}
    return found, model, reading(cfg) | weights


def check_batch(cfg: EnhancerTrainConfig, mesh: Mesh) -> None:
    """Raises DevicesError unless each device gets as many samples of each part of a step."""
    if cfg.id_loss_weight and cfg.id_loss_drawings % mesh.size:
        raise devices.DevicesError(
            f"--id_loss_drawings {cfg.id_loss_drawings} cannot be divided over {mesh.size} devices"
        )
    parts = mesh.size * cfg.gradient_accumulation_steps
    if cfg.train_batch_size % parts:
        raise devices.DevicesError(
            f"--train_batch_size {cfg.train_batch_size} cannot be divided over {mesh.size} devices "
            f"and --gradient_accumulation_steps {cfg.gradient_accumulation_steps}; take a multiple "
            f"of {parts}"
        )


def refuse_another(cfg: EnhancerTrainConfig, about: dict, path: Path) -> None:
    """Refuses to replace an enhancer that was trained on other people.

    One of the same people may be trained again, with whatever settings. A checkpoint says for
    itself whether it is of this training.

    Args:
      about: what the next file would say of the training.
      path: of the file.

    Raises:
      OccupiedError: there is one of other people, or one that cannot be read.
    """
    resumes = cfg.resume_from_checkpoint and any((path.parent / "checkpoints").glob("[0-9]*"))
    if not path.exists() or resumes:
        return
    there: dict = {}
    data = None
    with suppress(enhancer.EnhancerError):
        there = enhancer.read(path).about
    with suppress(ConfigError, AttributeError):
        data = read_yaml(str(path.parent / "config.yaml")).get("data")
    keys = ("base_model", "face_model", "people", "pictures", "sources")
    if data in (None, cfg.data) and all(there.get(key) == about[key] for key in keys):
        return
    first, second = (
        f"{said.get('people', 'unknown')} people and {said.get('pictures', 'unknown')} pictures "
        f"of {', '.join(folders or ['unknown folders'])} with {said.get('base_model', 'unknown')}"
        for said, folders in ((there, data), (about, cfg.data))
    )
    raise OccupiedError(
        f"{path} was trained on {first}, and this run trains on {second}; what was trained "
        "first would be lost: choose another --output_dir, or move that file"
    )


def check_together(folders: Sequence[Folder]) -> None:
    """Raises ShardsError unless all folders are of one checkpoint, recogniser and way to prepare,
    and hold two people or more."""
    first = folders[0]
    for other in folders[1:]:
        same = ("face_model", "num_tokens", "vocab_size", "length", "latent")
        differs = [n for n in same if getattr(first.index, n) != getattr(other.index, n)]
        if differs:
            raise ShardsError(
                f"{first.path} and {other.path} cannot be mixed: {', '.join(differs)} differ; "
                "prepare them with the same checkpoint, recogniser, --n_pseudo_tokens and "
                "--resolution"
            )
    people = sum(len(folder.people) for folder in folders)
    if people < 2:
        raise ShardsError(f"there are {people} people in --data; expected two or more")


def check_model(folders: Sequence[Folder], model: sd.StableDiffusion, name: str) -> None:
    """Raises ShardsError unless the folders' texts and latents are of this kind of checkpoint."""
    index = folders[0].index
    wanted = {
        "vocabulary": (index.vocab_size, model.text.vocab_size),
        "length of texts": (index.length, model.text.max_position_embeddings),
        "channels of latents": (index.latent[2], model.vae.latent_channels),
        "sizes of pictures": (index.has_sizes, model.text_2 is not None),
    }
    differs = [f"{n} {was}, here {now}" for n, (was, now) in wanted.items() if was != now]
    if differs:
        raise ShardsError(
            f"{folders[0].path} was prepared for {index.base_model}, another kind of checkpoint "
            f"than {name}: {'; '.join(differs)}; prepare it again"
        )


def check_weights(folders: Sequence[Folder], digests: dict[str, str], name: str) -> None:
    """Raises ShardsError unless the folders were prepared with these weights."""
    for folder in folders:
        if not set(folder.index.base_weights.values()) & set(digests.values()):
            raise ShardsError(
                f"{folder.path} was prepared for another checkpoint ({folder.index.base_model}; "
                f"this one is {name}): its weights differ; prepare it again, or name the other one"
            )


def frozen_dtype(frozen: sd.Frozen) -> Any:
    """The type in which the frozen weights are held."""
    return jax.tree.leaves(frozen.cross_kv)[0].dtype


def hold_out(cfg: EnhancerTrainConfig, folders: list[Folder]):
    """Who is trained on, by folder, and who is held out."""
    count = cfg.validation_people if cfg.validation_steps else 0
    left, sitters = likeness.hold_out(folders, count, cfg.seed)
    if count and len(sitters) < count:
        log.warning(
            "%d people are held out instead of --validation_people %d: a quarter of all at most, "
            "and only who has two pictures",
            len(sitters),
            count,
        )
    for folder, people in zip(folders, left, strict=True):
        if not len(people):
            raise ShardsError(
                f"everybody of {folder.path} is held out; take a smaller --validation_people"
            )
    return left, sitters


def open_finder(
    cfg: EnhancerTrainConfig, folder: Path, folders: list[Folder]
) -> finding.Finder | None:
    """What looks at drawings; None if nobody is drawn.

    Raises:
      FaceError: it is missing, or another one than that of the prepared data.
    """
    if not cfg.validation_steps and not cfg.id_loss_weight:
        return None
    return likeness.find_face_model(
        cfg.face_model, cfg.face_model_dir, folder, folders[0].index.face_model
    )


def beginning(
    cfg: EnhancerTrainConfig,
    base: Base,
    names: list[str],
    folders: list[Folder],
    people: list[np.ndarray],
    earlier: enhancer.Enhancer | None = None,
) -> tuple[shared.EnhancerConfig, shared.Shared, dict[str, ridge.Ridge]]:
    """The shared tree before the first step, and the regressions that it starts from, if it does.

    Args:
      earlier: what the training goes on from, of `open_earlier`.

    Raises:
      TextError, ShardsError: the names do not do.
    """
    model, frozen, special = base.model, base.frozen, base.tokenizer
    N = special.placeholder.n
    config = config_of(cfg, model, N)
    if earlier is not None and earlier.config.basis:
        return earlier.config, earlier.shared, {}
    ids = name_token_ids(special, names, N)
    whole = ids[(ids >= 0).all(axis=1)]
    if len(whole) < 2:
        raise text.TextError(
            f"of the {len(names)} names {len(whole)} have {N} tokens or more; expected at least "
            "two; give longer names with --celeb_path"
        )
    known = jax.device_get(sd.embed_tokens(model, frozen, whole))
    known = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), known)
    size = max(shared.basis_size(leaf) for leaf in jax.tree.leaves(known))
    config = replace(earlier.config if earlier else config, basis=size)
    if earlier is not None:
        basis = config.each(lambda _, rows: shared.basis_of(rows, size), known)
        return config, earlier.shared | {"basis": basis}, {}
    start: Any
    scale: Any
    if cfg.start == "cross_init":
        start = anchor.from_names(
            model, frozen, ids, bos=special.bos, eos=special.eos, pad=special.pad
        )
        scale = config.each(lambda _: 1.0)
    else:
        start = jax.tree.map(lambda leaf: leaf.mean(axis=0), known)
        scale = jax.tree.map(lambda leaf: float(leaf.std(axis=0).mean()), known)
    results.check_finite(start, f"the text encoder of {base.name}")
    key = jax.random.key(cfg.seed)
    tree = shared.init_shared(config, model, key, start, scale, known)
    if cfg.start != "ridge":
        return config, jax.device_get(tree), {}
    fitted = ridge.fit_each(config, *ridge.examples(folders, people, model, frozen), cfg.seed)
    for of, found in fitted.items():
        log.info(
            "ridge regression on %d names%s: lambda %.3g, R2 %.3f on names that it was not fitted "
            "on",
            found.names,
            f" for {of}" if of else "",
            found.strength,
            found.r2,
        )
    return config, jax.device_get(ridge.into(config, tree, fitted)), fitted


def open_earlier(
    cfg: EnhancerTrainConfig, base: Base, folders: list[Folder]
) -> enhancer.Enhancer | None:
    """The enhancer that a training goes on from; None if it begins by itself.

    Raises:
      EnhancerError: it cannot be used, or is for another checkpoint or recogniser.
      ConfigError: a setting says otherwise than its file.
    """
    if cfg.init_enhancer is None:
        return None
    index, defaults = folders[0].index, type(cfg).__dataclass_fields__
    earlier = enhancer.read(cfg.init_enhancer)
    enhancer.check(
        earlier,
        base.model,
        cfg.init_enhancer,
        face_model=index.face_model,
        num_tokens=index.num_tokens,
        advice="leave --init_enhancer out, or prepare --data with the checkpoint, the recogniser "
        "and the number of tokens that it knows",
    )
    enhancer.warn_of_weights(earlier, base.frozen, base.name)
    for name in DECIDED:
        theirs = getattr(earlier.config, name)
        if getattr(cfg, name) not in (defaults[name].default, theirs):
            raise ConfigError(
                f"--{name} is {getattr(cfg, name)}, and {cfg.init_enhancer} has {theirs}: leave "
                "it out"
            )
    return earlier


def as_begun(cfg: EnhancerTrainConfig, earlier: enhancer.Enhancer | None) -> EnhancerTrainConfig:
    """The settings with what the file that a training goes on from decides."""
    if earlier is None:
        return cfg
    return replace(cfg, **{name: getattr(earlier.config, name) for name in DECIDED})


def config_of(
    cfg: EnhancerTrainConfig, model: sd.StableDiffusion, num_tokens: int
) -> shared.EnhancerConfig:
    """What the networks of a training look like."""
    widths = [text.hidden_size for text in model.encoders]
    return shared.EnhancerConfig(
        cfg.kind,
        widths[0],
        num_tokens,
        cfg.width,
        cfg.kv_rank,
        cfg.beta,
        skip=cfg.start == "ridge",
        dim_2=sum(widths[1:]),
    )


def about_of(
    base: Base,
    folders: list[Folder],
    people: list[np.ndarray],
    digest: str,
    fitted: dict[str, ridge.Ridge],
    earlier: enhancer.Enhancer | None = None,
) -> dict:
    """What the file says of the training, but for its steps.

    Args:
      earlier: what the training goes on from, whose sources and terms are this one's, too.

    Raises:
      EnhancerError: it could not be written so.
    """
    licences = sorted({folder.index.licence for folder in folders})
    earlier_sources = earlier.about["sources"] if earlier is not None else []
    about: dict[str, Any] = {
        "base_model": base.name,
        "revision": base.revision,
        "base_weights": digest,
        "face_model": folders[0].index.face_model,
        "people": sum(map(len, people)),
        "pictures": sum(
            len(folder.people[number])
            for folder, numbers in zip(folders, people, strict=True)
            for number in numbers
        ),
        "sources": sorted({*earlier_sources, *(folder.index.source for folder in folders)}),
        "licence": "; ".join([*licences, "the base model's and the face model's terms apply"]),
        "versions": versions(),
    }
    if fitted:
        about["ridge"] = ridge.about(fitted)
    if earlier is not None:
        before = earlier.about
        about["licence"] = "; ".join(dict.fromkeys([before["licence"], about["licence"]]))
        about["earlier"] = {"sha256": earlier.sha256, "steps": before["steps"]}
    enhancer.check_about({**about, "steps": 0})  # while nothing can be lost
    return about


def optimizer_of(cfg: EnhancerTrainConfig) -> optax.GradientTransformation:
    """The optimiser that a config asks for."""
    return make_optimizer(
        cfg.learning_rate,
        warmup=cfg.warmup_steps,
        steps=max(cfg.max_train_steps, 1),
        clip=cfg.max_grad_norm,
        beta2=cfg.adam_beta2,
        epsilon=cfg.adam_epsilon,
    )


def fingerprint_of(cfg: EnhancerTrainConfig, work: EnhancerWork, names: list[str]) -> dict:
    """What a resumed run must share with the run that wrote the checkpoint."""
    folders = [
        (folder.index.made_of(), [(s.records, s.faces) for s in folder.index.shards])
        for folder in work.folders
    ]
    shares = [weight for _, weight in samples.read_weights(cfg.data)]
    drawn = {name: getattr(cfg, name) for name in vars(cfg) if name.startswith("id_loss_")}
    # What came later is named where it is used, so that what was begun before can go on.
    later = {
        "earlier": work.about.get("earlier"),
        "id_loss": [drawn, cfg.validation_guidance] if cfg.id_loss_weight else None,
    }
    return {
        **held_on_resume(cfg),
        **{name: value for name, value in later.items() if value is not None},
        "validates": cfg.validation_steps > 0,  # else nobody is held out
        "inputs": json_digest([folders, shares, names]),
        "base_weights": work.about["base_weights"],
    }


def resume(cfg: EnhancerTrainConfig, kept: Checkpoints, state: EnhancerState) -> EnhancerState:
    """The state of the checkpoint asked for; that before the first step where there is none.

    Process 0 reads it, for all.

    Raises:
      CheckpointError: as `Checkpoints.restore`.
    """
    restored = None
    if cfg.resume_from_checkpoint and jax.process_index() == 0:
        which = cfg.resume_from_checkpoint
        if which != "latest" or kept.folder.is_dir():
            restored = kept.restore(state, which)
        if restored is None:
            log.warning("no checkpoint in %s yet: starting from the first step", kept.folder)
        else:
            log.info("resumed after step %d", int(restored.step))
    state = jax.device_get(restored or state)
    if cfg.resume_from_checkpoint and jax.process_count() > 1:
        state = jax.tree.map(np.asarray, broadcast_one_to_all(state))
    return state
