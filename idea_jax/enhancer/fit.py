"""Training the shared enhancer: prepared folders in, `enhancer.safetensors` out."""

import hashlib
import json
import logging
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from idea_jax import checkpoint, devices, faces, jobs, sample, tensorboard, train
from idea_jax.config import COMPUTE_DTYPES, to_yaml
from idea_jax.data import images, text
from idea_jax.enhancer import drawing, likeness, ridge, samples
from idea_jax.enhancer.prepare import weights_digests
from idea_jax.enhancer.samples import Batch, Folder, Plan, Reader
from idea_jax.enhancer.settings import EnhancerTrainConfig
from idea_jax.enhancer.shards import ShardsError
from idea_jax.enhancer.step import (
    EnhancerState,
    Metrics,
    Recipe,
    init_state,
    make_optimizer,
    train_step,
)
from idea_jax.files import atomic_write, check_writable, write_together
from idea_jax.formats import enhancer
from idea_jax.method import anchor, shared
from idea_jax.models import flash, hub, sd
from idea_jax.pytrees import count
from idea_jax.results import Base, TrainingError, is_multiple, loss_curve
from idea_jax.signals import Interrupted, noted_signals
from idea_jax.train_step import shard_specs

log = logging.getLogger(__name__)

RESULT = "enhancer.safetensors"
PLACEHOLDER = "<person>"  # its tokens' numbers are in the prepared folders, its name is nowhere
# Settings that may differ between a run and its resumption: they do not touch the numbers.
FREE_ON_RESUME = frozenset(
    {
        *("pretrained_model_name_or_path", "variant", "output_dir", "data", "celeb_path"),
        *("shard_frozen", "distributed", "attention", "compile_cache"),
        *("validation_steps", "validation_prompt", "num_validation_images"),
        *("validation_guidance", "face_model", "face_model_dir", "save_dtype"),
        *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint"),
        *("report_to", "logging_dir"),
    }
)


@dataclass(frozen=True)
class Work:
    """All that does not change while the enhancer is trained.

    Attributes:
      base: its frozen weights lie on the mesh.
      constants: parts of the shared tree that are not trained.
      plan: what each sample is made of.
      sitters, finder: who is drawn on the way, and what looks at the drawings; none if nobody is.
      first: whether this process writes and shows.
    """

    cfg: EnhancerTrainConfig
    config: shared.EnhancerConfig
    base: Base
    folders: list[Folder]
    constants: dict
    plan: Plan
    recipe: Recipe
    optimizer: optax.GradientTransformation
    mesh: Mesh
    sitters: list
    finder: faces.Finder | None
    side: int
    about: dict
    first: bool

    def step(self, state: EnhancerState, batch: Batch, inputs: dict):
        """`train_step` with all bound that is the same for every step."""
        return train_step(
            *(self.base.model, self.config, self.recipe, self.optimizer, self.mesh),
            *(self.cfg.shard_frozen, self.base.frozen, state, self.constants, batch, inputs),
        )


def run(cfg: EnhancerTrainConfig) -> list[Path]:
    """Trains a shared enhancer; returns the path of its file.

    Raises:
      ShardsError, TextError, FaceError, CheckpointNotFound, WeightsError,
      UnsupportedConfig, CheckpointError, DevicesError, JobsError: bad input, found before training.
      TrainingError: the loss became non-finite; the last good state is a checkpoint.
      Interrupted: SIGINT or SIGTERM; a checkpoint is on disk.
      WriteError: the disk is full; earlier files are whole.
    """
    with devices.joined() if cfg.distributed else nullcontext():
        out = Path(cfg.output_dir)
        with devices.together(), jobs.only_run(out, jax.process_index()):
            return train_locked(cfg, out)


