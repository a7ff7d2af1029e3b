"""The samplers against diffusers step by step, against closed forms, and their random streams."""

from functools import partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import io_callback

from idea_jax.config.settings import SCHEDULERS
from idea_jax.diffusion.samplers import (
    SAMPLERS,
    guided,
    guided_between,
    initial_noise,
    sample,
    visited_timesteps,
)
from idea_jax.diffusion.schedule import ScheduleConfig, ScheduleError, alphas_cumprod

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ZERO_SNR = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
REFERENCES = {
    "ddim": diffusers.DDIMScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "lcm": diffusers.LCMScheduler,
}
SHAPE = (2, 4, 3, 2)
STEPS = (1, 2, 5, 20, 37, 50)  # 37 does not divide the 1000 timesteps
# Timestep spacing (None: each scheduler's default) and offset, which only "leading" heeds.
SPACINGS = [(None, 1), ("leading", 0), ("leading", 1), ("trailing", 1), ("linspace", 1)]


@pytest.fixture(autouse=True)
def _strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


ddim, dpmpp_2m = partial(sample, "ddim"), partial(sample, "dpmpp_2m")


def recorded(sampler, predictions, x):
    """Runs `sampler` on a fixed sequence of predictions.

    Returns the timesteps that it asked for, and x before each step and after the last.
    """
    timesteps, trajectory = [], []

    def reply(x, timestep):
        trajectory.append(np.asarray(x))
        timesteps.append(float(timestep))
        return predictions[len(timesteps) - 1]

    def predict(x, timestep):
        return io_callback(reply, x, x, timestep, ordered=True)

    trajectory.append(np.asarray(jax.jit(partial(sampler, predict))(x)))
    return timesteps, np.stack(trajectory)


def reference_run(scheduler, predictions, x, steps, **step_arguments):
    """The same from a scheduler of diffusers; `step_arguments` are sequences with one per step."""
    scheduler.set_timesteps(steps)
    x = torch.tensor(np.asarray(x)) * scheduler.init_noise_sigma
    trajectory = []
    for i, timestep in enumerate(scheduler.timesteps):
        arguments = {name: values[i] for name, values in step_arguments.items()}
        # What the network is given has the size of our latents; Euler's own are larger.
        trajectory.append(scheduler.scale_model_input(x, timestep).numpy())
        x = scheduler.step(torch.tensor(predictions[i]), timestep, x, **arguments).prev_sample
    return scheduler.timesteps.tolist(), np.stack([*trajectory, x.numpy()])


def assert_same_run(got, expected, message="", most=1e-5):
    """The same timesteps, and every step within `most` of the size of its latents."""
    # diffusers rounds noise levels to float32, which moves Karras timesteps by up to 1.1e-3.
    np.testing.assert_allclose(got[0], expected[0], atol=2e-3, err_msg=message)
    assert got[1].dtype == np.float32
    for step, (ours, theirs) in enumerate(zip(got[1], expected[1], strict=True)):
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < most, f"{message}: step {step}: {error}"


def predictions_and_start():
    values = np.random.default_rng(0).standard_normal((max(STEPS) + 1, *SHAPE), np.float32)
    return values[1:], jnp.asarray(values[0])


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_agrees_with_diffusers(prediction_type, spacing, offset, set_alpha_to_one):
    settings = {
        **SD,
        "prediction_type": prediction_type,
        "steps_offset": offset,
        "set_alpha_to_one": set_alpha_to_one,
    }
    if spacing:
        settings["timestep_spacing"] = spacing
    cfg = ScheduleConfig(**settings)
    reference = diffusers.DDIMScheduler.from_config({**settings, "clip_sample": False})
    predictions, x = predictions_and_start()
    for steps in STEPS:
        got = recorded(partial(ddim, cfg=cfg, steps=steps), predictions, x)
        assert_same_run(got, reference_run(reference, predictions, x, steps), f"{steps} steps")


