"""Training the shared enhancer: prepared folders in, `enhancer.safetensors` out."""

import functools
import logging
import signal
import time
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from idea_jax import jobs
from idea_jax.config.reading import to_yaml
from idea_jax.data import text
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.enhancer import drawing, identity_loss, likeness, samples
from idea_jax.enhancer.beginning import (
    EnhancerWork,
    about_of,
    as_begun,
    beginning,
    check_batch,
    check_model,
    check_together,
    check_weights,
    fingerprint_of,
    frozen_dtype,
    hold_out,
    open_earlier,
    open_finder,
    open_model,
    optimizer_of,
    refuse_another,
    resume,
)
from idea_jax.enhancer.journal import Journal
from idea_jax.enhancer.prepare import weights_digests
from idea_jax.enhancer.samples import EnhancerBatch, Plan, Reader
from idea_jax.enhancer.settings import EnhancerTrainConfig
from idea_jax.enhancer.step import (
    EnhancerProgram,
    EnhancerState,
    Recipe,
    init_state,
    train_step,
)
from idea_jax.formats import enhancer
from idea_jax.method import shared
from idea_jax.models import sd
from idea_jax.pytrees import count
from idea_jax.runtime import compile_cache, devices, files
from idea_jax.runtime.files import atomic_write, check_writable, write_together
from idea_jax.runtime.signals import Interrupted, noted_signals
from idea_jax.training.program import shard_specs
from idea_jax.training.results import Base, TrainingError, is_multiple, loss_curve
from idea_jax.training.resume import Checkpoints, refuse_checkpoints
from idea_jax.training.start import known_names

log = logging.getLogger(__name__)

RESULT = "enhancer.safetensors"
PLACEHOLDER = "<person>"  # its tokens' numbers are in the prepared folders, its name is nowhere


