"""Samplers: DDIM, DPM-Solver++(2M), Euler, Euler ancestral and LCM, all of them one `lax.scan`.

A sampler is a table of noise levels and of coefficients, computed beforehand (`SAMPLERS`); `sample`
goes through it. It knows no network. It is given `predict(x, timestep) -> prediction`, with `x` of
shape [B, h, w, C], `alpha**2 + sigma**2 = 1`, and `timestep` an int32 or float32 scalar; the
prediction is noise or v, as the schedule says, and guidance is already in it (see `guided`). The
steps are those of diffusers' schedulers made from the same scheduler_config.json, without clipping.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.diffusion.schedule import (
    ScheduleConfig,
    ScheduleError,
    alphas_cumprod,
    denoised_and_noise,
    inference_timesteps,
)
from idea_jax.pytrees import stream

Predict = Callable[[jax.Array, jax.Array], jax.Array]

# What diffusers' solvers take for the squared signal of a timestep that has none: they divide by
# it. DDIM and LCM do not, and take zero.
SMALLEST_SIGNAL = 2.0**-24
KARRAS_RHO = 7.0  # arXiv 2206.00364, table 1


class Steps(NamedTuple):
    """The steps of a run, [steps] each. At a step `x = alpha * denoised + sigma * noise`, and then
    `x = to_denoised * denoised + to_noise * noise + fresh * new noise + to_change * change`, where
    change is what `denoised` is more than one step before.

    `timestep` is int32 or float32, the others are float64.
    """

    timestep: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    to_denoised: np.ndarray
    to_noise: np.ndarray
    fresh: np.ndarray
    to_change: np.ndarray


class Levels(NamedTuple):
    """Where a sampler calls `predict`: timesteps [steps], and alpha and sigma there, float64."""

    timestep: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray


class Sampler(NamedTuple):
    """A row of `SAMPLERS`.

    Attributes:
      levels: schedule and number of steps -> `Levels`.
      steps: schedule, levels and eta -> `Steps`.
      takes_eta: whether `eta` sets how much fresh noise its steps add.
      takes_karras: whether it heeds `use_karras_sigmas`.
      takes_spacing: whether it heeds `timestep_spacing`.
      scales_start: whether it starts with the noise of its first level, which is a little less than
        all, unless timesteps are "leading".
    """

    levels: Callable[[ScheduleConfig, int], Levels]
    steps: Callable[[ScheduleConfig, Levels, float], Steps]
    takes_eta: bool = False
    takes_karras: bool = False
    takes_spacing: bool = True
    scales_start: bool = False


def sample(
    name: str,
    predict: Predict,
    x: jax.Array,
    cfg: ScheduleConfig,
    steps: int,
    *,
    eta: float = 0.0,
    keys: jax.Array | None = None,
) -> jax.Array:
    """Returns latents of the shape of `x`, sampled by one of `SAMPLERS`.

    Args:
      name: of the sampler.
      predict: see the module's docstring.
      x: float32[B, h, w, C], standard normal.
      steps: 1 .. num_train_timesteps.
      eta: of DDIM, 0 (deterministic) .. 1 (as much noise as ancestral sampling adds).
      keys: typed keys[B], one per image; needed where steps add noise. The noise that step i adds
        to image b is `normal(fold_in(keys[b], i))`.

    Raises:
      ValueError: `steps` or `eta` out of range, `x` not floating, no key per image where steps add
        noise.
    """
    if x.ndim < 1 or x.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"expected float32 latents [B, h, w, C], got {x.dtype}{list(x.shape)}")
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"expected eta between 0 and 1, got {eta}")
    if eta and not SAMPLERS[name].takes_eta:
        raise ValueError(f"sampler {name!r} has no eta, got {eta}")
    table = SAMPLERS[name].steps(cfg, SAMPLERS[name].levels(cfg, steps), eta)
    adds_noise, is_multistep = bool(table.fresh.any()), bool(table.to_change.any())
    if adds_noise and (keys is None or keys.shape != x.shape[:1]):
        got = "none" if keys is None else f"keys of shape {keys.shape}"
        raise ValueError(
            f"the steps of {name!r} add noise, which needs one random key per image "
            f"{x.shape[:1]}, got {got}"
        )

    def body(carry, step):
        x, last = carry
        denoised, noise = denoised_and_noise(
            cfg.prediction_type, predict(x, step["timestep"]), x, step["alpha"], step["sigma"]
        )
        x = step["to_denoised"] * denoised + step["to_noise"] * noise
        if is_multistep:
            x, last = x + step["to_change"] * (denoised - last), denoised
        if adds_noise:
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step["index"])
            x = x + step["fresh"] * _normal(step_keys, x.shape[1:], x.dtype)
        return (x, last), None

    inputs = {key: value.astype(x.dtype) for key, value in table._asdict().items()}
    inputs["timestep"] = table.timestep
    inputs["index"] = np.arange(steps, dtype=np.int32)
    if SAMPLERS[name].scales_start and _spacing(cfg, "linspace") != "leading":
        x = x * jnp.asarray(table.sigma[0], x.dtype)
    (x, _), _ = jax.lax.scan(body, (x, jnp.zeros_like(x) if is_multistep else ()), inputs)
    return x


def _spacing(cfg: ScheduleConfig, otherwise: str) -> str:
    return cfg.timestep_spacing or otherwise


def _levels(timesteps: np.ndarray, signal: np.ndarray) -> Levels:
    """Of timesteps whose squared signal is known."""
    return Levels(timesteps, np.sqrt(signal), np.sqrt(1.0 - signal))


def _next(values: np.ndarray, last: float) -> np.ndarray:
    """What follows each of the values, and `last` at the end."""
    return np.append(values[1:], last)


def _ratios(cfg: ScheduleConfig) -> np.ndarray:
    """Noise over signal by timestep, float64[num_train_timesteps], increasing: "sigmas"."""
    signal = np.maximum(alphas_cumprod(cfg), SMALLEST_SIGNAL)
    return np.sqrt((1.0 - signal) / signal)


def _karras(cfg: ScheduleConfig, low: float, high: float, steps: int) -> tuple:
    """Timesteps, which lie between two of the schedule, and sigmas, from `high` down to `low`.

    Source: arXiv 2206.00364, eq. 5.
    """
    ends = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    sigmas = (ends[0] + np.linspace(0, 1, steps) * (ends[1] - ends[0])) ** KARRAS_RHO
    ratios = _ratios(cfg)
    return np.interp(np.log(sigmas), np.log(ratios), np.arange(len(ratios))), sigmas


def _ddim_levels(cfg: ScheduleConfig, steps: int) -> Levels:
    timesteps = inference_timesteps(cfg, steps, _spacing(cfg, "leading"))
    return _levels(timesteps, alphas_cumprod(cfg)[timesteps])


def _ddim_steps(cfg: ScheduleConfig, levels: Levels, eta: float) -> Steps:
    """Source: arXiv 2010.02502, eq. 12 and 16."""
    signal = alphas_cumprod(cfg)
    # diffusers steps back by this fixed stride, which for "linspace", and where the steps do not
    # divide the timesteps, is not quite the distance to the next timestep. Its images are the
    # reference, so the same is done here.
    following = levels.timestep - cfg.num_train_timesteps // len(levels.timestep)
    final = 1.0 if cfg.set_alpha_to_one else signal[0]
    now = signal[levels.timestep]
    then = np.where(following >= 0, signal[np.maximum(following, 0)], final)
    fresh = eta * np.sqrt((1.0 - then) / (1.0 - now) * (1.0 - now / then))
    return Steps(*levels, np.sqrt(then), np.sqrt(1.0 - then - fresh**2), fresh, np.zeros(len(now)))


def _dpmpp_2m_levels(cfg: ScheduleConfig, steps: int) -> Levels:
    spacing = _spacing(cfg, "linspace")
    timesteps = inference_timesteps(cfg, steps, spacing, drop_lowest=True)
    if cfg.use_karras_sigmas:
        ratios = _ratios(cfg)
        between, sigmas = _karras(cfg, ratios[0], ratios[-1], steps)
        return _levels(between.round().astype(np.int32), 1.0 / (1.0 + sigmas**2))
    return _levels(timesteps, np.maximum(alphas_cumprod(cfg), SMALLEST_SIGNAL)[timesteps])


def _dpmpp_2m_steps(cfg: ScheduleConfig, levels: Levels, eta: float) -> Steps:
    """The midpoint form, with a first and a last step of first order; the last one goes to noise
    level zero, where it takes the denoised latents as they are. Source: arXiv 2211.01095, algorithm
    2."""
    alpha, sigma = levels.alpha, levels.sigma
    next_alpha, next_sigma = _next(alpha, 1.0), _next(sigma, 0.0)
    # With lambda = log(alpha / sigma) and h its increase over a step, the paper's weight of the
    # denoised latents is -next_alpha * expm1(-h); written without h, which is infinite at the end.
    gain = next_alpha - next_sigma / sigma * alpha
    # 1 / (2 r) with r = h_last / h; zero makes a step one of first order.
    h = np.diff(np.log(alpha / sigma))
    extrapolation = np.zeros(len(alpha))
    extrapolation[1:-1] = h[1:] / (2.0 * h[:-1])
    return Steps(*levels, next_alpha, next_sigma, np.zeros(len(alpha)), gain * extrapolation)


def _euler_levels(cfg: ScheduleConfig, steps: int) -> Levels:
    spacing, ratios = _spacing(cfg, "linspace"), _ratios(cfg)
    timesteps = inference_timesteps(cfg, steps, spacing).astype(np.float64)
    if spacing == "linspace":  # not rounded, unlike those of other samplers
        timesteps = np.linspace(0, cfg.num_train_timesteps - 1, steps)[::-1]
    sigmas = np.interp(timesteps, np.arange(len(ratios)), ratios)
    if cfg.use_karras_sigmas:
        timesteps, sigmas = _karras(cfg, sigmas[-1], sigmas[0], steps)
    return _levels(timesteps.astype(np.float32), 1.0 / (1.0 + sigmas**2))


def _euler_steps(cfg: ScheduleConfig, levels: Levels, eta: float) -> Steps:
    """Source: arXiv 2206.00364, algorithm 1 without the correction of second order."""
    none = np.zeros(len(levels.alpha))
    return Steps(*levels, _next(levels.alpha, 1.0), _next(levels.sigma, 0.0), none, none)


def _ancestral_levels(cfg: ScheduleConfig, steps: int) -> Levels:
    return _euler_levels(replace(cfg, use_karras_sigmas=False), steps)


def _ancestral_steps(cfg: ScheduleConfig, levels: Levels, eta: float) -> Steps:
    """Down to less noise than the next level has, and up to it with fresh noise: arXiv 2011.13456,
    eq. 47, in the form of k-diffusion's `sample_euler_ancestral`."""
    next_alpha, next_sigma = _next(levels.alpha, 1.0), _next(levels.sigma, 0.0)
    now, then = levels.sigma / levels.alpha, next_sigma / next_alpha
    up = then * np.sqrt(1.0 - (then / now) ** 2)
    down = np.sqrt(then**2 - up**2)
    none = np.zeros(len(now))
    return Steps(*levels, next_alpha, next_alpha * down, next_alpha * up, none)


