"""Training people together: all steps of one group, until a signal comes."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from idea_jax.config.settings import TrainConfig
from idea_jax.formats.identity import IdentityError
from idea_jax.formats.learned_embeds import EmbedsError
from idea_jax.runtime.signals import noted_signals
from idea_jax.training import program
from idea_jax.training.learner import Learner, Work
from idea_jax.training.results import Results, TrainingError, is_multiple
from idea_jax.training.resume import CheckpointError
from idea_jax.training.step import IdentityState, Metrics, Photos

log = logging.getLogger(__name__)

# What can be wrong with what one person has learned, and does not concern the others.
OWN_ERRORS = (IdentityError, EmbedsError, CheckpointError)


class Group:
    """People under training together, side by side on the devices, and how far each of them is.

    A place is a lane of the compiled step; those beyond the learners stay empty.

    Attributes:
      taken: steps that each learner has taken.
      is_saved: whether what each has reached is on disk, or nothing was reached.
      ends: int32[places], after which step each ends; early stopping and errors bring it forward.
      moved: place, first step and number of steps of those whom the newest call has moved, until
        its metrics are read.
    """

    def __init__(self, work: Work, learners: Sequence[Learner]):
        self.work, self.learners, cfg = work, learners, work.cfg
        self.taken = [int(learner.state.step) for learner in learners]
        self.is_saved = [True] * len(learners)
        self.ends = np.zeros(work.layout.places, np.int32)
        for place, learner in enumerate(learners):
            has_ended = has_plateau(cfg, learner.state)
            self.ends[place] = self.taken[place] if has_ended else cfg.max_train_steps
        self.moved: list[tuple[int, int, int]] = []
        self.metrics: Metrics | None = None
        self.open_until = self.put(self.ends)
        if self.open_places():
            self.key = jax.random.key(cfg.seed)
            self.states = self.stacked([jax.device_get(learner.state) for learner in learners])
            photos = [jax.device_get(learner.photos) for learner in learners]
            self.photos = self.stacked([fill(each, work.shape.photo_slots) for each in photos])

    def put(self, tree: Any) -> Any:
        """A tree with an axis of people, spread over the devices."""
        return jax.device_put(tree, NamedSharding(self.work.layout.mesh, P("identity")))

    def stacked(self, trees: list) -> Any:
        """The trees of the learners side by side, on the devices; the first fills empty places."""
        filled = [*trees, *[trees[0]] * (len(self.ends) - len(trees))]
        return self.put(jax.tree.map(lambda *leaves: np.stack(leaves), *filled))

    def is_open(self, place: int) -> bool:
        """Whether a learner has steps left."""
        return self.learners[place].error is None and self.taken[place] < self.ends[place]

    def open_places(self) -> list[int]:
        """The places of those who have steps left."""
        return [place for place in range(len(self.learners)) if self.is_open(place)]

    def end(self, place: int, step: int) -> None:
        """Lets a learner take no step after this one."""
        self.ends[place] = step
        self.open_until = self.put(self.ends)

    def take_out(self, place: int, error: Exception) -> None:
        """Leaves a learner behind; the others notice nothing of it."""
        self.learners[place].error = error
        self.end(place, 0)

    def step(self, bar: tqdm) -> None:
        """Takes one call's steps of everybody who has some left, and reads those of the call before
        meanwhile, so that the devices never wait."""
        cfg, most = self.work.cfg, self.work.program.steps_per_call
        going = self.open_places()
        due = (steps_until_due(cfg, self.learners[p].results, self.taken[p], most) for p in going)
        count = min(due)
        self.states, newest = program.take_steps(
            self.work.program,
            self.work.base.frozen,
            self.states,
            self.photos,
            self.key,
            self.open_until,
            np.int32(count),
        )
        self.read(bar)
        self.metrics = newest
        for place in going:
            if self.learners[place].error is None:
                self.moved.append((place, self.taken[place] + 1, count))
                self.taken[place] += count
                self.is_saved[place] = False

    def read(self, bar: tqdm) -> None:
        """Hands the metrics of the newest call to those who took its steps."""
        moved, self.moved = self.moved, []
        values = jax.device_get(self.metrics)._asdict() if moved else {}
        losses, count = [], 0
        for place, first, count in moved:
            learner = self.learners[place]
            for row in range(count):
                if learner.error is not None:  # out since a step before
                    break
                own = {name: value[row, place].item() for name, value in values.items()}
                good = None if own["finite"] else lane(jax.device_get(self.states), place)
                try:
                    learner.results.report(first + row, own, good)
                except TrainingError as error:
                    self.take_out(place, error)
                else:
                    losses.append(own["loss"])
        if losses:
            show(bar, max(first for _, first, _ in moved) + count - 1, count, losses)

    def is_due(self) -> bool:
        """Whether the host has something to do for any of those whom the newest call has moved."""
        return any(
            is_due(self.work.cfg, self.learners[place].results, self.taken[place])
            for place, _, _ in self.moved
        )

    def look(self, bar: tqdm, signals: list[int]) -> None:
        """Does what is due after the newest call: early stopping, results on the way, checkpoints.

        Args:
          signals: that have come; whoever is asked to stop has no time to draw.
        """
        cfg, places = self.work.cfg, [place for place, _, _ in self.moved]
        self.read(bar)
        # Those who were resumed may be at other steps than the rest.
        due = [place for place in places if is_evaluated(cfg, self.taken[place])]
        if due:
            self.states = program.check_plateaus(
                self.work.program,
                self.work.base.frozen,
                self.states,
                self.photos,
                self.key,
                self.put(np.isin(np.arange(len(self.ends)), due)),
            )
        host = jax.device_get(self.states)
        for place in places:
            learner, number = self.learners[place], self.taken[place]
            if learner.error is not None:
                continue
            learner.state = lane(host, place)
            if has_plateau(cfg, learner.state):
                self.end(place, number)
            is_last = number == self.ends[place] and cfg.checkpointing_steps > 0
            with self.own_errors(place):
                learner.results.save_on_the_way(number, learner.state, draws=not signals)
                if is_last or is_multiple(number, cfg.checkpointing_steps):
                    learner.checkpoints.save(learner.state)
                    self.is_saved[place] = True

    @contextmanager
    def own_errors(self, place: int) -> Iterator[None]:
        """Takes a learner out whose own values are what an error is about."""
        try:
            yield
        except OWN_ERRORS as error:
            self.take_out(place, error)


def train_together(
    work: Work, learners: Sequence[Learner], finish: Callable[[Learner], None]
) -> int | None:
    """Takes all steps that are left to each learner, and calls `finish` for those who are done.

    Whoever has a step that is not finite is taken out, with the reason in `error`; the others go
    on, and notice nothing of it. Learners may start after different steps, and with
    `early_stopping` they end after different steps.

    Args:
      finish: writes the results of a learner. What it says of them is kept as their `error`.

    Returns:
      None; or the number of the signal that came. Whoever is not done then has a checkpoint.

    Raises:
      WriteError: the disk is full, which concerns everybody.
    """
    signals: list[int] = []
    with ExitStack() as stack:
        for learner in learners:
            stack.callback(learner.results.close)
            stack.callback(learner.checkpoints.close)
        group = Group(work, learners)
        total, first = work.cfg.max_train_steps, min(group.taken)
        bar = stack.enter_context(
            tqdm(total=total, initial=first, unit="step", disable=None, leave=False)
        )
        # Steps, until nobody has any left or a signal comes.
        is_first = True
        while group.open_places():
            group.step(bar)
            if is_first:
                # Not earlier: compiling may take minutes, and until now nothing could be lost.
                signals = stack.enter_context(noted_signals())
                is_first = False
            if not signals and not group.is_due():
                continue
            group.look(bar, signals)
            if signals:
                break
        # Whoever was stopped gets a checkpoint, from which the same command goes on.
        for place in group.open_places() if signals else ():
            if not group.is_saved[place]:
                with group.own_errors(place):
                    learners[place].checkpoints.save(learners[place].state)
        for learner in learners:
            learner.checkpoints.close()
        # Whoever has no step left is done.
        for place, learner in enumerate(learners):
            if learner.error is None and not group.is_open(place):
                with group.own_errors(place):
                    finish(learner)
    return signals[0] if signals else None


def is_evaluated(cfg: TrainConfig, step: int) -> bool:
    """Whether early stopping looks at a person after this step."""
    return cfg.early_stopping > 0 and is_multiple(step, cfg.evaluation_steps)


def has_plateau(cfg: TrainConfig, state: IdentityState) -> bool:
    """Whether early stopping ends a person's training where it is."""
    return 0 < cfg.early_stopping <= int(state.plateau.since)


