"""One training step of the shared enhancer: a pure function, over all devices of all processes.

What is random in a sample depends on the seed, the step and the sample's place in the batch alone,
so that one device, many, and many processes compute the same numbers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from idea_jax.diffusion import schedule
from idea_jax.enhancer.samples import EnhancerBatch
from idea_jax.method import shared
from idea_jax.models import sd
from idea_jax.pytrees import stream
from idea_jax.training.program import gatherer, shard_specs, without_vae
from idea_jax.training.step import is_product


class EnhancerState(NamedTuple):
    """What training changes.

    Attributes:
      trained: the parts `shared.TRAINED` of a shared tree.
      average: their moving average, which is what is kept in the end.
      opt_state: of the optimiser.
      step: int32[], steps taken.
    """

    trained: dict
    average: dict
    opt_state: optax.OptState
    step: jax.Array


class Recipe(NamedTuple):
    """What decides a step. Hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
      size: samples of a step, over all devices.
      parts: in which each device takes its samples one after the other.
      drop: how often adapter and K/V are switched off, so that tokens alone carry the person.
      min_snr: gamma of Min-SNR; 0 for the plain mean.
      ema: decay of the moving average.
    """

    size: int
    parts: int = 1
    drop: float = 0.1
    min_snr: float = 0.0
    ema: float = 0.999


class EnhancerMetrics(NamedTuple):
    """loss, grad_norm: float32[]; finite: bool[], False: the step was not taken; stop: int32[],
    how many devices have been asked to stop."""

    loss: jax.Array
    grad_norm: jax.Array
    finite: jax.Array
    stop: jax.Array


def make_optimizer(
    rate: float, *, warmup: int, steps: int, clip: float, beta2: float, epsilon: float
) -> optax.GradientTransformation:
    """Adam with a linear warm-up and a cosine to zero; gradients clipped by their global norm."""
    warmup = min(warmup, max(steps - 1, 0))
    rates = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps, 0.0)
    # The first step would otherwise be taken at a rate of zero.
    adam = optax.adam(lambda count: rates(count + 1), b2=beta2, eps=epsilon)
    # Over one vector: many small leaves would be many small programs.
    return optax.flatten(optax.chain(optax.clip_by_global_norm(clip), adam))


@functools.partial(jax.jit, static_argnums=0)
def init_state(optimizer: optax.GradientTransformation, tree: shared.Shared) -> EnhancerState:
    """The state before the first step, of a shared tree."""
    trained = {name: jax.tree.map(jnp.array, tree[name]) for name in shared.TRAINED}
    average = jax.tree.map(jnp.copy, trained)
    return EnhancerState(trained, average, optimizer.init(trained), jnp.zeros((), jnp.int32))


def snr_weights(model: sd.StableDiffusion, gamma: float) -> np.ndarray:
    """Weight of each timestep's error, float32[timesteps].

    Source: arXiv 2303.09556: min(SNR, gamma) / SNR for a network that predicts the noise, and
    / (SNR + 1) for one that predicts v.
    """
    signal = schedule.alphas_cumprod(model.schedule)
    ratio = signal / (1 - signal)
    if not gamma:
        return np.ones_like(ratio, np.float32)
    is_noise = model.schedule.prediction_type == "epsilon"
    return np.float32(np.minimum(ratio, gamma) / (ratio if is_noise else ratio + 1))


def errors(
    model: sd.StableDiffusion,
    config: shared.EnhancerConfig,
    recipe: Recipe,
    tree: shared.Shared,
    frozen: sd.Frozen,
    batch: EnhancerBatch,
    key: jax.Array,
) -> jax.Array:
    """The weighted error of each sample, float32[B].

    Timesteps are spread over the whole batch, one in each of its equal parts: the same
    distribution as independent ones, less noise in the gradient.

    Args:
      batch: any rows of a step's batch.
      key: of the step.
    """

    def draws(row):
        normal, uniform = jax.random.split(jax.random.fold_in(key, row))
        posterior, noise = jax.random.normal(normal, (2, *batch.mean.shape[1:]))
        return posterior, noise, *jax.random.uniform(uniform, (2,))

    posterior, noise, time, kept = jax.vmap(draws)(batch.row)
    latents = batch.mean.astype(jnp.float32) + batch.std.astype(jnp.float32) * posterior
    total = model.schedule.num_train_timesteps
    times = ((batch.row + time) * (total / recipe.size)).astype(jnp.int32)
    times = jnp.minimum(times, total - 1)
    strength = (kept >= recipe.drop).astype(jnp.float32)
    kv = shared.keys_values(config, model, tree, frozen, batch.face, batch.token_ids, strength)
    noisy = schedule.add_noise(model.schedule, latents, noise, times)
    prediction = sd.predict(model, frozen, noisy, times, kv, batch.size_ids).astype(jnp.float32)
    target = schedule.training_target(model.schedule, latents, noise, times)
    each = jnp.mean((prediction - target) ** 2, axis=tuple(range(1, target.ndim)))
    return jnp.asarray(snr_weights(model, recipe.min_snr))[times] * each


def gradients(
    model: sd.StableDiffusion,
    config: shared.EnhancerConfig,
    recipe: Recipe,
    state: tuple[dict, dict],
    frozen: sd.Frozen,
    batch: EnhancerBatch,
    key: jax.Array,
    gather: Callable[[sd.Frozen], sd.Frozen] | None,
) -> tuple[jax.Array, dict]:
    """A device's part of loss and gradients: their sums over all devices are those of the step.

    Args:
      state: trained parts, and constants of the shared tree.
      batch: the device's rows.
      gather: makes whole weights of `frozen`, which is then the device's shards.
    """
    trained, constants = state

    def loss(trained, frozen, part):
        whole = gather(frozen) if gather else frozen
        return errors(model, config, recipe, trained | constants, whole, part, key).sum()

    if gather:
        # Gathered again in the backward pass, instead of being kept.
        loss = jax.checkpoint(loss, policy=is_product)
    grad = jax.value_and_grad(loss)

    def add(total, part):
        return jax.tree.map(jnp.add, total, grad(trained, frozen, part)), None

    # Every parts-th row: each part then has timesteps of the whole range.
    cut = jax.tree.map(
        lambda leaf: leaf.reshape(-1, recipe.parts, *leaf.shape[1:]).swapaxes(0, 1), batch
    )
    zero = jax.tree.map(jnp.zeros_like, (jnp.float32(0), trained))
    if recipe.parts == 1:
        total, _ = add(zero, jax.tree.map(lambda leaf: leaf[0], cut))
    else:
        total, _ = jax.lax.scan(add, zero, cut)
    return jax.tree.map(lambda leaf: leaf / recipe.size, total)


@dataclass(frozen=True)
class EnhancerProgram:
    """All that the step is compiled for, besides the shapes of its arrays.

    Attributes:
      mesh: of all devices, with the axis `data`; `recipe.size` is a multiple of its devices times
        `recipe.parts`.
      shard_frozen: the frozen weights are split over `data` as `program.shard_specs` says.
    """

    model: sd.StableDiffusion
    config: shared.EnhancerConfig
    recipe: Recipe
    optimizer: optax.GradientTransformation
    mesh: Mesh
    shard_frozen: bool = False


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def train_step(
    program: EnhancerProgram,
    frozen: sd.Frozen,
    state: EnhancerState,
    constants: dict,
    batch: EnhancerBatch,
    inputs: dict,
) -> tuple[EnhancerState, EnhancerMetrics]:
    """Takes one step; one all-reduce, of the gradients.

    When the loss or a gradient is not finite the state comes back as it was, and so it does from
    every later step, whose number then is not that of the state: whoever looks at the metrics,
    however late, still holds the last good state.

    Args:
      state: donated.
      constants: the other parts of the shared tree.
      batch: leaves [size, ...], split over `data`, in any order of rows.
      inputs: "seed", uint32[], of the run; "step", int32[], how many steps were taken before;
        "stop", int32[devices], split over `data`: whether a device's process was asked to stop;
        "more", gradients of another loss, over all devices, which are added; none if it is missing.
    """
    model, config, recipe, mesh = program.model, program.config, program.recipe, program.mesh
    frozen = without_vae(frozen)  # pictures were encoded when they were prepared
    gather = gatherer(frozen, mesh) if program.shard_frozen else None

    def of_device(frozen, trained, constants, batch, key, stop):
        loss, grads = gradients(
            model, config, recipe, (trained, constants), frozen, batch, key, gather
        )
        # One buffer: as float32 the few devices are exact.
        flat, unravel = ravel_pytree((loss, stop[0].astype(jnp.float32), grads))
        return unravel(jax.lax.psum(flat, "data"))

    of_frozen = shard_specs(frozen, mesh.shape["data"]) if gather else P()
    spread = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(of_frozen, P(), P(), P("data"), P(), P("data")),
        out_specs=P(),
        check_vma=False,  # Pallas' kernels do not say over which axes their results vary
    )
    key = stream(jax.random.key(inputs["seed"]), "enhancer step")
    key = jax.random.fold_in(key, inputs["step"])
    loss, stop, grads = spread(frozen, state.trained, constants, batch, key, inputs["stop"])
    if "more" in inputs:
        grads = jax.tree.map(jnp.add, grads, inputs["more"])
    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.trained)
    trained = optax.apply_updates(state.trained, updates)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    number = state.step.astype(jnp.float32)
    decay = jnp.minimum(recipe.ema, (1 + number) / (10 + number))
    average = jax.tree.map(lambda a, p: a * decay + p * (1 - decay), state.average, trained)
    taken = EnhancerState(trained, average, opt_state, state.step + 1)
    is_taken = finite & (inputs["step"] == state.step)
    kept = jax.tree.map(lambda new, old: jnp.where(is_taken, new, old), taken, state)
    return kept, EnhancerMetrics(loss, grad_norm, finite, stop.astype(jnp.int32))
