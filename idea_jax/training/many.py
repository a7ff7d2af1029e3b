"""Training many people: group after group, each person in a folder of their own."""

import functools
import gc
import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import jax
from tqdm import tqdm

from idea_jax import jobs
from idea_jax.data import images, people
from idea_jax.faces import models as face_models
from idea_jax.runtime import compile_cache, devices, memory
from idea_jax.runtime.files import WriteError
from idea_jax.runtime.signals import Interrupted
from idea_jax.runtime.versions import difference, marks_of
from idea_jax.training import group
from idea_jax.training.fingerprint import OF_PREDICTION, digest_of_settings
from idea_jax.training.learner import (
    Learner,
    Work,
    begin,
    clean,
    closed_on_error,
    resume,
    write_results,
)
from idea_jax.training.photos import all_photos, digest_of, person_of, portraits_of
from idea_jax.training.program import lower_step
from idea_jax.training.results import (
    Occupant,
    OccupiedError,
    TrainingError,
    refuse_another,
)
from idea_jax.training.resume import CheckpointError
from idea_jax.training.start import optimizer_settings, placeholder_of

log = logging.getLogger(__name__)

# What can be wrong with one person of many, and does not concern the others.
PERSON_ERRORS = (
    images.ImageError,
    people.PeopleError,
    face_models.FaceError,
    CheckpointError,
    TrainingError,
    OccupiedError,
    OSError,
)


def train_many(work: Work, everybody: dict[str, list], own: Sequence[str]) -> list[Path]:
    """Trains people in groups, each in a folder of their own; returns their identity files.

    Who is done already is left alone, and who was interrupted goes on from the last checkpoint.
    Somebody whose photos cannot be used or whose loss is no number is taken out of the group and
    tried once more alone, after all others.

    Args:
      everybody: the pictures of each person of the run.
      own: those whom this process trains.

    Raises:
      JobsError: the folder holds the work of other settings, or results of more steps.
      TrainingError: some people failed; `jobs.jsonl` says why. All others are done.
      Interrupted: SIGINT or SIGTERM; the same command goes on.
      WriteError: the disk is full; the same command goes on.
    """
    cfg, out = work.cfg, Path(work.cfg.output_dir)
    board, settings = open_board(work, everybody, own)
    todo = left_to_do(board, everybody, own, cfg.max_train_steps)
    # Of a choice of people the others are not missed.
    gone = board.gone if board.is_first and cfg.identities is None else []
    why = (
        f"photos are gone: {cfg.train_data_dir or cfg.dataset_dir} has nobody of this name; bring "
        f"them back, or delete this person's folder in {out}"
    )
    board.note(gone, status="failed", why=why, ended=time.time())
    board.plan(todo, settings)
    log.info(
        "%d people, %d of them done; %d in a step, %d steps of %d samples, profile %s",
        len(own),
        len(own) - len(todo),
        work.layout.places,
        cfg.max_train_steps,
        cfg.train_batch_size,
        work.method.profile,
    )
    done = len(own) - len(todo)

    def train(names, size):
        nonlocal work
        failed = train_group(work, board, everybody, names, size, bar)
        # The traceback of a failure holds the group's frames, and these all of its arrays.
        if failed is not False:
            gc.collect()
        if failed is None:  # and so would be the next group
            work = halved(work)

    with tqdm(total=len(own), initial=done, desc="people", unit="person", disable=None) as bar:
        waiting = deque(todo)
        while waiting:
            train(waiting, work.layout.places)
        for name in [name for name in own if board.records[name].status == "failed"]:
            log.warning("once more, alone: %s", name)
            alone = deque([name])
            while alone:
                train(alone, 1)
    devices.await_others(meanwhile=board.publish)
    board.publish()
    mine = [board.records[name] for name in (*own, *gone)]
    failed = [record for record in mine if record.status == "failed"]
    if failed:
        reasons = "; ".join(f"{record.person}: {record.why}" for record in failed[:5])
        raise TrainingError(
            f"{len(failed)} of {len(mine)} people failed, the others are done; the same command "
            f"tries them again. {out / jobs.MANIFEST} says who failed and why. {reasons}"
        )
    return [out / name / jobs.RESULT for name in own]


def open_board(
    work: Work, everybody: dict[str, list], own: Sequence[str]
) -> tuple[jobs.Board, str]:
    """The records of a run, and the digest of its settings, which may be gone on with.

    Raises:
      JobsError: as `train_many`.
    """
    cfg, about, predicted = work.cfg, work.about, None
    is_first = jax.process_index() == 0
    board = jobs.Board(Path(cfg.output_dir), list(everybody), own, is_first=is_first)
    if work.enhancer is not None:
        # Who is as predicted can still be trained, whatever decides their steps.
        of_prediction = {k: v for k, v in about.items() if k in OF_PREDICTION}
        predicted = digest_of_settings(of_prediction)
        about = about if cfg.max_train_steps else of_prediction
    settings = digest_of_settings(about)
    board.check(
        settings,
        cfg.max_train_steps,
        before=predicted,
        explain=functools.partial(difference, now=about),
    )
    board.keep(settings, marks_of(about))
    return board, settings


def left_to_do(
    board: jobs.Board, everybody: dict[str, list], own: Sequence[str], steps: int
) -> list[str]:
    """Who is not done with that many steps, or has a result that was learned from other photos.

    Whoever failed because of other photos, which are gone again, is done as before.
    """
    now = {name: all_photos(everybody[name]) for name in own if board.records[name].photos}
    todo = [
        name
        for name in own
        if not board.is_done(name, steps) or board.holds_another(name, now.get(name))
    ]
    again = [name for name in own if board.records[name].status == "failed" and name not in todo]
    board.note(again, status="done", why=None)
    return todo


