"""One training step of one person: a pure function that `jax.vmap` and `jax.shard_map` accept."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from idea_jax.diffusion import schedule
from idea_jax.method import condition
from idea_jax.method.loss import denoising_error
from idea_jax.models import sd
from idea_jax.models.precision import exact
from idea_jax.pytrees import stream

EVALUATION_SAMPLES = 16
LEAST_GAIN = 0.01  # of the best evaluation


class Plateau(NamedTuple):
    """Whether training still gains anything; see `check_plateau`.

    best: float32[], the lowest evaluation so far that counted as a gain.
    since: int32[], evaluations since then.
    """

    best: jax.Array
    since: jax.Array


class IdentityState(NamedTuple):
    """All that belongs to one person while training."""

    trainable: condition.Trainable
    given: condition.Given
    opt_state: optax.OptState
    step: jax.Array  # int32[], steps taken
    plateau: Plateau


class Photos(NamedTuple):
    """One person's pictures as the frozen VAE sees them, and the texts they are trained with.

    mean, logvar: float32[P, 2, h, w, C], moments of the scaled latents of each picture and of its
      mirror.
    count: int32[], pictures that exist (P may be padded beyond it).
    token_ids: int32[K, T], the training prompts.
    size_ids: int32[P, 6], what SDXL is told of the sizes of each picture; None for others.
    """

    mean: jax.Array
    logvar: jax.Array
    count: jax.Array
    token_ids: jax.Array
    size_ids: jax.Array | None = None


class Batch(NamedTuple):
    """latents, noise: float32[B, h, w, C]; timesteps: int32[B]; token_ids: int32[B, T]; size_ids:
    int32[B, 6] or None."""

    latents: jax.Array
    noise: jax.Array
    timesteps: jax.Array
    token_ids: jax.Array
    size_ids: jax.Array | None = None


class Metrics(NamedTuple):
    """float32[] each; `finite` is bool[]: False means that the step was not taken."""

    loss: jax.Array
    denoising: jax.Array
    regulariser: jax.Array
    grad_norm: jax.Array
    finite: jax.Array


# Schedules of a rate that do not depend on how many steps there are.
CONSTANT = ("constant", "constant_with_warmup")


def rate_over_steps(
    rate: float, scheduler: str, steps: int, warmup: int, cycles: int = 1
) -> float | optax.Schedule:
    """The learning rate of a part at each step.

    Args:
      rate: the full one.
      scheduler: one of diffusers' names; all but the constant ones lead down to 0 after the last
        step, "polynomial" evenly to 1e-7.
      steps: of the whole run.
      warmup: steps in which the rate rises evenly to the full one.
      cycles: falls of "cosine_with_restarts", each from the full rate.
    """
    is_constant = scheduler in CONSTANT
    if is_constant and not warmup:
        return rate
    left = steps - warmup
    if is_constant:
        after = optax.constant_schedule(rate)
    elif scheduler == "cosine":
        after = optax.cosine_decay_schedule(rate, left)
    elif scheduler == "cosine_with_restarts":

        def after(step):
            part = (cycles * step % left) / left  # in whole numbers, so that a fall begins in time
            return jnp.where(step < left, 0.5 * rate * (1 + jnp.cos(jnp.pi * part)), 0.0)

    else:
        end = {"linear": 0.0, "polynomial": min(1e-7, rate)}[scheduler]
        after = optax.linear_schedule(rate, end, left)
    # From one part of the full rate on: a step at rate 0 would be wasted.
    rise = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def make_optimizer(
    rates: Mapping[str, float | optax.Schedule],
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    basis: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with a learning rate for each part of the trainables (the keys of `rates`).

    With a basis it sees the pseudo tokens as coordinates in it, of which weight decay knows
    nothing: a step is what it would be if the coordinates were trained, and is taken in the tokens.
    `update` then takes the argument `basis`, float32[B, N, D], of two text encoders a dict.

    Args:
      basis: its size B; 0 where the tokens are trained as they are.
    """
    adamw = {
        part: optax.adamw(rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay)
        for part, rate in rates.items()
    }

    def labels(trainable):
        return {part: jax.tree.map(lambda _, p=part: p, tree) for part, tree in trainable.items()}

    inner = optax.with_extra_args_support(optax.multi_transform(adamw, labels))
    return in_basis(inner, basis) if basis else inner