@jax.jit(static_argnums=1)
def step_noise(keys, steps):
    """The noise that DDIM with eta adds: [steps, *SHAPE]."""

    def one(step, key):
        return jax.random.normal(jax.random.fold_in(key, step), SHAPE[1:])

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(jnp.arange(steps), keys)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("eta", "spacing", "steps"),
    [(0.4, "leading", 20), (1.0, "leading", 2), (1.0, "trailing", 37), (0.4, "linspace", 37)],
)
def test_ddim_with_eta_agrees_with_diffusers(eta, spacing, steps, prediction_type):
    settings = {
        **SD,
        "prediction_type": prediction_type,
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "timestep_spacing": spacing,
    }
    cfg = ScheduleConfig(**settings)
    reference = diffusers.DDIMScheduler(**settings, clip_sample=False)
    predictions, x = predictions_and_start()
    keys = jax.random.split(jax.random.key(3), SHAPE[0])
    fresh = torch.tensor(np.array(step_noise(jax.random.clone(keys), 37)))
    sampler = partial(ddim, cfg=cfg, steps=steps, eta=eta, keys=keys)
    expected = reference_run(
        reference, predictions, x, steps, eta=[eta] * steps, variance_noise=fresh
    )
    assert_same_run(recorded(sampler, predictions, x), expected)


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_dpmpp_2m_agrees_with_diffusers(prediction_type, spacing, offset):
    settings = {**SD, "prediction_type": prediction_type, "steps_offset": offset}
    if spacing:
        settings["timestep_spacing"] = spacing
    cfg = ScheduleConfig(**settings)
    reference = diffusers.DPMSolverMultistepScheduler.from_config(settings)
    predictions, x = predictions_and_start()
    # 15 is where diffusers' DPM-Solver changes its rule for the last steps.
    for steps in (*STEPS, 14, 15):
        got = recorded(partial(dpmpp_2m, cfg=cfg, steps=steps), predictions, x)
        assert_same_run(got, reference_run(reference, predictions, x, steps), f"{steps} steps")


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("is_karras", [False, True])
def test_euler_agrees_with_diffusers(is_karras, prediction_type, spacing, offset):
    settings = {**SD, "prediction_type": prediction_type, "steps_offset": offset}
    settings |= {"use_karras_sigmas": is_karras}
    if spacing:
        settings["timestep_spacing"] = spacing
    cfg = ScheduleConfig(**settings)
    reference = diffusers.EulerDiscreteScheduler.from_config(settings)
    predictions, x = predictions_and_start()
    # One step of "linspace" is at timestep 0, whose little noise diffusers rounds by 1.3e-5.
    for steps in STEPS if spacing in ("leading", "trailing") else STEPS[1:]:
        got = recorded(partial(sample, "euler", cfg=cfg, steps=steps), predictions, x)
        assert_same_run(got, reference_run(reference, predictions, x, steps), f"{steps} steps")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_dpmpp_2m_with_karras_sigmas_agrees_with_diffusers(prediction_type):
    settings = {**SD, "prediction_type": prediction_type, "use_karras_sigmas": True}
    cfg = ScheduleConfig(**settings)
    reference = diffusers.DPMSolverMultistepScheduler.from_config(settings)
    predictions, x = predictions_and_start()
    for steps in STEPS:
        got = recorded(partial(dpmpp_2m, cfg=cfg, steps=steps), predictions, x)
        assert_same_run(got, reference_run(reference, predictions, x, steps), f"{steps} steps")


@pytest.fixture
def keys(monkeypatch):
    """Keys of two images, whose noise diffusers adds, too."""
    keys = jax.random.split(jax.random.key(3), SHAPE[0])
    fresh = np.array(step_noise(jax.random.clone(keys), max(STEPS)))
    left = []
    for name in ("scheduling_euler_ancestral_discrete", "scheduling_lcm"):
        module = getattr(diffusers.schedulers, name)
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.tensor(left.pop(0)))

    def begin():
        left[:] = fresh
        return jax.random.clone(keys)

    return begin


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_ancestral_agrees_with_diffusers(prediction_type, spacing, offset, keys):
    settings = {**SD, "prediction_type": prediction_type, "steps_offset": offset}
    if spacing:
        settings["timestep_spacing"] = spacing
    # Karras sigmas are not among its settings.
    cfg = ScheduleConfig(**settings, use_karras_sigmas=True)
    reference = diffusers.EulerAncestralDiscreteScheduler.from_config(settings)
    predictions, x = predictions_and_start()
    for steps in (2, 20, 37):
        sampler = partial(sample, "euler_ancestral", cfg=cfg, steps=steps, keys=keys())
        got = recorded(sampler, predictions, x)
        assert_same_run(got, reference_run(reference, predictions, x, steps), f"{steps} steps")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("original", "scaling"), [(50, 10.0), (100, 0.001)])