def train_locked(cfg: EnhancerTrainConfig, out: Path) -> list[Path]:
    """`run`, once no other run uses the folder.

    Raises:
      as `run`.
    """
    started = time.monotonic()
    if jax.process_index() == 0:  # they would delete each other's proof
        check_writable(out)
    checkpoints = out / "checkpoints"
    if not cfg.resume_from_checkpoint and jax.process_index() == 0:
        checkpoint.refuse_checkpoints(checkpoints)
    mesh = drawing.mesh_of(jax.devices())
    check_batch(cfg, mesh)
    weights = samples.read_weights(cfg.data)
    folders = [samples.open_folder(path) for path, _ in weights]
    check_together(folders)
    found = hub.resolve(cfg.pretrained_model_name_or_path, cfg.revision, cfg.variant)
    dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    attention = flash.resolve(cfg.attention, jax.local_devices()[0], dtype)
    model = replace(sd.read_configs(found.folder, dtype), attention=attention)
    check_model(folders, model, found.name)
    tokenizer = text.load_tokenizer(
        found.folder / "tokenizer", model.text.vocab_size, model.text.max_position_embeddings
    ).with_placeholder(PLACEHOLDER, folders[0].index.num_tokens)
    names = text.read_names(cfg.celeb_path) if cfg.celeb_path else train.known_names(found.folder)
    finder = open_finder(cfg, found.folder, folders)
    with jax.default_device(devices.host() if cfg.shard_frozen else None):
        _, frozen = sd.load(found.folder, variant=cfg.variant, compute_dtype=dtype)
    digests = weights_digests(frozen)
    check_weights(folders, digests, found.name)
    base = Base(model, frozen, tokenizer, found.name, found.revision)
    left, sitters = hold_out(cfg, folders)
    config, tree, fitted = beginning(cfg, base, names, folders, left)
    plan = Plan(
        *(folders, [weight for _, weight in weights], left),
        **{"size": cfg.train_batch_size, "seed": cfg.seed},
        **{"small": cfg.small_faces, "mean": cfg.mean_faces, "flip": cfg.random_flip},
    )
    specs = shard_specs(frozen, mesh.size) if cfg.shard_frozen else P()
    work = Work(
        cfg=cfg,
        config=config,
        base=replace(base, frozen=drawing.put(frozen, mesh, specs)),
        folders=folders,
        constants=drawing.put({k: v for k, v in tree.items() if k not in shared.TRAINED}, mesh),
        plan=plan,
        recipe=Recipe(
            *(cfg.train_batch_size, cfg.gradient_accumulation_steps),
            **{"drop": cfg.drop_adapter, "min_snr": cfg.min_snr_gamma, "ema": cfg.ema_decay},
        ),
        optimizer=optimizer_of(cfg),
        mesh=mesh,
        sitters=sitters,
        finder=finder if jax.process_index() == 0 else None,
        side=folders[0].index.settings["side"],
        about=about_of(base, folders, left, digests[str(frozen_dtype(frozen))], fitted),
        first=jax.process_index() == 0,
    )
    state = init_state(work.optimizer, tree)
    marks = fingerprint_of(cfg, work, names)
    kept = checkpoint.Checkpoints(checkpoints, marks, limit=cfg.checkpoints_total_limit)
    state = resume(cfg, kept, state)
    log.info(
        "%d people and %d pictures; %s trained values; %d steps of %d samples on %d devices",
        *(work.about["people"], work.about["pictures"], f"{count(state.trained):,}"),
        *(cfg.max_train_steps, cfg.train_batch_size, mesh.size),
    )
    return loop(work, drawing.put(state, mesh), kept, out, started)


# --- before the first step ------------------------------------------------------------------------


def check_batch(cfg: EnhancerTrainConfig, mesh: Mesh) -> None:
    """Raises DevicesError unless each device gets as many samples of each part of a step."""
    parts = mesh.size * cfg.gradient_accumulation_steps
    if cfg.train_batch_size % parts:
        raise devices.DevicesError(
            f"--train_batch_size {cfg.train_batch_size} cannot be divided over {mesh.size} devices "
            f"and --gradient_accumulation_steps {cfg.gradient_accumulation_steps}; take a multiple "
            f"of {parts}"
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


def frozen_dtype(frozen: sd.Frozen) -> object:
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
            *(len(sitters), count),
        )
    for folder, people in zip(folders, left, strict=True):
        if not len(people):
            raise ShardsError(
                f"everybody of {folder.path} is held out; take a smaller --validation_people"
            )
    return left, sitters


