"""Samplers: DDIM and DPM-Solver++(2M), each one `lax.scan` over coefficients computed beforehand.

A sampler knows no network. It is given `predict(x, timestep) -> prediction`, with `x` of shape
[B, h, w, C] and `timestep` an int32 scalar; the prediction is noise or v, as the schedule says, and
guidance is already in it (see `guided`). Both samplers reproduce the steps of diffusers'
`DDIMScheduler` and `DPMSolverMultistepScheduler` made from the same scheduler_config.json, without
clipping.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.diffusion.schedule import (
    ScheduleConfig,
    alphas_cumprod,
    denoised_and_noise,
    inference_timesteps,
)
from idea_jax.pytrees import stream

Predict = Callable[[jax.Array, jax.Array], jax.Array]


def ddim(
    predict: Predict,
    x: jax.Array,
    cfg: ScheduleConfig,
    steps: int,
    *,
    eta: float = 0.0,
    keys: jax.Array | None = None,
) -> jax.Array:
    """Returns latents of the shape of `x`, sampled by DDIM.

    Args:
      predict: see the module's docstring.
      x: float32[B, h, w, C], standard normal.
      steps: 1 .. num_train_timesteps.
      eta: 0 (deterministic) .. 1 (as much noise as ancestral sampling adds).
      keys: typed keys[B], one per image; needed for eta > 0. The noise that step i adds to image
        b is `normal(fold_in(keys[b], i))`.

    Raises:
      ValueError: `steps` or `eta` out of range, `x` not floating, no key per image for eta > 0.

    Source: arXiv 2010.02502, eq. 12 and 16.
    """
    _check_latents(x)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"expected eta between 0 and 1, got {eta}")
    if eta > 0.0 and (keys is None or keys.shape != x.shape[:1]):
        got = "none" if keys is None else f"keys of shape {keys.shape}"
        raise ValueError(f"eta {eta} > 0 needs one random key per image {x.shape[:1]}, got {got}")

    def body(x, step):
        denoised, noise = denoised_and_noise(
            cfg.prediction_type, predict(x, step["timestep"]), x, step["alpha"], step["sigma"]
        )
        x = step["next_alpha"] * denoised + step["direction"] * noise
        if eta > 0.0:
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step["index"])
            x = x + step["fresh"] * _normal(step_keys, x.shape[1:], x.dtype)
        return x, None

    x, _ = jax.lax.scan(body, x, _ddim_coefficients(cfg, steps, eta, x.dtype))
    return x


def dpmpp_2m(predict: Predict, x: jax.Array, cfg: ScheduleConfig, steps: int) -> jax.Array:
    """Returns latents of the shape of `x`, sampled by the multistep DPM-Solver++ of second order.

    The midpoint form, with a first and a last step of first order; the last one goes to noise level
    zero, where it takes the denoised latents as they are. Arguments and errors as for `ddim`.

    Source: arXiv 2211.01095, algorithm 2.
    """
    _check_latents(x)

    def body(carry, step):
        x, last_denoised = carry
        denoised, _ = denoised_and_noise(
            cfg.prediction_type, predict(x, step["timestep"]), x, step["alpha"], step["sigma"]
        )
        extrapolated = denoised + step["extrapolation"] * (denoised - last_denoised)
        x = step["keep"] * x + step["gain"] * extrapolated
        return (x, denoised), None

    coefficients = _dpmpp_2m_coefficients(cfg, steps, x.dtype)
    (x, _), _ = jax.lax.scan(body, (x, jnp.zeros_like(x)), coefficients)
    return x


SAMPLERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}


def visited_timesteps(sampler: str, cfg: ScheduleConfig, steps: int) -> np.ndarray:
    """The timesteps at which one of `SAMPLERS` calls `predict`, in order: int32[steps].

    They are different, so what depends on them alone can be computed once for all steps.

    Raises:
      ScheduleError: see `schedule.inference_timesteps`.
    """
    if sampler == "ddim":
        return inference_timesteps(cfg, steps, cfg.timestep_spacing or "leading")
    spacing = cfg.timestep_spacing or "linspace"
    return inference_timesteps(cfg, steps, spacing, drop_lowest=True)


def guided(predict: Predict, guidance_scale: float | jax.Array) -> Predict:
    """Returns a `predict` with classifier-free guidance, one call of twice the batch per step.

    Args:
      predict: takes `x` of 2 B images, of which the first B get the unconditional (or negative)
        text and the last B the prompt.
      guidance_scale: 1 is the prompt alone; Stable Diffusion's usual value is 7.5.

    Source: arXiv 2207.12598, eq. 6, in the form `unconditional + scale * (conditional -
    unconditional)` of the Stable Diffusion code.
    """

    def guided_predict(x, timestep):
        unconditional, conditional = jnp.split(predict(jnp.concatenate([x, x]), timestep), 2)
        return unconditional + guidance_scale * (conditional - unconditional)

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
    """Returns the starting latents float32[B, *shape] and the keys [B] for `ddim` with eta > 0.

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