def test_lcm_agrees_with_diffusers(original, scaling, prediction_type, keys):
    settings = {**SD, "prediction_type": prediction_type, "timestep_scaling": scaling}
    settings |= {"original_inference_steps": original, "timestep_spacing": "trailing"}
    cfg = ScheduleConfig(**settings)
    reference = diffusers.LCMScheduler.from_config(settings)
    predictions, x = predictions_and_start()
    for steps in (1, 2, 4, 7, 50):
        sampler = partial(sample, "lcm", cfg=cfg, steps=steps, keys=keys())
        got = recorded(sampler, predictions, x)
        assert_same_run(got, reference_run(reference, predictions, x, steps), f"{steps} steps")


def test_lcm_has_no_more_steps_than_it_was_distilled_for():
    cfg = ScheduleConfig(**SD, original_inference_steps=8)
    assert visited_timesteps("lcm", cfg, 8).tolist() == [124 * n + n - 1 for n in range(8, 0, -1)]
    with pytest.raises(ScheduleError, match="between 1 and 8 sampling steps of LCM.*got 9"):
        visited_timesteps("lcm", cfg, 9)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_without_signal_at_the_end_samplers_agree_with_diffusers(name, keys):
    cfg = ScheduleConfig(**ZERO_SNR, timestep_spacing="trailing")
    settings = {**ZERO_SNR, "timestep_spacing": "trailing", "clip_sample": False}
    reference = REFERENCES[name].from_config(settings)
    predictions, x = predictions_and_start()
    for steps in (1, 2, 5, 20):
        own = {} if name in ("ddim", "dpmpp_2m", "euler") else {"keys": keys()}
        got = recorded(partial(sample, name, cfg=cfg, steps=steps, **own), predictions, x)
        assert got[0][0] == 999.0
        expected = reference_run(reference, predictions, x, steps)
        # diffusers' Euler has latents of size 4096 there, which float32 rounds: measured 9.5e-5.
        most = 2e-4 if name.startswith("euler") else 1e-5
        assert_same_run(got, expected, f"{steps} steps", most)


def signal_table(cfg, dtype):
    """alpha and sigma by timestep, for the closed forms below."""
    signal = alphas_cumprod(cfg)
    return jnp.asarray(np.sqrt(signal), dtype), jnp.asarray(np.sqrt(1.0 - signal), dtype)


def as_prediction(cfg, denoised, x, alpha, sigma):
    """What a network that believes in `denoised` would predict."""
    noise = (x - alpha * denoised) / sigma
    return noise if cfg.prediction_type == "epsilon" else alpha * noise - sigma * denoised


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["ddim", "ddim with eta", "dpmpp_2m", "euler"])
def test_constant_denoiser_is_sampled_exactly(sampler, prediction_type):
    cfg = ScheduleConfig(**SD, prediction_type=prediction_type, timestep_spacing="leading")
    alphas, sigmas = signal_table(cfg, jnp.float32)
    x, target = jax.random.normal(jax.random.key(0), (2, *SHAPE))

    def predict(x, timestep):
        level = timestep.astype(jnp.int32)  # of leading spacing, whole for every sampler
        return as_prediction(cfg, target, x, alphas[level], sigmas[level])

    run = partial(sample, sampler.split()[0])
    if sampler == "ddim with eta":
        run = partial(run, eta=0.7, keys=jax.random.split(jax.random.key(1), SHAPE[0]))
    for steps in (1, 2, 10):
        got = jax.jit(partial(run, predict, cfg=cfg, steps=steps))(x)
        np.testing.assert_allclose(got, target, rtol=2e-6, atol=2e-6)