def open_finder(
    cfg: EnhancerTrainConfig, folder: Path, folders: list[Folder]
) -> faces.Finder | None:
    """What looks at the drawings of held-out people; None if none are drawn.

    Raises:
      FaceError: it is missing, or another one than that of the prepared data.
    """
    if not cfg.validation_steps:
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
) -> tuple[shared.EnhancerConfig, shared.Shared, ridge.Ridge | None]:
    """The shared tree before the first step, and the regression if it starts from one.

    Raises:
      TextError, ShardsError: the names do not do.
    """
    model, frozen, special = base.model, base.frozen, base.tokenizer
    N, D = special.placeholder.n, model.text.hidden_size
    config = shared.EnhancerConfig(
        *(cfg.kind, D, N, cfg.width, cfg.kv_rank, cfg.beta), skip=cfg.start == "ridge"
    )
    ids = text.name_token_ids(special, names, N)
    whole = ids[(ids >= 0).all(axis=1)]
    if len(whole) < 2:
        raise text.TextError(
            f"of the {len(names)} names {len(whole)} have {N} tokens or more; expected at least "
            "two; give longer names with --celeb_path"
        )
    known = np.asarray(jax.device_get(sd.embed_tokens(model, frozen, whole)), np.float32)
    if cfg.start == "cross_init":
        start = anchor.from_names(
            model, frozen, ids, bos=special.bos, eos=special.eos, pad=special.pad
        )
        scale = 1.0
    else:
        start = known.mean(axis=0)
        scale = float(known.std(axis=0).mean())
    train.check_finite(np.asarray(start), f"the text encoder of {base.name}")
    key = jax.random.key(cfg.seed)
    tree = shared.init_shared(config, model, key, start, scale, known)
    if cfg.start != "ridge":
        return config, jax.device_get(tree), None
    fitted = ridge.fit(*flat(*ridge.examples(folders, people, model, frozen)), cfg.seed)
    log.info(
        "ridge regression on %d names: lambda %.3g, R2 %.3f on names that it was not fitted on",
        *(fitted.names, fitted.strength, fitted.r2),
    )
    return config, jax.device_get(ridge.into(tree, fitted)), fitted