def in_basis(
    inner: optax.GradientTransformationExtraArgs, size: int
) -> optax.GradientTransformationExtraArgs:
    """An optimiser of trainables whose pseudo tokens are seen as coordinates in a basis."""

    def of_tokens(trainable, function, *others):
        return trainable | {"pseudo_tokens": each_tree(function, *others)}

    def each_tree(function, tokens, *others):
        if not isinstance(tokens, dict):
            return function(tokens, *others)
        return {of: function(tokens[of], *(other[of] for other in others)) for of in tokens}

    def zeros(_):
        return jnp.zeros(size, jnp.float32)

    def init(trainable):
        return inner.init(of_tokens(trainable, zeros, trainable["pseudo_tokens"]))

    def update(grads, state, trainable, *, basis, **extra):
        def along(grad, basis):
            return jnp.einsum("bnd,nd->b", basis, grad)

        def back(change, basis):
            return jnp.einsum("b,bnd->nd", change, basis)

        with exact(jnp.float32):
            seen = of_tokens(grads, along, grads["pseudo_tokens"], basis)
            place = of_tokens(trainable, zeros, trainable["pseudo_tokens"])
            updates, state = inner.update(seen, state, place, **extra)
            return of_tokens(updates, back, updates["pseudo_tokens"], basis), state

    return optax.GradientTransformationExtraArgs(init, update)


@functools.partial(jax.jit, static_argnums=0)
def init_state(
    optimizer: optax.GradientTransformation,
    trainable: condition.Trainable,
    given: condition.Given,
) -> IdentityState:
    """A person's state before the first step."""
    # Two zeros: steps donate the state, and a buffer can be given away once.
    plateau = Plateau(jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))
    step = jnp.zeros((), jnp.int32)
    return IdentityState(trainable, given, optimizer.init(trainable), step, plateau)


def draw_batch(
    model: sd.StableDiffusion, photos: Photos, key: jax.Array, step: jax.Array, size: int
) -> Batch:
    """Draws the samples of a step: picture, mirror, posterior sample, text, timestep, noise.

    Depends on the person's key and the step alone, so a resumed run draws what the straight run
    would have drawn.

    Args:
      key: the person's key.
      step: int32[].
      size: samples.
    """

    def draw(name):
        return jax.random.fold_in(stream(key, name), step)

    shape = (size, *photos.mean.shape[2:])
    # A uniform number times the count, instead of randint, since the count may be a traced value.
    picture = jnp.floor(jax.random.uniform(draw("picture"), (size,)) * photos.count)
    picture = jnp.minimum(picture.astype(jnp.int32), photos.count - 1)
    mirror = jax.random.bernoulli(draw("mirror"), 0.5, (size,)).astype(jnp.int32)
    mean, logvar = photos.mean[picture, mirror], photos.logvar[picture, mirror]
    sample = mean + jnp.exp(0.5 * logvar) * jax.random.normal(draw("posterior"), shape)
    text = jax.random.randint(draw("text"), (size,), 0, photos.token_ids.shape[0])
    steps = model.schedule.num_train_timesteps
    return Batch(
        latents=sample,
        noise=jax.random.normal(draw("noise"), shape),
        timesteps=jax.random.randint(draw("timestep"), (size,), 0, steps),
        token_ids=photos.token_ids[text],
        size_ids=None if photos.size_ids is None else photos.size_ids[picture],
    )