def _lcm_levels(cfg: ScheduleConfig, steps: int) -> Levels:
    most, total = cfg.original_inference_steps, cfg.num_train_timesteps
    if not 1 <= steps <= most <= total:
        raise ScheduleError(
            f"expected between 1 and {min(most, total)} sampling steps of LCM "
            f"(original_inference_steps, of {total} timesteps), got {steps}"
        )
    trained = np.arange(1, most + 1)[::-1] * (total // most) - 1
    timesteps = trained[np.floor(np.linspace(0, most, steps, endpoint=False)).astype(int)]
    return _levels(timesteps.astype(np.int32), alphas_cumprod(cfg)[timesteps])


def _lcm_steps(cfg: ScheduleConfig, levels: Levels, eta: float) -> Steps:
    """To the denoised latents of a consistency model, and up to the next level with fresh noise.

    Source: arXiv 2310.04378, algorithm 3 and appendix D.
    """
    time = levels.timestep * float(cfg.timestep_scaling)
    spread = 0.5**2  # sigma_data squared
    kept, taken = spread / (time**2 + spread), time / np.sqrt(time**2 + spread)
    # Of x, which is alpha * denoised + sigma * noise, a little is kept.
    next_alpha, next_sigma = _next(levels.alpha, 1.0), _next(levels.sigma, 0.0)
    to_denoised = next_alpha * (taken + kept * levels.alpha)
    to_noise = next_alpha * kept * levels.sigma
    return Steps(*levels, to_denoised, to_noise, next_sigma, np.zeros(len(time)))


# By the name that --scheduler has for them.
SAMPLERS = {
    "ddim": Sampler(_ddim_levels, _ddim_steps, takes_eta=True),
    "dpmpp_2m": Sampler(_dpmpp_2m_levels, _dpmpp_2m_steps, takes_karras=True),
    "euler": Sampler(_euler_levels, _euler_steps, takes_karras=True, scales_start=True),
    "euler_ancestral": Sampler(_ancestral_levels, _ancestral_steps, scales_start=True),
    "lcm": Sampler(_lcm_levels, _lcm_steps, takes_spacing=False),
}


def visited_timesteps(sampler: str, cfg: ScheduleConfig, steps: int) -> np.ndarray:
    """The timesteps at which one of `SAMPLERS` calls `predict`, in order: int32 or float32[steps].

    What depends on them alone can be computed once for all steps. Where two are equal, so is that.

    Raises:
      ScheduleError: see `schedule.inference_timesteps`.
    """
    return SAMPLERS[sampler].levels(cfg, steps).timestep


def guided(predict: Predict, guidance_scale: float | jax.Array, rescale: float = 0.0) -> Predict:
    """Returns a `predict` with classifier-free guidance, one call of twice the batch per step.

    Args:
      predict: takes `x` of 2 B images, of which the first B get the unconditional (or negative)
        text and the last B the prompt.
      guidance_scale: 1 is the prompt alone; Stable Diffusion's usual value is 7.5.
      rescale: how far, from 0 to 1, each guided prediction is given the standard deviation that the
        prompt's own has.

    Source: arXiv 2207.12598, eq. 6, in the form `unconditional + scale * (conditional -
    unconditional)` of the Stable Diffusion code; arXiv 2305.08891, eq. 15 and 16, for `rescale`.
    """

    def guided_predict(x, timestep):
        unconditional, conditional = jnp.split(predict(jnp.concatenate([x, x]), timestep), 2)
        prediction = unconditional + guidance_scale * (conditional - unconditional)
        if rescale:
            axes = tuple(range(1, x.ndim))
            ratio = jnp.std(conditional, axes, keepdims=True) / jnp.std(
                prediction, axes, keepdims=True
            )
            prediction = prediction * (rescale * ratio + (1.0 - rescale))
        return prediction

    return guided_predict


def guided_between(
    guided: Predict, plain: Predict, interval: tuple[float, float], cfg: ScheduleConfig
) -> Predict:
    """Returns a `predict` that guides in the middle of the way only: half of the work elsewhere.

    Args:
      guided: see `guided`; taken where the timestep lies within the interval, its ends included.
      plain: the prompt alone, for the others.
      interval: low and high end, as parts of `num_train_timesteps`: 0 is the clean picture.

    Source: arXiv 2404.07724, which gives the interval in noise levels.
    """

    def predict(x, timestep):
        return jax.lax.cond(lies_between(timestep, interval, cfg), guided, plain, x, timestep)

    return predict


def lies_between(
    timesteps: np.ndarray | jax.Array, interval: tuple[float, float], cfg: ScheduleConfig
) -> np.ndarray | jax.Array:
    """Returns which timesteps, int[...], `guided_between` guides: bool[...]."""
    low = math.ceil(interval[0] * cfg.num_train_timesteps)
    high = math.floor(interval[1] * cfg.num_train_timesteps)
    return (low <= timesteps) & (timesteps <= high)


def initial_noise(
    seed: int, indices: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Returns the starting latents float32[B, *shape] and the keys [B] of `sample`.

    Image i of a seed depends on the seed and on i only, so it is the same in any batch.

    Args:
      seed: the seed of the run.
      indices: int32[B], the images' numbers within the run.
      shape: of one image's latents, (h, w, C).
    """
    return _initial_noise(jax.random.key(seed), jnp.asarray(indices), tuple(shape))


@partial(jax.jit, static_argnames="shape")
def _initial_noise(root, indices, shape):
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    start = fold_in(stream(root, "initial_noise"), indices)
    steps = fold_in(stream(root, "step_noise"), indices)
    return _normal(start, shape, jnp.float32), steps


def _normal(keys: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Standard normal values of shape [B, *shape], from one key per image."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