def gaussian_error(sampler, prediction_type, steps):
    """Error at timestep 119, and at the end, for data from N(mean, spread^2), started at 999.

    The flow there is known: (x_t - alpha_t mean) / sqrt(alpha_t^2 spread^2 + sigma_t^2) is constant
    along it. In float64, since float32's rounding is larger than the errors of the last runs.
    """
    mean, spread, start, stop = 0.7, 0.5, 999, 119
    cfg = ScheduleConfig(**SD, prediction_type=prediction_type, timestep_spacing="trailing")
    with jax.enable_x64(True):
        alphas, sigmas = signal_table(cfg, jnp.float64)
        x = jnp.linspace(-2.0, 2.0, 9, dtype=jnp.float64)[:, None, None, None]
        passed = {}

        def predict(x, timestep):
            io_callback(lambda x, t: passed.update({int(t): np.asarray(x)}), None, x, timestep)
            alpha, sigma = alphas[timestep], sigmas[timestep]
            variance = alpha**2 * spread**2 + sigma**2
            denoised = mean + spread**2 * alpha / variance * (x - alpha * mean)
            return as_prediction(cfg, denoised, x, alpha, sigma)

        final = np.asarray(sampler(predict, x, cfg, steps))
        jax.effects_barrier()
        alphas, sigmas = np.asarray(alphas), np.asarray(sigmas)
        scale = np.sqrt(alphas**2 * spread**2 + sigmas**2)
        score = (np.asarray(x) - alphas[start] * mean) / scale[start]
        exact = alphas[stop] * mean + score * scale[stop]
    return np.abs(passed[stop] - exact).max(), np.abs(final - (mean + score * spread)).max()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (dpmpp_2m, 2)])
def test_order_of_convergence_on_a_gaussian(sampler, order, prediction_type):
    # Trailing spacing with these numbers of steps starts at 999 and passes 119 every time, with
    # equal strides. Nearer the end no stride that the 1000 timesteps allow is small.
    errors = [gaussian_error(sampler, prediction_type, steps) for steps in (125, 250, 500)]
    middle, final = np.array(errors).T
    rates = np.log2(middle[:-1] / middle[1:])
    assert abs(rates - order).max() < 0.15, rates
    # The last step, to noise level zero, is of first order in both samplers.
    assert abs(np.log2(final[:-1] / final[1:]) - 1.0).max() < 0.3
    assert middle[-1] < {1: 2e-3, 2: 2e-6}[order]


@pytest.mark.parametrize("sampler", ["ddim", "ddim with eta", "dpmpp_2m"])
def test_vmap_equals_separate_runs(sampler):
    cfg = ScheduleConfig(**SD)
    x = jax.random.normal(jax.random.key(0), (3, *SHAPE))
    weights = jnp.array([0.2, 0.5, 0.9])
    keys = jax.random.split(jax.random.key(1), (3, SHAPE[0]))

    def run(x, weight, keys):
        def predict(x, timestep):
            return jnp.tanh(weight * x) + 1e-4 * timestep.astype(x.dtype)

        if sampler == "ddim with eta":
            return ddim(predict, x, cfg, 7, eta=0.5, keys=keys)
        return sample(sampler, predict, x, cfg, 7)

    together = jax.jit(jax.vmap(run))(x, weights, jax.random.clone(keys))
    alone = [jax.jit(run)(x[i], weights[i], keys[i]) for i in range(3)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-5, atol=1e-6)
    assert not np.allclose(together[0], together[1], atol=0.1)


def test_guidance_is_one_call_and_extrapolates():
    calls = []
    context = jnp.concatenate([jnp.full((2, 1, 1, 1), -1.0), jnp.full((2, 1, 1, 1), 2.0)])

    def predict(x, timestep):
        calls.append(x.shape)
        return x * context

    x = jax.random.normal(jax.random.key(0), SHAPE)
    timestep = jnp.int32(3)
    got = guided(predict, 7.5)(x, timestep)
    assert calls == [(4, *SHAPE[1:])]
    np.testing.assert_allclose(got, -x + 7.5 * (2.0 * x + x), rtol=1e-6)
    np.testing.assert_allclose(guided(predict, 1.0)(x, timestep), 2.0 * x, rtol=1e-6)
    np.testing.assert_allclose(guided(predict, 0.0)(x, timestep), -x, rtol=1e-6)
    # The scale may also be an array, so that changing it compiles nothing again.
    cfg = ScheduleConfig(**SD)
    run = jax.jit(lambda scale: ddim(guided(predict, scale), x, cfg, 3))
    expected = ddim(guided(predict, 4.0), x, cfg, 3)
    np.testing.assert_allclose(run(jnp.float32(4.0)), expected, rtol=1e-5)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaled_guidance_agrees_with_diffusers(rescale):
    module = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
    x = jax.random.normal(jax.random.key(0), SHAPE)
    both = jax.random.normal(jax.random.key(1), (2 * SHAPE[0], *SHAPE[1:]))
    got = guided(lambda x, timestep: both, 7.5, rescale)(x, jnp.int32(3))
    off, on = torch.tensor(np.asarray(both)).chunk(2)
    expected = module.rescale_noise_cfg(off + 7.5 * (on - off), on, guidance_rescale=rescale)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_guidance_between_two_timesteps_includes_its_ends():
    cfg = ScheduleConfig(**SD)
    guided_, plain = (lambda x, timestep: x + 10.0), (lambda x, timestep: x)
    predict = jax.jit(guided_between(guided_, plain, (0.2, 0.9), cfg))
    got = [float(predict(jnp.zeros(()), jnp.int32(t))) for t in (0, 199, 200, 900, 901, 999)]
    assert got == [0, 0, 10, 10, 0, 0]