def run(cfg: EnhancerTrainConfig) -> list[Path]:
    """Trains a shared enhancer; returns the path of its file.

    Raises:
      ConfigError, ShardsError, TextError, FaceError, EnhancerError, CheckpointNotFound,
      WeightsError, UnsupportedConfig, CheckpointError, DevicesError, JobsError: bad input, found
        before training.
      OccupiedError: the folder holds an enhancer of other people.
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
        refuse_checkpoints(checkpoints)
    mesh = drawing.mesh_of(jax.devices())
    check_batch(cfg, mesh)
    weights = samples.read_weights(cfg.data)
    folders = [samples.open_folder(path) for path, _ in weights]
    check_together(folders)
    found, model, loading = open_model(cfg)
    check_model(folders, model, found.name)
    sizes = model.text.vocab_size, model.text.max_position_embeddings
    tokenizer = load_tokenizer(found.tokenizer, *sizes, found.padding)
    tokenizer = tokenizer.with_placeholder(PLACEHOLDER, folders[0].index.num_tokens)
    names = text.read_names(cfg.celeb_path) if cfg.celeb_path else known_names(found.folder)
    finder = open_finder(cfg, found.folder, folders)
    with jax.default_device(devices.host() if cfg.shard_frozen else None):
        _, frozen = sd.load(found.folder, **loading)
    digests = weights_digests(frozen)
    check_weights(folders, digests, found.name)
    base = Base(model, frozen, tokenizer, found.name, found.revision)
    left, sitters = hold_out(cfg, folders)
    earlier = open_earlier(cfg, base, folders)
    cfg = as_begun(cfg, earlier)
    config, tree, fitted = beginning(cfg, base, names, folders, left, earlier)
    plan = Plan(
        folders,
        [weight for _, weight in weights],
        left,
        size=cfg.train_batch_size,
        seed=cfg.seed,
        small=cfg.small_faces,
        mean=cfg.mean_faces,
        flip=cfg.random_flip,
    )
    specs = shard_specs(frozen, mesh.size) if cfg.shard_frozen else P()
    recipe = Recipe(
        cfg.train_batch_size,
        cfg.gradient_accumulation_steps,
        drop=cfg.drop_adapter,
        min_snr=cfg.min_snr_gamma,
        ema=cfg.ema_decay,
    )
    program = EnhancerProgram(model, config, recipe, optimizer_of(cfg), mesh, cfg.shard_frozen)
    work = EnhancerWork(
        cfg=cfg,
        base=replace(base, frozen=drawing.put(frozen, mesh, specs)),
        folders=folders,
        constants=drawing.put({k: v for k, v in tree.items() if k not in shared.TRAINED}, mesh),
        plan=plan,
        program=program,
        sitters=sitters,
        finder=finder if jax.process_index() == 0 else None,
        side=folders[0].index.settings["side"],
        about=about_of(base, folders, left, digests[str(frozen_dtype(frozen))], fitted, earlier),
        first=jax.process_index() == 0,
        likening=identity_loss.of_run(cfg, base, config, mesh, plan, finder),
    )
    refuse_another(cfg, work.about, out / RESULT)
    marks = fingerprint_of(cfg, work, names)
    kept = Checkpoints(checkpoints, marks, limit=cfg.checkpoints_total_limit)
    state = resume(cfg, kept, init_state(program.optimizer, tree))
    log.info(
        "%d people and %d pictures; %s trained values; %d steps of %d samples on %d devices",
        work.about["people"],
        work.about["pictures"],
        f"{count(state.trained):,}",
        cfg.max_train_steps,
        cfg.train_batch_size,
        mesh.size,
    )
    return loop(work, drawing.put(state, mesh), kept, out, started)


def loop(
    work: EnhancerWork, state: EnhancerState, kept: Checkpoints, out: Path, started: float
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
    work: EnhancerWork,
    state: EnhancerState,
    kept: Checkpoints,
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
    likening = work.likening(steps) if work.likening else None
    if likening:
        stack.callback(likening.close)
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
                + "Lower the learning rate or a given --id_loss_weight, or use --mixed_precision no"
            ) from error

    for taken in steps:
        batch, inputs = inputs_of(work, next(reader), taken, bool(signals))
        if likening:
            liked = likening(work.base.frozen, state.trained, work.constants, inputs)
            inputs["more"] = liked.grads
        given = (work.program, work.base.frozen, state, work.constants, batch, inputs)
        if taken == first:  # compiled by itself, the step says what memory it needs
            with compile_cache.ahead(functools.partial(train_step.lower, *given)):
                pass
        state, metrics = train_step(*given)
        if taken == first:
            # Not earlier: compiling may take minutes, and until now nothing could be lost.
            signals = stack.enter_context(noted_signals())
        # The step before is read while this one runs, so the devices never wait.
        stops = look(waiting) or (alone and bool(signals))
        number = taken + 1
        waiting = number, metrics, ((liked.similar, liked.found) if likening else None)
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


def inputs_of(
    work: EnhancerWork, own: EnhancerBatch, taken: int, stops: bool
) -> tuple[EnhancerBatch, dict]:
    """What `train_step` gets besides the state.

    Args:
      own: the samples that this process has read.
      taken: steps before this one.
      stops: whether this process was asked to stop.
    """
    mesh = work.program.mesh
    asked = np.full(jax.local_device_count(), stops, np.int32)
    inputs = {
        "seed": np.uint32(work.cfg.seed),
        "step": np.int32(taken),
        "stop": drawing.split_rows(asked, mesh),
    }
    return drawing.split_rows(own, mesh), inputs


def validate(work: EnhancerWork, journal: "Journal", state: EnhancerState, number: int) -> None:
    """Measures likeness at 0 steps; all processes do it together."""
    cfg = work.cfg
    sitting = likeness.Sitting(
        cfg.validation_prompt,
        cfg.num_validation_images,
        cfg.validation_guidance,
        work.side,
        cfg.seed,
    )
    tree = state.average | work.constants
    found = likeness.measure(
        work.program.config, tree, work.base, work.program.mesh, work.sitters, work.finder, sitting
    )
    if found is not None:
        journal.validation(number, found)


def write(
    work: EnhancerWork, journal: "Journal", state: EnhancerState, out: Path, seconds: float
) -> Path:
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
            enhancer.write(
                temporary / RESULT, work.program.config, tree, about, dtype=cfg.save_dtype
            )
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
            "likeness_of_drawings": journal.likeness_of_drawings(),
            "share_waited": round(float(np.mean(journal.waited or [0.0])), 4),
            "seconds": round(seconds, 1),
            "devices": work.program.mesh.size,
            "device": jax.devices()[0].device_kind,
        }
        files.write_json(temporary / "run.json", found)
    return out / RESULT