def halved(work: Work) -> Work:
    """The same work with half of the people in a step, whose program is compiled."""
    cfg, layout = work.cfg, work.layout.halved()
    work = replace(work, layout=layout, shape=work.shape._replace(places=layout.places))
    compile_cache.needs.clear()
    if cfg.max_train_steps:
        made_of = optimizer_settings(cfg, work.method)
        lower = functools.partial(
            lower_step, work.program, work.shape, cfg.seed, work.enhancer, made_of
        )
        with compile_cache.ahead(lower):  # it says what it needs
            pass
    return work


class Turn:
    """One group's turn at being trained: how long each was at it, who has failed, who is done."""

    def __init__(self, work: Work, board: jobs.Board, bar: tqdm):
        self.work, self.board, self.bar = work, board, bar
        self.out, self.started = Path(work.cfg.output_dir), time.monotonic()
        self.before: dict[str, float] = {}  # seconds that earlier turns took, by name
        self.photos: dict[str, str | None] = {}  # digests of all that there are, by name
        self.failed: list[str] = []

    @functools.cached_property
    def ended(self) -> float:
        """When the group was done, by the clock; however long its results then take to write."""
        return time.time()

    def seconds_of(self, name: str) -> float:
        """How long a person has been trained, all turns together."""
        return round(self.before[name] + time.monotonic() - self.started, 1)

    def begin(self, name: str, pictures: list) -> Learner | None:
        """A person before the next step that they take; None if they have failed.

        Raises:
          WriteError: the disk is full.
        """
        work, cfg, folder = self.work, self.work.cfg, self.out / name
        record = self.board.records[name]
        self.before[name] = record.seconds
        self.board.note([name], status="running", attempts=record.attempts + 1)
        try:
            clean(folder)
            self.photos[name] = all_photos(pictures)
            if self.board.holds_another(name, self.photos[name]):
                raise OccupiedError(
                    f"{folder} holds what was learned from other photos than those that "
                    f"{cfg.train_data_dir or cfg.dataset_dir} has of {name} now, and would be "
                    "lost: bring the first photos back, choose another --output_dir, or delete "
                    "that folder"
                )
            person = person_of(cfg, name, pictures)
            seen = portraits_of(cfg, work.method, work.eyes, person)
            if record.result is None:  # otherwise what lies there is of this very run
                token = placeholder_of(cfg).token
                new = Occupant(token, digest_of(seen.pictures), cfg.train_data_dir)
                refuse_another(folder, new)
            learner = begin(work, person, seen, folder)
            with closed_on_error(learner):
                if cfg.max_train_steps:
                    resume(learner, cfg, "latest")
        except WriteError:
            raise
        except PERSON_ERRORS as error:
            self.fail(name, error)
            return None
        return learner

    def fail(self, name: str, error: Exception) -> None:
        """Notes that a person has failed, and why."""
        self.failed.append(name)
        why, now = str(error), time.time()
        log.warning("%s is taken out: %s", name, why)
        seconds = self.seconds_of(name)
        self.board.note([name], status="failed", why=why, seconds=seconds, ended=now)

    def finish(self, learner: Learner) -> None:
        """Writes a person's results, and notes that they are done."""
        name, board = learner.person.name, self.board
        write_results(learner, self.out / name, self.seconds_of(name))
        board.note(
            [name],
            status="done",
            why=None,
            steps=self.work.cfg.max_train_steps,
            seconds=self.seconds_of(name),
            ended=self.ended,
            result=board.finished(name),
            photos=self.photos[name],
        )
        self.bar.update()
        speed = jobs.people_per_hour(list(board.records.values()))
        if speed is not None:
            self.bar.set_postfix_str(f"{speed:.1f} people/hour")

    def halve(self, error: Exception, waiting: deque[str]) -> None:
        """Lets those who are not done wait for another turn, before all others, if half of them may
        fit; otherwise raises the error."""
        layout = self.work.layout
        if not memory.is_out_of_memory(error) or layout.halved() is None:
            raise error
        needed = compile_cache.needs[-1] if compile_cache.needs else None
        about = memory.describe_memory(error, needed)
        log.warning("%d people in a step: %s; half of them are tried", layout.places, about)
        names = [name for name in self.before if self.board.records[name].status == "running"]
        self.board.note(names, status="waiting")
        waiting.extendleft(reversed(names))


def train_group(
    work: Work,
    board: jobs.Board,
    everybody: dict[str, list],
    waiting: deque[str],
    size: int,
    bar: tqdm,
) -> bool | None:
    """Takes up to `size` people whose photos can be used from `waiting` and trains them together.

    Returns:
      Whether any of them failed; None if the memory was too small for so many in a step, and could
      do for half of them. They are in `waiting` again then, and go on from their checkpoints.

    Raises:
      Interrupted, WriteError: as `train_many`.
    """
    turn = Turn(work, board, bar)
    learners: list[Learner] = []
    try:
        with ExitStack() as begun:
            while waiting and len(learners) < size:
                name = waiting.popleft()
                learner = turn.begin(name, everybody[name])
                if learner is not None:
                    begun.enter_context(closed_on_error(learner))
                    learners.append(learner)
        board.publish()
        if not learners:
            return bool(turn.failed)
        signum = group.train_together(work, learners, turn.finish)
    except Exception as error:
        turn.halve(error, waiting)
        return None
    for learner in learners:
        name = learner.person.name
        if learner.error is not None:
            turn.fail(name, learner.error)
        elif board.records[name].status != "done":
            board.note([name], status="waiting", seconds=turn.seconds_of(name))
    board.publish()
    left = [name for name in board.own if board.records[name].status != "done"]
    if signum is not None and left:
        raise Interrupted(signum, f"stopped with {len(left)} people left; the same command goes on")
    return bool(turn.failed)