def assert_unrelated(noise):
    """No block of the noise occurs twice. (A few equal float32 values are chance.)"""
    assert len(np.unique(noise)) > noise.size - 5


def test_an_image_depends_on_its_seed_and_number_only():
    shape = (5, 3, 4)  # no multiple of a vector register, so that remainders are computed, too
    whole, whole_keys = initial_noise(7, jnp.arange(6), shape)
    assert whole.shape == (6, *shape)
    assert whole.dtype == jnp.float32
    for batch in ([5], [4, 2, 0, 0]):
        latents, keys = initial_noise(7, jnp.array(batch), shape)
        np.testing.assert_array_equal(latents, np.asarray(whole)[batch])
        key_data = np.asarray(jax.random.key_data(whole_keys))
        np.testing.assert_array_equal(jax.random.key_data(keys), key_data[batch])
    other, _ = initial_noise(8, jnp.arange(6), shape)
    assert_unrelated(np.concatenate([whole, other]))


def test_fresh_noise_depends_on_the_image_only():
    cfg = ScheduleConfig(**SD)

    @jax.jit
    def run(indices):
        x, keys = initial_noise(0, indices, SHAPE[1:])
        return ddim(lambda x, timestep: 0.5 * x, x, cfg, 5, eta=1.0, keys=keys)

    whole = np.asarray(run(jnp.arange(3)))
    np.testing.assert_array_equal(run(jnp.array([2, 0])), whole[[2, 0]])
    assert not np.allclose(whole[0], whole[1], atol=0.1)


def test_the_fresh_noise_is_not_the_initial_noise():
    x, keys = initial_noise(0, jnp.arange(2), SHAPE[1:])
    assert_unrelated(np.concatenate([np.asarray(x)[None], step_noise(keys, 37)]))


def test_programs_offer_all_samplers():
    assert tuple(SAMPLERS) == SCHEDULERS


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bad_arguments_are_refused(sampler):
    cfg = ScheduleConfig(**SD)
    x = jnp.zeros(SHAPE)

    def predict(x, timestep):
        raise AssertionError("the network ran")

    for steps in (0, 1001):
        with pytest.raises(ValueError, match=rf"between 1 and \d+ sampling steps.*{steps}"):
            sample(sampler, predict, x, cfg, steps)
    with pytest.raises(ValueError, match="expected float32 latents.*bfloat16"):
        sample(sampler, predict, x.astype(jnp.bfloat16), cfg, 5)


def test_bad_eta_and_keys_are_refused():
    cfg = ScheduleConfig(**SD)
    x = jnp.zeros(SHAPE)
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="eta between 0 and 1"):
            ddim(lambda x, t: x, x, cfg, 5, eta=eta)
    for name in ("euler", "lcm"):
        with pytest.raises(ValueError, match=f"'{name}' has no eta"):
            sample(name, lambda x, t: x, x, cfg, 5, eta=0.5)
    with pytest.raises(ValueError, match="one random key per image.*none"):
        ddim(lambda x, t: x, x, cfg, 5, eta=0.5)
    with pytest.raises(ValueError, match="one random key per image.*none"):
        sample("euler_ancestral", lambda x, t: x, x, cfg, 5)
    with pytest.raises(ValueError, match="one random key per image.*shape"):
        ddim(lambda x, t: x, x, cfg, 5, eta=0.5, keys=jax.random.split(jax.random.key(0), 3))
