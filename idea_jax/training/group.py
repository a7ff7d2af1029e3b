"""Training people together: all steps of one group, until a signal comes."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from idea_jax.config.settings import TrainConfig
from idea_jax.formats.identity import IdentityError
from idea_jax.formats.pickles import EmbedsError
from idea_jax.runtime.signals import noted_signals
from idea_jax.training.learner import Learner
from idea_jax.training.results import Results, TrainingError, is_multiple
from idea_jax.training.resume import CheckpointError
from idea_jax.training.step import IdentityState, Metrics, Photos

log = logging.getLogger(__name__)

# What can be wrong with what one person has learned, and does not concern the others.
OWN_ERRORS = (IdentityError, EmbedsError, CheckpointError)


def train_together(
    cfg: TrainConfig,
    mesh: Mesh,
    places: int,
    pictures: int,
    room: int,
    step: Callable[[IdentityState, Photos, jax.Array, jax.Array], tuple[IdentityState, Metrics]],
    evaluate: Callable[[IdentityState, Photos, jax.Array], IdentityState],
    learners: Sequence[Learner],
    finish: Callable[[Learner], None],
) -> int | None:
    """Takes all steps that are left to each learner, and calls `finish` for those who are done.

    Whoever has a step that is not finite is taken out, with the reason in `error`; the others go
    on, and notice nothing of it. Learners may start after different steps, and with
    `early_stopping` they end after different steps.

    Args:
      places: people that the compiled step is for; those beyond the learners stay empty.
      pictures: that it has places for, at least as many as any of the learners has.
      room: how many steps one call of `step` takes at most.
      step: `program.step_people` with all bound but (states, photos, last, count).
      evaluate: `program.evaluate_people` with all bound but (states, photos, due).
      finish: writes the results of a learner. What it says of them is kept as their `error`.

    Returns:
      None; or the number of the signal that came. Whoever is not done then has a checkpoint.

    Raises:
      WriteError: the disk is full, which concerns everybody.
    """
    taken = [int(learner.state.step) for learner in learners]
    is_saved = [True] * len(learners)  # what was reached so far is on disk, or nothing was
    # After which step each of them ends; early stopping and errors bring it forward.
    ends = np.zeros(places, np.int32)
    for place, learner in enumerate(learners):
        has_ended = has_plateau(cfg, learner.state)
        ends[place] = taken[place] if has_ended else cfg.max_train_steps

    def put(tree):
        return jax.device_put(tree, NamedSharding(mesh, P("identity")))

    def stacked(trees):
        filled = [*trees, *[trees[0]] * (places - len(trees))]
        return put(jax.tree.map(lambda *leaves: np.stack(leaves), *filled))

    def is_open(place):
        return learners[place].error is None and taken[place] < ends[place]

    if any(map(is_open, range(len(learners)))):
        states = stacked([jax.device_get(learner.state) for learner in learners])
        photos = stacked([fill(jax.device_get(learner.photos), pictures) for learner in learners])
    open_until = put(ends)

    def take_out(place, error):
        nonlocal open_until
        learners[place].error = error
        ends[place] = 0
        open_until = put(ends)

    def note(moved, metrics):
        """Hands the metrics of some steps to those who took them."""
        values = jax.device_get(metrics)._asdict() if moved else {}
        losses = []
        for place, first, count in moved:
            learner = learners[place]
            for row in range(count):
                if learner.error is not None:  # out since a step before
                    break
                own = {name: value[row, place].item() for name, value in values.items()}
                good = None if own["finite"] else lane(jax.device_get(states), place)
                try:
                    learner.results.report(first + row, own, good)
                except TrainingError as error:
                    take_out(place, error)
                else:
                    losses.append(own["loss"])
        if losses:
            show(bar, max(first for _, first, _ in moved) + count - 1, count, losses)

    signals: list[int] = []
    with ExitStack() as stack:
        for learner in learners:
            stack.callback(learner.results.close)
            stack.callback(learner.checkpoints.close)
        bar = stack.enter_context(
            tqdm(
                total=cfg.max_train_steps,
                initial=min(taken),
                unit="step",
                disable=None,
                leave=False,
            )
        )
        moved, metrics, is_first = [], None, True
        while any(map(is_open, range(len(learners)))):
            going = [place for place in range(len(learners)) if is_open(place)]
            count = min(
                steps_until_due(cfg, learners[place].results, taken[place], room) for place in going
            )
            states, newest = step(states, photos, open_until, np.int32(count))
            # The steps before are read while these run, so the devices never wait.
            note(moved, metrics)
            if is_first:
                # Not earlier: compiling may take minutes, and until now nothing could be lost.
                signals = stack.enter_context(noted_signals())
                is_first = False
            moved, metrics = [], newest
            for place in going:
                if learners[place].error is None:
                    moved.append((place, taken[place] + 1, count))
                    taken[place] += count
                    is_saved[place] = False
            if not signals and not any(
                is_due(cfg, learners[place].results, taken[place]) for place, _, _ in moved
            ):
                continue
            note(moved, metrics)
            # Those who were resumed may be at other steps than the rest.
            evaluated = [place for place, _, _ in moved if is_evaluated(cfg, taken[place])]
            if evaluated:
                states = evaluate(states, photos, put(np.isin(np.arange(places), evaluated)))
            host = jax.device_get(states)
            for place, _, _ in moved:
                learner, number = learners[place], taken[place]
                if learner.error is not None:
                    continue
                learner.state = lane(host, place)
                if has_plateau(cfg, learner.state):
                    ends[place] = number
                    open_until = put(ends)
                is_last = number == ends[place] and cfg.checkpointing_steps > 0
                try:
                    # Whoever is asked to stop has no time to draw.
                    learner.results.save_on_the_way(number, learner.state, draws=not signals)
                    if is_last or is_multiple(number, cfg.checkpointing_steps):
                        learner.checkpoints.save(learner.state)
                        is_saved[place] = True
                except OWN_ERRORS as error:
                    take_out(place, error)
            moved = []
            if signals:
                break
        for place, learner in enumerate(learners):
            try:
                if signals and is_open(place) and not is_saved[place]:
                    learner.checkpoints.save(learner.state)
            except OWN_ERRORS as error:
                take_out(place, error)
        for learner in learners:
            learner.checkpoints.close()
        for place, learner in enumerate(learners):
            try:
                if learner.error is None and not is_open(place):
                    finish(learner)
            except OWN_ERRORS as error:
                take_out(place, error)
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


def lane(stacked: object, place: int) -> object:
    """The tree of one person from a stack of them."""
    return jax.tree.map(lambda leaf: leaf[place], stacked)


def fill(photos: Photos, pictures: int) -> Photos:
    """Photos with places for that many pictures; zeros, which are never drawn, fill them up."""

    def pad(leaf):
        return np.pad(leaf, ((0, pictures - leaf.shape[0]), *((0, 0),) * (leaf.ndim - 1)))

    return photos._replace(mean=pad(photos.mean), logvar=pad(photos.logvar))


def show(bar: tqdm, step: int, count: int, losses: list[float]) -> None:
    """Shows the step that the newest `count` steps led to, and the mean loss of a group; in about
    ten lines where there is no terminal."""
    mean = sum(losses) / len(losses)
    bar.update(count)
    bar.set_postfix_str(f"loss {mean:.4f}", refresh=False)
    tenth = max(1, bar.total // 10)
    if bar.disable and step // tenth > (step - count) // tenth:
        log.info("step %d of %d: loss %.4f", step, bar.total, mean)
