"""Training people together: all steps of one group, until a signal comes."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from idea_jax.checkpoint import Checkpoints, IdentityError
from idea_jax.config import TrainConfig
from idea_jax.data import people
from idea_jax.results import Results, TrainingError, is_multiple
from idea_jax.train_step import IdentityState, Metrics, Photos

log = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal asked the run to stop; what was reached is on disk."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


@dataclass
class Learner:
    """One person under training.

    Attributes:
        state: the state to start from; afterwards the last good one.
        error: why they were taken out of their group; None as long as all is well.
    """

    person: people.Person
    state: IdentityState
    photos: Photos
    checkpoints: Checkpoints
    results: Results
    error: Exception | None = None


def train_together(
    cfg: TrainConfig,
    mesh: Mesh,
    places: int,
    pictures: int,
    step: Callable[[IdentityState, Photos, jax.Array], tuple[IdentityState, Metrics]],
    learners: Sequence[Learner],
    finish: Callable[[Learner], None],
) -> int | None:
    """Takes all steps that are left to each learner, and calls `finish` for those who are done.

    Whoever has a step that is not finite is taken out, with the reason in `error`; the others go
    on, and notice nothing of it. Learners may start after different steps.

    Args:
      places: people that the compiled step is for; those beyond the learners stay empty.
      pictures: that it has places for, at least as many as any of the learners has.
      step: `train_step.step_people` with all bound but (states, photos, last).
      finish: writes the results of a learner. An IdentityError of it is kept as their `error`.

    Returns:
      None; or the number of the signal that came. Whoever is not done then has a checkpoint.

    Raises:
      WriteError: the disk is full, which concerns everybody.
    """
    last = cfg.max_train_steps
    taken = [int(learner.state.step) for learner in learners]
    is_saved = [True] * len(learners)  # what was reached so far is on disk, or nothing was
    ends = np.where(np.arange(places) < len(learners), last, 0).astype(np.int32)

    def put(tree):
        return jax.device_put(tree, NamedSharding(mesh, P("identity")))

    def stacked(trees):
        filled = [*trees, *[trees[0]] * (places - len(trees))]
        return put(jax.tree.map(lambda *leaves: np.stack(leaves), *filled))

    states = stacked([jax.device_get(learner.state) for learner in learners])
    photos = stacked([fill(jax.device_get(learner.photos), pictures) for learner in learners])
    open_until = put(ends)

    def note(moved, metrics):
        """Hands the metrics of a step to whom they belong."""
        nonlocal open_until
        values = jax.device_get(metrics)._asdict() if moved else {}
        losses = []
        for place, number in moved:
            learner = learners[place]
            if learner.error is not None:  # out since the step before
                continue
            own = {name: value[place].item() for name, value in values.items()}
            good = None if own["finite"] else lane(jax.device_get(states), place)
            try:
                learner.results.report(number, own, good)
            except TrainingError as error:
                learner.error = error
                ends[place] = 0
                open_until = put(ends)
            else:
                losses.append(own["loss"])
        if losses:
            show(bar, max(number for _, number in moved), losses)

    signals: list[int] = []
    with ExitStack() as stack:
        for learner in learners:
            stack.callback(learner.results.close)
            stack.callback(learner.checkpoints.close)
        bar = stack.enter_context(
            tqdm(total=last, initial=max(taken), unit="step", disable=None, leave=False)
        )
        moved, metrics = [], None
        first = min(taken) + 1
        for turn in range(first, last + 1):
            states, newest = step(states, photos, open_until)
            # The step before is read while this one runs, so the devices never wait.
            note(moved, metrics)
            if turn == first:
                # Not earlier: compiling may take minutes, and until now nothing could be lost.
                signals = stack.enter_context(noted_signals())
            moved, metrics = [], newest
            for place, learner in enumerate(learners):
                if learner.error is None and taken[place] < last:
                    taken[place] += 1
                    is_saved[place] = False
                    moved.append((place, taken[place]))
            if not moved:
                break
            due = [
                number == last
                or learners[place].results.is_due(number)
                or is_multiple(number, cfg.checkpointing_steps)
                for place, number in moved
            ]
            if not any(due) and not signals:
                continue
            note(moved, metrics)
            host = jax.device_get(states)
            for place, number in moved:
                learner = learners[place]
                if learner.error is not None:
                    continue
                learner.state = lane(host, place)
                learner.results.save_on_the_way(number, learner.state)
                is_last = number == last and cfg.checkpointing_steps > 0
                if is_last or is_multiple(number, cfg.checkpointing_steps):
                    learner.checkpoints.save(learner.state)
                    is_saved[place] = True
            moved = []
            if signals:
                break
        for place, learner in enumerate(learners):
            is_open = learner.error is None and taken[place] < last
            if signals and is_open and not is_saved[place]:
                learner.checkpoints.save(learner.state)
        for learner in learners:
            learner.checkpoints.close()
        for place, learner in enumerate(learners):
            if learner.error is None and taken[place] == last:
                try:
                    finish(learner)
                except IdentityError as error:
                    learner.error = error
    return signals[0] if signals else None


def lane(stacked: object, place: int) -> object:
    """The tree of one person from a stack of them."""
    return jax.tree.map(lambda leaf: leaf[place], stacked)


def fill(photos: Photos, pictures: int) -> Photos:
    """Photos with places for that many pictures; zeros, which are never drawn, fill them up."""

    def pad(leaf):
        return np.pad(leaf, ((0, pictures - leaf.shape[0]), *((0, 0),) * (leaf.ndim - 1)))

    return photos._replace(mean=pad(photos.mean), logvar=pad(photos.logvar))


def show(bar: tqdm, step: int, losses: list[float]) -> None:
    """Shows a step and the mean loss of a group; in ten lines where there is no terminal."""
    mean = sum(losses) / len(losses)
    bar.update()
    bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
    if bar.disable and is_multiple(step, max(1, bar.total // 10)):
        log.info("step %d of %d: loss %.4f", step, bar.total, mean)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the step under way can end; a second one ends the
    process at once, wherever it is.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    noted: list[int] = []

    def note(signum, frame):
        noted.append(signum)
        # A handler of ours would have to wait for the end of a long call into XLA.
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
        log.warning("stopping after this step; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