def training_loss(
    model: sd.StableDiffusion,
    method: condition.Method,
    frozen: sd.Frozen,
    trainable: condition.Trainable,
    given: condition.Given,
    batch: Batch,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns (loss, (denoising error, unweighted regulariser)), float32[] each.

    Source: arXiv 2507.11990, training objective; `Whslee/ID-EA` train.py.
    """
    text = condition.context(model, method, frozen, trainable, given, batch.token_ids)
    kv = condition.keys_values(model, method, frozen, trainable, text)
    noisy = schedule.add_noise(model.schedule, batch.latents, batch.noise, batch.timesteps)
    prediction = sd.predict(model, frozen, noisy, batch.timesteps, kv, batch.size_ids)
    target = schedule.training_target(model.schedule, batch.latents, batch.noise, batch.timesteps)
    error = denoising_error(prediction, target)
    pull = condition.regulariser(method, trainable, given)
    return error + method.reg_weight * pull, (error, pull)


def train_step(
    model: sd.StableDiffusion,
    method: condition.Method,
    optimizer: optax.GradientTransformation,
    frozen: sd.Frozen,
    state: IdentityState,
    batch: Batch,
    *,
    data_axis: str | None = None,
    gather: Callable[[sd.Frozen], sd.Frozen] | None = None,
) -> tuple[IdentityState, Metrics]:
    """Takes one step; gradients exist for the trainables only.

    Bind the first three arguments with `functools.partial`; the rest is (frozen, state, batch) and
    may be jitted, vmapped over people (`in_axes=(None, 0, 0)`) and sharded.

    When the loss or a gradient is not finite, the state comes back as it was, step number
    included: the following step then draws the same batch and fails the same way, so whoever looks
    at the metrics, however late, still holds the last good state.

    Args:
      data_axis: inside a `jax.shard_map`, the mesh axis over whose devices the samples of the step
        are spread in equal parts; `batch` is this device's part. Loss and gradients are averaged
        over it in one all-reduce.
      gather: makes whole weights of `frozen`, which is then this device's shards.
    """
    trainable = state.trainable
    if data_axis is not None:
        # Where a shard_map checks what varies, gradients of values that the devices share would be
        # summed leaf by leaf, inside autodiff.
        trainable = jax.lax.pcast(trainable, data_axis, to="varying")
    grad = jax.value_and_grad(_loss_of_shards(gather), argnums=3, has_aux=True)
    (total, (error, pull)), grads = grad(model, method, frozen, trainable, state.given, batch)
    if data_axis is not None:
        flat, unravel = ravel_pytree((total, error, pull, grads))
        total, error, pull, grads = unravel(jax.lax.pmean(flat, data_axis))
    extra = {}
    if method.basis:
        extra["basis"] = (gather(frozen) if gather else frozen).shared["basis"]
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable, **extra)
    trainable = optax.apply_updates(state.trainable, updates)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
    taken = state._replace(trainable=trainable, opt_state=opt_state, step=state.step + 1)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), taken, state)
    return kept, Metrics(total, error, pull, grad_norm, finite)


def _loss_of_shards(gather: Callable[[sd.Frozen], sd.Frozen] | None) -> Callable:
    """`training_loss`; with `gather`, of shards of the frozen weights.

    The backward pass gathers them again instead of keeping all of them since the forward pass: that
    is what makes a sharded model fit where a whole one does not.
    """
    if gather is None:
        return training_loss

    def loss(model, method, shards, trainable, given, batch):
        @functools.partial(jax.checkpoint, policy=is_product)
        def inner(shards, trainable):
            return training_loss(model, method, gather(shards), trainable, given, batch)

        return inner(shards, trainable)

    return loss


# What gives products, convolutions and attention; "cond" is a convolution with a way of its own on
# each platform.
PRODUCTS = {"dot_general", "conv_general_dilated", "pallas_call", "cond"}


def is_product(primitive, *_, **__) -> bool:
    """Whether the backward pass keeps what this primitive gave, and computes the rest again: a
    policy of `jax.checkpoint` under which no product is computed twice.

    To keep everything but the gathered weights would hold norms and activations, too, which XLA
    otherwise computes again inside of what reads them: a step of SD 2.1 on four chips then takes
    5.3 GiB instead of 3.0.
    """
    return primitive.name in PRODUCTS or primitive.name.startswith("dot_product_attention")


def check_plateau(
    model: sd.StableDiffusion,
    method: condition.Method,
    frozen: sd.Frozen,
    state: IdentityState,
    photos: Photos,
    key: jax.Array,
) -> IdentityState:
    """The state of a person, with what the loss on `EVALUATION_SAMPLES` samples says of their gain.

    Picture, noise, timesteps and texts are the same at every call, so that two calls differ by what
    was learned between them, which the noise of single steps hides. The timesteps are spread
    evenly. A gain is a loss `LEAST_GAIN` below the best one.

    Args:
      key: of the run.
    """
    batch = draw_batch(model, photos, stream(key, "evaluation"), jnp.int32(0), EVALUATION_SAMPLES)
    steps = model.schedule.num_train_timesteps
    spread = (jnp.arange(EVALUATION_SAMPLES) + 0.5) * (steps / EVALUATION_SAMPLES)
    batch = batch._replace(timesteps=spread.astype(jnp.int32))
    _, (loss, _) = training_loss(model, method, frozen, state.trainable, state.given, batch)
    best, since = state.plateau
    gained = loss < best * (1 - LEAST_GAIN)
    plateau = Plateau(jnp.where(gained, loss, best), jnp.where(gained, 0, since + 1))
    return state._replace(plateau=plateau)