def is_due(cfg: TrainConfig, results: Results, step: int) -> bool:
    """Whether the host has something to do after this step of a person."""
    return (
        step == cfg.max_train_steps
        or results.is_due(step)
        or is_multiple(step, cfg.checkpointing_steps)
        or is_evaluated(cfg, step)
    )


def steps_until_due(cfg: TrainConfig, results: Results, taken: int, most: int) -> int:
    """How many steps of a person, at most `most`, come before the host has something to do."""
    return next((n for n in range(1, most) if is_due(cfg, results, taken + n)), most)


def lane(stacked: Any, place: int) -> Any:
    """The tree of one person from a stack of them."""
    return jax.tree.map(lambda leaf: leaf[place], stacked)


def fill(photos: Photos, photo_slots: int) -> Photos:
    """Photos with that many slots; zeros, which are never drawn, fill them up."""

    def pad(leaf):
        return np.pad(leaf, ((0, photo_slots - leaf.shape[0]), *((0, 0),) * (leaf.ndim - 1)))

    sizes = None if photos.size_ids is None else pad(photos.size_ids)
    return photos._replace(mean=pad(photos.mean), logvar=pad(photos.logvar), size_ids=sizes)


def show(bar: tqdm, step: int, count: int, losses: list[float]) -> None:
    """Shows the step that the newest `count` steps led to, and the mean loss of a group; in about
    ten lines where there is no terminal."""
    mean = sum(losses) / len(losses)
    bar.update(count)
    bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
    tenth = max(1, bar.total // 10)
    if bar.disable and step // tenth > (step - count) // tenth:
        log.info("step %d of %d: loss %.4f", step, bar.total, mean)
