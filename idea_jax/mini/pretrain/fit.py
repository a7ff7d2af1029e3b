"""Training of any of the networks: optimiser, loop, batches made ahead, saved states."""

import functools
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as muon_optimizer
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from idea_jax.mini.pretrain.run import Run
from idea_jax.pytrees import stream
from idea_jax.runtime.files import atomic_write

SAVE_SECONDS = 120
AHEAD = 3  # batches that are made while one is learned from


class Training(NamedTuple):
    params: dict
    average: dict  # exponential moving average of params
    opt_state: optax.OptState


def processes(count: int, *initial) -> ProcessPoolExecutor:
    """Returns processes for work without JAX; each first calls initial[0](*initial[1:]).

    They are begun anew, as a copy of one that has used JAX may hang.
    """
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, initial)


def _begin(function: Callable | None = None, *args) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # they end with the process that began them
    if function:
        function(*args)


# Training


def muon(
    params: dict, steps: int, rate: float = 0.01, slow: dict[str, float] | None = None
) -> optax.GradientTransformation:
    """Muon for the kernels, Adam at a tenth of the rate for all else; warm-up, cosine, clipping.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".

    Args:
      slow: start of a path of `params` -> factor on the rate of Adam there.
    """
    warm = max(1, min(100, steps // 10))

    def rates(peak):
        return optax.warmup_cosine_decay_schedule(
            peak / 10, peak, warm, max(steps, warm + 1), peak / 100
        )

    def path_of(entries):
        return "/".join(str(entry.key) for entry in entries)

    def matrix(entries, leaf):
        """Which axes are inputs and outputs, None for what is no kernel or hardly a matrix."""
        if not path_of(entries).endswith("kernel") or min(leaf.shape[-2:]) <= 8:
            return None
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    def factor(entries):
        name = path_of(entries)
        return next((f for start, f in (slow or {}).items() if name.startswith(start)), 1.0)

    def slowed(updates, state, params=None):
        del params
        return jax.tree.map_with_path(lambda path, u: factor(path) * u, updates), state

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon_optimizer(
            rates(rate),
            ns_steps=3,  # of five, the last two cost a seventh of the time of a UNet step here
            adam_learning_rate=rates(rate / 10),
            adam_b2=0.99,
            muon_weight_dimension_numbers=jax.tree.map_with_path(matrix, params),
        ),
        optax.GradientTransformation(lambda params: optax.EmptyState(), slowed),
    )


class Batches(NamedTuple):
    """What makes the batches of a training, where a thread would be too slow.

    make: rng -> arrays; pool: of processes, with JAX in none of them; ahead: how many batches are
    made while one is learned from.
    """

    make: Callable
    pool: Executor
    ahead: int


class Progress:
    """How far a part of the training is, in the work folder, too: losses, seconds, its state."""

    def __init__(self, run: Run, name: str):
        self.run, self.name = run, name
        self.file = run.work / f"{name}.state.safetensors"
        self.losses: list[float] = []
        self.started, self.before = time.monotonic(), 0.0

    def restored(self, state: Training) -> Training:
        """A state as it was saved, or itself if none was."""
        if not self.file.is_file():
            return state
        saved = load_file(self.file)
        self.losses, self.before = saved["losses"].tolist(), float(saved.get("seconds", 0.0))
        self.run.before += self.before
        leaves, structure = jax.tree.flatten(state)
        leaves = [jnp.asarray(saved[f"{i}"]) for i in range(len(leaves))]
        return jax.tree.unflatten(structure, leaves)

    def save(self, state: Training) -> None:
        """Writes a state and what led to it. Raises: FloatingPointError if it is not finite."""
        # The loss tells of the weights before a step only.
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
            raise FloatingPointError(
                f"weights of {self.name} are not finite at step {len(self.losses)}"
            )
        tensors = {f"{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        tensors["losses"] = np.array(self.losses, np.float64)
        tensors["seconds"] = np.array(self.before + time.monotonic() - self.started)
        with atomic_write(self.file) as path:
            save_file(tensors, path)

    def read(self, value: jax.Array, bar: tqdm) -> None:
        """Waits for a step and notes its loss. Raises: FloatingPointError if it is not finite."""
        self.losses.append(float(value))
        if not np.isfinite(self.losses[-1]):
            raise FloatingPointError(
                f"the loss of {self.name} is {self.losses[-1]} at step {len(self.losses) - 1}"
            )
        bar.update()
        if len(self.losses) % 20 == 1:
            bar.set_postfix_str(f"loss {np.mean(self.losses[-100:]):.4f}")

    def means(self) -> list[float]:
        """The losses as at most 50 means over equal parts of the run."""
        parts = np.array_split(np.array(self.losses), min(50, len(self.losses)))
        return [round(float(part.mean()), 5) for part in parts]


def averaged_step(
    key: jax.Array, loss: Callable, optimizer: optax.GradientTransformation, ema: float
) -> Callable:
    """A compiled function (state, index, data) -> (state, loss) that keeps a moving average."""

    def step(state, index, data):
        value, gradient = jax.value_and_grad(loss)(
            state.params, data, jax.random.fold_in(key, index)
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema, (1.0 + index) / (10.0 + index)) if ema else 0.0
        average = jax.tree.map(lambda a, p: a * decay + p * (1 - decay), state.average, params)
        return Training(params, average, opt_state), value

    return jax.jit(step, donate_argnums=0)


def fit(
    run: Run,
    name: str,
    params: dict,
    loss: Callable,
    batch: Callable | Batches,
    steps: int,
    optimizer: optax.GradientTransformation,
    *,
    ema: float = 0.0,
) -> tuple[dict, list[float]]:
    """Minimises loss(params, batch, key); returns the averaged parameters and the mean losses.

    Step i depends on the seed, the name and i alone, so that a run that was interrupted goes on as
    if it had not been. Its state is in the work folder, saved every two minutes.

    Args:
      batch: rng -> arrays, in a thread; or what makes them otherwise.
      ema: decay of the moving average that is returned; 0 returns the last parameters.

    Returns: the losses as at most 50 means over equal parts of the run.
    """
    step = averaged_step(stream(stream(run.key, "training"), name), loss, optimizer, ema)
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)  # to be donated
    state = Training(params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    progress = Progress(run, name)
    state = on_all_devices(progress.restored(state))
    first = len(progress.losses)

    last, begun = time.monotonic(), None  # `begun`: the loss of a step whose end nobody awaited
    rngs = (np.random.default_rng([run.seed, i, *name.encode()]) for i in range(first, steps))
    with (
        tqdm(total=steps, initial=first, desc=name, disable=run.quiet) as bar,
        ThreadPoolExecutor(1) as own,
    ):
        source = batch if isinstance(batch, Batches) else Batches(batch, own, AHEAD)
        with closing(made_ahead(source.pool, source.make, rngs, source.ahead)) as batches:
            for index, data in enumerate(batches, first):
                state, value = step(state, np.int32(index), on_all_devices(data, split=True))
                if begun is not None:  # the device has the next step already while the host waits
                    progress.read(begun, bar)
                begun = value
                if time.monotonic() - last > SAVE_SECONDS:
                    progress.read(begun, bar)
                    begun = None
                    progress.save(state)
                    last = time.monotonic()
        if begun is not None:
            progress.read(begun, bar)
    progress.save(state)
    return state.average, progress.means()


def made_ahead(pool: Executor, make: Callable, inputs: Iterator, ahead: int) -> Generator:
    """Yields make(input) for each input, in order, while the pool makes the next ones."""
    waiting: deque = deque()
    try:
        for each in inputs:
            waiting.append(pool.submit(make, each))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def on_all_devices(tree: Any, split: bool = False) -> Any:
    """Puts arrays on all devices; `split` puts a part on each, if all first axes can be split."""
    sizes = [leaf.shape[0] if np.ndim(leaf) else 1 for leaf in jax.tree.leaves(tree)]
    split = split and all(size % jax.device_count() == 0 for size in sizes)
    return jax.device_put(tree, _sharding(split))


@functools.cache
def _sharding(split: bool) -> NamedSharding:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data") if split else PartitionSpec())