def _ddim_coefficients(cfg: ScheduleConfig, steps: int, eta: float, dtype: np.dtype) -> dict:
    """The scan inputs of `ddim`, each of length `steps`."""
    timesteps = visited_timesteps("ddim", cfg, steps)
    signal = alphas_cumprod(cfg)
    # diffusers steps back by this fixed stride, which for "linspace", and where the steps do not
    # divide the timesteps, is not quite the distance to the next timestep. Its images are the
    # reference, so the same is done here.
    following = timesteps - cfg.num_train_timesteps // steps
    final = 1.0 if cfg.set_alpha_to_one else signal[0]
    now = signal[timesteps]
    then = np.where(following >= 0, signal[np.maximum(following, 0)], final)
    fresh = eta * np.sqrt((1.0 - then) / (1.0 - now) * (1.0 - now / then))
    coefficients = {
        "alpha": np.sqrt(now),
        "sigma": np.sqrt(1.0 - now),
        "next_alpha": np.sqrt(then),
        "direction": np.sqrt(1.0 - then - fresh**2),
        "fresh": fresh,
    }
    return _scan_inputs(timesteps, coefficients, dtype)


def _dpmpp_2m_coefficients(cfg: ScheduleConfig, steps: int, dtype: np.dtype) -> dict:
    """The scan inputs of `dpmpp_2m`, each of length `steps`."""
    timesteps = visited_timesteps("dpmpp_2m", cfg, steps)
    signal = alphas_cumprod(cfg)[timesteps]
    alpha, sigma = np.sqrt(signal), np.sqrt(1.0 - signal)
    next_alpha, next_sigma = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    # With lambda = log(alpha / sigma) and h its increase over a step, the paper's weight of the
    # denoised latents is -next_alpha * expm1(-h); written without h, which is infinite at the end.
    keep = next_sigma / sigma
    gain = next_alpha - keep * alpha
    # 1 / (2 r) with r = h_last / h; zero makes a step one of first order.
    h = np.diff(np.log(alpha / sigma))
    extrapolation = np.zeros(steps)
    extrapolation[1:-1] = h[1:] / (2.0 * h[:-1])
    coefficients = {
        "alpha": alpha,
        "sigma": sigma,
        "keep": keep,
        "gain": gain,
        "extrapolation": extrapolation,
    }
    return _scan_inputs(timesteps, coefficients, dtype)


def _scan_inputs(timesteps: np.ndarray, coefficients: dict, dtype: np.dtype) -> dict:
    inputs = {name: values.astype(dtype) for name, values in coefficients.items()}
    return {"timestep": timesteps, "index": np.arange(len(timesteps), dtype=np.int32), **inputs}


def _check_latents(x: jax.Array) -> None:
    if x.ndim < 1 or x.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"expected float32 latents [B, h, w, C], got {x.dtype}{list(x.shape)}")


def _normal(keys: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Standard normal values of shape [B, *shape], from one key per image."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
