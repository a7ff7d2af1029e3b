"""One person under training: how they begin, go on from a checkpoint, and are written."""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idea_jax import jobs
from idea_jax.config.settings import TrainConfig
from idea_jax.data import people
from idea_jax.faces import finding
from idea_jax.faces import table as face_table
from idea_jax.faces.portraits import Portraits
from idea_jax.formats import enhancer as enhancers
from idea_jax.formats import learned_embeds
from idea_jax.method import condition
from idea_jax.pytrees import count
from idea_jax.runtime import devices
from idea_jax.runtime.files import write_together
from idea_jax.training.photos import digest_of, encode_pixels, training_pixels
from idea_jax.training.program import Program, Shape
from idea_jax.training.results import (
    Base,
    Results,
    occupant_of,
    remove_finished,
)
from idea_jax.training.resume import CheckpointError, Checkpoints
from idea_jax.training.start import first_values
from idea_jax.training.step import (
    IdentityState,
    Photos,
    Plateau,
    init_state,
)

log = logging.getLogger(__name__)


@dataclass
class Learner:
    """One person under training.

    Attributes:
      state: the state to start from; afterwards the last good one.
      photos: None if no step is taken.
      error: why they were taken out of their group; None as long as all is well.
    """

    person: people.Person
    state: IdentityState
    photos: Photos | None
    checkpoints: Checkpoints
    results: Results
    error: Exception | None = None


@dataclass(frozen=True)
class Work:
    """What the training of every person of a run has in common.

    Without a step to take there is no `program`, `start` or frozen model in `base`.
    """

    cfg: TrainConfig
    method: condition.Method
    base: Base
    program: Program | None
    enhancer: enhancers.Enhancer | None  # the shared one, if people begin with it
    start: Any  # the pseudo tokens' first value without it, of `starting_tokens`
    shape: Shape  # of the compiled step
    eyes: finding.Finder | face_table.FaceTable | None
    validation: list[str]
    layout: devices.Layout
    about: dict  # the fingerprint of a person, but for their photos
    is_word: Callable[[str], bool]  # whether the vocabulary has a text as one word


@contextmanager
def closed_on_error(learner: Learner) -> Iterator[None]:
    """Closes the files of somebody who cannot be trained: of many such people there are many."""
    try:
        yield
    except BaseException:
        learner.results.close()
        learner.checkpoints.close()
        raise


def clean(folder: Path) -> None:
    """Removes what a process that was killed left half-written in a person's folder."""
    for path in list(folder.rglob(".tmp-*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def begin(work: Work, person: people.Person, seen: Portraits, folder: Path) -> Learner:
    """A person before the first step: their state, and their photos as the frozen model sees them.

    Args:
      folder: that receives their results.
    """
    cfg, method, base = work.cfg, work.method, work.base
    trainable, given = first_values(
        base.model,
        method,
        jax.random.key(cfg.seed),
        work.enhancer,
        work.start,
        seen.id_embed,
    )
    who = f"{person.name}: " if person.name else ""
    if cfg.max_train_steps:
        photos = encode_pixels(base, training_pixels(cfg, seen, work.shape.side))
        state = init_state(work.program.optimizer, trainable, given)
        log.info(
            "%sprofile %s, %d photo(s), %s trained values, %d steps of %d samples, learning rates: "
            "%s",
            who,
            method.profile,
            len(seen.pictures),
            f"{count(trainable):,}",
            cfg.max_train_steps,
            cfg.train_batch_size,
            ", ".join(f"{part} {cfg.rates()[part]:g}" for part in method.parts()),
        )
    else:
        photos, none = None, Plateau(np.float32(np.inf), np.int32(0))
        state = IdentityState(trainable, given, (), np.int32(0), none)
        log.info("%sas predicted from %d photo(s), without training", who, len(seen.pictures))
    return Learner(
        person=person,
        state=state,
        photos=photos,
        checkpoints=Checkpoints(
            folder / "checkpoints",
            work.about | {"photos": digest_of(seen.pictures)},
            limit=cfg.checkpoints_total_limit,
        ),
        results=Results(
            cfg, method, base, folder, work.validation, work.is_word, enhancer=work.enhancer
        ),
    )


def has_checkpoints(cfg: TrainConfig) -> bool:
    """Whether there is anything to resume the only person of a run from."""
    return any((Path(cfg.output_dir) / "checkpoints").glob("[0-9]*"))


def resume(learner: Learner, cfg: TrainConfig, which: str) -> None:
    """Sets a learner to the checkpoint asked for; leaves them as they are where there is none yet.

    Raises:
      CheckpointError: as `Checkpoints.restore`, or it is beyond the last step.
    """
    if which == "latest" and not learner.checkpoints.folder.is_dir():
        restored = None
    else:
        restored = learner.checkpoints.restore(learner.state, which)
    who = f"{learner.person.name}: " if learner.person.name else ""
    if restored is None:
        if not who:
            log.warning(
                "no checkpoint in %s yet: starting from the first step", learner.checkpoints.folder
            )
        return
    step, last = int(restored.step), cfg.max_train_steps
    if step > last:
        raise CheckpointError(
            f"the checkpoint is of step {step}, beyond --max_train_steps {last}; ask for more "
            "steps, or name an earlier checkpoint"
        )
    learner.state = restored
    left = "; nothing is left to do" if step == last else ""
    log.info("%sresumed after step %d%s", who, step, left)


def write_results(learner: Learner, folder: Path, seconds: float) -> None:
    """Writes what was learned of a person, all of it or nothing.

    Raises:
      WriteError: it cannot be written.
      IdentityError: it holds values that are not finite.
    """
    results, state = learner.results, learner.state
    before = occupant_of(folder)
    with write_together(folder) as temporary:
        results.save_identity(state, temporary / jobs.RESULT)
        results.save_embeds(state, temporary / learned_embeds.FILE_NAME)
        results.save_webui(state, temporary / "webui")
        photos = learner.checkpoints.fingerprint["photos"]
        results.save_run(int(state.step), seconds, learner.person, photos, temporary)
    if not isinstance(state.trainable["pseudo_tokens"], dict):  # where an earlier one was of SDXL
        (folder / learned_embeds.second_of(learned_embeds.FILE_NAME)).unlink(missing_ok=True)
    if before is not None and before.placeholder not in (None, results.token):
        remove_finished(folder, learned_embeds.trigger_of(before.placeholder, results.is_word))
    trigger = learned_embeds.trigger_of(results.token, results.is_word)
    log.info(
        "%sin AUTOMATIC1111 the word is %s, in ComfyUI embedding:%s, with the file in %s",
        f"{learner.person.name}: " if learner.person.name else "",
        trigger,
        trigger,
        folder / "webui",
    )