def flat(given: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Faces, and token embeddings in one row each."""
    return given, targets.reshape(len(targets), -1)


def about_of(
    base: Base,
    folders: list[Folder],
    people: list[np.ndarray],
    digest: str,
    fitted: ridge.Ridge | None,
) -> dict:
    """What the file says of the training, but for its steps."""
    licences = sorted({folder.index.licence for folder in folders})
    about = {
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
        "sources": sorted({folder.index.source for folder in folders}),
        "licence": "; ".join([*licences, "the base model's and the face model's terms apply"]),
        "versions": checkpoint.versions(),
    }
    if fitted is not None:
        about["ridge"] = {
            **{"names": fitted.names, "strength": fitted.strength, "r2": round(fitted.r2, 4)}
        }
    return about


def optimizer_of(cfg: EnhancerTrainConfig) -> optax.GradientTransformation:
    """The optimiser that a config asks for."""
    return make_optimizer(
        cfg.learning_rate,
        **{"warmup": cfg.warmup_steps, "steps": max(cfg.max_train_steps, 1)},
        **{"clip": cfg.max_grad_norm, "beta2": cfg.adam_beta2, "epsilon": cfg.adam_epsilon},
    )


def fingerprint_of(cfg: EnhancerTrainConfig, work: Work, names: list[str]) -> dict:
    """What a resumed run must share with the run that wrote the checkpoint."""
    folders = [
        (folder.index.made_of(), [(s.records, s.faces) for s in folder.index.shards])
        for folder in work.folders
    ]
    shares = [weight for _, weight in samples.read_weights(cfg.data)]
    inputs = json.dumps([folders, shares, names], sort_keys=True)
    settings = {k: v for k, v in asdict(cfg).items() if k not in FREE_ON_RESUME}
    return {
        **settings,
        "validates": cfg.validation_steps > 0,  # else nobody is held out
        "inputs": hashlib.sha256(inputs.encode()).hexdigest(),
        "base_weights": work.about["base_weights"],
    }


def resume(
    cfg: EnhancerTrainConfig, kept: checkpoint.Checkpoints, state: EnhancerState
) -> EnhancerState:
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


# --- the steps ------------------------------------------------------------------------------------


class Journal:
    """What a run says of itself; in processes other than the first it only watches.

    Raises (all methods): WriteError, the log cannot be written.
    """

    def __init__(self, work: Work, out: Path, taken: int):
        cfg = work.cfg
        self.work, self.out = work, out
        self.losses: list[tuple[int, float]] = []
        self.likeness: list[dict] = []
        self.waited: list[float] = []
        self.log = None
        if cfg.report_to == "tensorboard" and work.first:
            self.log = tensorboard.Log(out / cfg.logging_dir)
        self.bar = tqdm(
            **{"total": cfg.max_train_steps, "initial": taken, "unit": "step"},
            disable=None if work.first else True,
        )

    def step(self, number: int, metrics: Metrics) -> bool:
        """Notes one step; returns whether any process has been asked to stop.

        Raises:
          TrainingError: it was not finite.
        """
        values = {name: value.item() for name, value in jax.device_get(metrics)._asdict().items()}
        if not values["finite"]:
            raise TrainingError(
                f"step {number}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}"
            )
        self.losses.append((number, values["loss"]))
        if self.log:
            shown = {f"train/{name}": values[name] for name in ("loss", "grad_norm")}
            self.log.scalars(shown, number)
        self.bar.update()
        newest = np.mean([loss for _, loss in self.losses[-50:]])
        self.bar.set_postfix_str(f"loss {newest:.4f}", refresh=False)
        tenth = max(1, self.work.cfg.max_train_steps // 10)
        if self.bar.disable and self.work.first and number % tenth == 0:
            log.info("step %d of %d: loss %.4f", number, self.bar.total, newest)
        return values["stop"] > 0

    def wait(self, number: int, share: float) -> None:
        """Notes the share of time in which the training waited for its samples."""
        self.waited.append(share)
        if self.log:
            self.log.scalars({"train/share_waited": share}, number)

    def validation(self, number: int, found: likeness.Likeness) -> None:
        """Notes likeness at 0 steps, and writes the grid."""
        log.info("step %d: %s", number, likeness.about(found))
        values = {"mean": found.mean, "worst": found.worst, "found": found.found}
        self.likeness.append({"step": number, **{k: round(v, 4) for k, v in values.items()}})
        about = {"parameters": f"{self.work.cfg.validation_prompt}, 0 steps, step {number}"}
        images.save_png(self.out / "validation" / f"step-{number:06d}.png", found.grid, about)
        if self.log:
            self.log.scalars({f"likeness/{k}": v for k, v in values.items()}, number)
            self.log.image("likeness/grid", found.grid, number)

    def close(self) -> None:
        self.bar.close()
        if self.log:
            self.log.close()


def loop(
    work: Work, state: EnhancerState, kept: checkpoint.Checkpoints, out: Path, started: float
) -> list[Path]:
    """Takes the steps that are left, and writes the result.

    Raises:
      as `run`.
    """
    first = int(state.step)
    with ExitStack() as stack:
        stack.callback(kept.close)
        journal = Journal(work, out, first)
        stack.callback(journal.close)
        if work.sitters and not first:
            validate(work, journal, state, 0)
        state = take_steps(work, state, kept, journal, stack)
        kept.close()
        if not work.first:
            return []
        return [write(work, journal, state, out, time.monotonic() - started)]


def take_steps(
    work: Work,
    state: EnhancerState,
    kept: checkpoint.Checkpoints,
    journal: "Journal",
    stack: ExitStack,
) -> EnhancerState:
    """Takes the steps that are left; returns the state after them.

    Args:
      stack: gets what is to be closed.

    Raises:
      TrainingError, Interrupted, WriteError: as `run`.
    """
    cfg, first = work.cfg, int(state.step)
    steps, alone = range(first, cfg.max_train_steps), jax.process_count() == 1
    if not steps:
        return state
    reader = Reader(work.plan, steps, jax.process_index(), jax.process_count())
    stack.callback(reader.close)
    signals: list[int] = []
    waiting, saved = None, first  # a step that nobody has looked at; the newest checkpoint

    def look(waiting):
        """Whether any process has been asked to stop, so that all stop after the same step."""
        if waiting is None:
            return False
        try:
            return journal.step(*waiting)
        except TrainingError as error:
            good = int(state.step)
            if good > saved and work.first:
                kept.save(state)
            raise TrainingError(
                f"{error}; stopped. "
                + (f"Step {good} is kept in {kept.folder}. " if good else "No step was finite. ")
                + "Lower the learning rate, or use --mixed_precision no"
            ) from error

    for taken in steps:
        batch, inputs = inputs_of(work, next(reader), taken, bool(signals))
        state, metrics = work.step(state, batch, inputs)
        if taken == first:
            # Not earlier: compiling may take minutes, and until now nothing could be lost.
            signals = stack.enter_context(noted_signals())
        # The step before is read while this one runs, so the devices never wait.
        stops = look(waiting) or (alone and bool(signals))
        number = taken + 1
        waiting = number, metrics
        is_last, saves = number == steps.stop, is_multiple(number, cfg.checkpointing_steps)
        validates = bool(work.sitters) and is_multiple(number, cfg.validation_steps)
        if not (stops or is_last or saves or validates):
            continue
        look(waiting)
        waiting = None
        journal.wait(number, reader.share_waited())
        if saves or (stops and not is_last) or (is_last and cfg.checkpointing_steps):
            if work.first:
                kept.save(state)
            saved = number
        if stops and not is_last:
            raise Interrupted(
                signals[0] if signals else signal.SIGTERM,
                f"stopped after step {number} of {cfg.max_train_steps}, which is kept in "
                f"{kept.folder}; add --resume_from_checkpoint latest to go on",
            )
        if validates or (is_last and work.sitters):
            validate(work, journal, state, number)
    return state


def inputs_of(work: Work, own: Batch, taken: int, stops: bool) -> tuple[Batch, dict]:
    """What `train_step` gets besides the state.

    Args:
      own: the samples that this process has read.
      taken: steps before this one.
      stops: whether this process was asked to stop.
    """
    spread = NamedSharding(work.mesh, P("data"))

    def everywhere(leaf):
        return jax.make_array_from_process_local_data(spread, np.asarray(leaf))

    inputs = {
        "seed": np.uint32(work.cfg.seed),
        "step": np.int32(taken),
        "stop": everywhere(np.full(jax.local_device_count(), stops, np.int32)),
    }
    return jax.tree.map(everywhere, own), inputs


def validate(work: Work, journal: "Journal", state: EnhancerState, number: int) -> None:
    """Measures likeness at 0 steps; all processes do it together."""
    cfg = work.cfg
    found = likeness.measure(
        *(work.config, state.average | work.constants, work.base, work.mesh),
        *(work.sitters, work.finder),
        **{"prompt": cfg.validation_prompt, "count": cfg.num_validation_images},
        **{"guidance": cfg.validation_guidance, "side": work.side, "seed": cfg.seed},
    )
    if found is not None:
        journal.validation(number, found)


def write(work: Work, journal: "Journal", state: EnhancerState, out: Path, seconds: float) -> Path:
    """Writes the result, what was run, and what came of it: all of it or nothing.

    Raises:
      WriteError: it cannot be written.
      TrainingError: a value is not finite.
    """
    cfg, steps = work.cfg, int(state.step)
    tree = jax.device_get(state.average | work.constants)
    about = {**work.about, "steps": steps}
    with write_together(out) as temporary:
        try:
            enhancer.write(temporary / RESULT, work.config, tree, about, dtype=cfg.save_dtype)
        except enhancer.EnhancerError as error:
            raise TrainingError(f"{error}; train with a lower learning rate") from error
        with atomic_write(temporary / "config.yaml") as path:
            path.write_text(to_yaml(replace(cfg, resume_from_checkpoint=None)), "utf-8")
        if not journal.losses and steps and (out / "run.json").is_file():
            return out / RESULT  # nothing was left to do: what the file says is still true
        found = {
            **about,
            "kind": cfg.kind,
            "loss_curve": loss_curve(journal.losses),
            "likeness_at_0_steps": journal.likeness,
            "share_waited": round(float(np.mean(journal.waited or [0.0])), 4),
            "seconds": round(seconds, 1),
            "devices": work.mesh.size,
            "device": jax.devices()[0].device_kind,
        }
        sample.write_json(temporary / "run.json", found)
    return out / RESULT
