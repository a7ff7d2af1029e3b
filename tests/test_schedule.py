"""The noise schedule against diffusers, and what it refuses."""

import dataclasses
import inspect
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from idea_jax.diffusion import schedule
from idea_jax.diffusion.schedule import (
    SPACINGS,
    ScheduleConfig,
    ScheduleError,
    add_noise,
    alphas_cumprod,
    denoised_and_noise,
    inference_timesteps,
    training_target,
)
from idea_jax.models import sd

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}

# The scheduler_config.json of the published Stable Diffusion 1.5 and 2.1 checkpoints.
SD_1_FILE = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
    **SD,
}
SD_2_FILE = {**SD_1_FILE, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}

# Every scheduler of diffusers for a schedule of betas; of the others there is nothing to read.
SCHEDULERS = {name: getattr(diffusers, name) for name in dir(diffusers) if "Scheduler" in name}
SCHEDULERS = {
    name: scheduler
    for name, scheduler in SCHEDULERS.items()
    if "beta_start" in inspect.signature(scheduler.__init__).parameters
}
# Their noise levels are shifted.
REFUSED = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
# What an option of a solver may be set to; the solver is not used here.
OF_SOLVERS = {
    "use_exponential_sigmas": True,
    "use_beta_sigmas": True,
    "use_lu_lambdas": True,
    "clip_sample": True,
    "thresholding": True,
    "final_sigmas_type": "sigma_min",
    "lambda_min_clipped": -5.1,
    "sigma_min": 0.1,
    "sigma_max": 10.0,
    "euler_at_final": True,
    "solver_order": 3,
    "algorithm_type": "sde-dpmsolver++",
    "lower_order_final": False,
    "solver_type": "heun",
    "interpolation_type": "log_linear",
    "eta": 0.3,
}


@pytest.fixture(autouse=True)
def _strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("betas", [SD, LINEAR])
def test_alphas_cumprod_agrees_with_diffusers(betas):
    expected = diffusers.DDIMScheduler(**betas).alphas_cumprod.double().numpy()
    # Measured: 9.3e-7 (scaled_linear) and 3.6e-7 (linear), diffusers' float32 betas.
    np.testing.assert_allclose(alphas_cumprod(ScheduleConfig(**betas)), expected, rtol=2e-6)


@pytest.mark.parametrize("betas", [SD, LINEAR])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_target_agree_with_diffusers(betas, prediction_type):
    cfg = ScheduleConfig(**betas, prediction_type=prediction_type)
    latents, noise = normal(0, 6, 4, 3, 2), normal(1, 6, 4, 3, 2)
    timesteps = jnp.array([0, 1, 37, 500, 998, 999], jnp.int32)
    noisy = jax.jit(add_noise, static_argnums=0)(cfg, latents, noise, timesteps)
    target = training_target(cfg, latents, noise, timesteps)

    reference = diffusers.DDPMScheduler(**betas)
    tensors = [torch.tensor(np.asarray(array)) for array in (latents, noise, timesteps)]
    expected = reference.add_noise(tensors[0], tensors[1], tensors[2].long())
    np.testing.assert_allclose(noisy, expected, rtol=1e-5, atol=1e-5)
    if prediction_type == "v_prediction":
        expected = reference.get_velocity(tensors[0], tensors[1], tensors[2].long())
    else:
        expected = tensors[1]
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-5)
    assert noisy.dtype == target.dtype == jnp.float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_denoised_and_noise_inverts_the_training_target(prediction_type):
    cfg = ScheduleConfig(**SD, prediction_type=prediction_type)
    latents, noise = normal(0, 3, 4, 4, 2), normal(1, 3, 4, 4, 2)
    for timestep in (0, 400, 999):
        timesteps = jnp.full(3, timestep, jnp.int32)
        x = add_noise(cfg, latents, noise, timesteps)
        prediction = training_target(cfg, latents, noise, timesteps)
        signal = alphas_cumprod(cfg)[timestep]
        alpha, sigma = jnp.float32(signal**0.5), jnp.float32((1 - signal) ** 0.5)
        found = denoised_and_noise(prediction_type, prediction, x, alpha, sigma)
        # Dividing by alpha (0.068 at the last timestep) magnifies rounding.
        np.testing.assert_allclose(found[0], latents, atol=1e-5)
        np.testing.assert_allclose(found[1], noise, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    cfg = ScheduleConfig(**SD)
    x = jnp.zeros((2, 4, 4, 4))
    with pytest.raises(ValueError, match="one timestep for each"):
        add_noise(cfg, x, x, jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="noise of the shape"):
        training_target(cfg, x, x[:1], jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_agree_with_diffusers(spacing, offset):
    cfg = ScheduleConfig(**SD, steps_offset=offset, timestep_spacing=spacing)
    settings = {**SD, "steps_offset": offset, "timestep_spacing": spacing}
    references = {
        False: diffusers.DDIMScheduler(**settings),
        True: diffusers.DPMSolverMultistepScheduler(**settings),
    }
    for steps in (*range(1, 61), 75, 96, 100, 250, 333, 499, 500, 501, 900):
        for drop_lowest, reference in references.items():
            reference.set_timesteps(steps)
            expected = reference.timesteps.numpy()
            if spacing == "trailing" and len(expected) == steps + 1:
                assert expected[-1] == -1  # diffusers' rounding, which is not reproduced
                expected = expected[:-1]
            got = inference_timesteps(cfg, steps, spacing, drop_lowest=drop_lowest)
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, expected, err_msg=f"{steps} {drop_lowest}")


def test_every_number_of_steps_has_timesteps_or_is_refused():
    cfg = ScheduleConfig(**SD, num_train_timesteps=60, steps_offset=1)
    refused = {}
    for spacing in SPACINGS:
        for drop_lowest in (False, True):
            for steps in range(1, 61):
                try:
                    timesteps = inference_timesteps(cfg, steps, spacing, drop_lowest=drop_lowest)
                except ScheduleError as error:
                    assert "take fewer steps" in str(error)
                    refused.setdefault((spacing, drop_lowest), []).append(steps)
                else:
                    assert timesteps.shape == (steps,)
                    assert (np.diff(timesteps) < 0).all()
                    assert timesteps[0] < 60
                    assert timesteps[-1] >= 0
    assert refused == {
        ("leading", False): [60],  # timestep 60 does not exist
        ("leading", True): [59, 60],
        ("linspace", True): [60],  # 61 different timesteps do not exist
    }


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(ScheduleError, match=f"between 1 and 1000 sampling steps.*got {steps}"):
        inference_timesteps(ScheduleConfig(**SD), steps, "leading")


def test_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="'karras'"):
        inference_timesteps(ScheduleConfig(**SD), 10, "karras")


def test_published_files_are_read():
    common = {**SD, "set_alpha_to_one": False, "steps_offset": 1}
    assert ScheduleConfig.from_dict(SD_1_FILE, "f") == ScheduleConfig(**common)
    expected = ScheduleConfig(**common, prediction_type="v_prediction")
    assert ScheduleConfig.from_dict(SD_2_FILE, "f") == expected
    spaced = ScheduleConfig.from_dict({**SD_1_FILE, "timestep_spacing": "trailing"}, "f")
    assert spaced.timestep_spacing == "trailing"


def test_diffusers_has_the_schedulers_that_these_tests_are_about():
    assert len(SCHEDULERS) >= 23


@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - set(REFUSED)))
def test_the_file_of_every_scheduler_is_read(name, tmp_path):
    accepts = inspect.signature(SCHEDULERS[name].__init__).parameters
    scheduler = SCHEDULERS[name].from_config({**SD_2_FILE, "timestep_spacing": "trailing"})
    scheduler.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert values["_class_name"] == name
    cfg = ScheduleConfig.from_dict(values, "f")
    # Files keep what another class had said, too.
    assert (cfg.prediction_type, cfg.timestep_spacing) == ("v_prediction", "trailing")
    assert cfg.steps_offset == 1
    # Whatever the solver is told, the numbers here are the same, and the notice has its name.
    for option in set(OF_SOLVERS) & set(accepts):
        told = {**values, option: OF_SOLVERS[option]}
        found = ScheduleConfig.from_dict(told, "f")
        # DPM-Solvers of another kind are not the sampler of ours.
        assert dataclasses.replace(found, sampler=cfg.sampler) == cfg
        assert found.sampler in (cfg.sampler, "ddim")
    loud = {k: True for k in OF_SOLVERS if k in accepts and k.startswith("use_")}
    if loud:
        (notice,) = schedule.notices({**values, **loud})
        assert all(f"{key} = True" in notice for key in loud)


@pytest.mark.parametrize("name", REFUSED)
def test_a_scheduler_of_other_noise_levels_is_refused(name, tmp_path):
    SCHEDULERS[name].from_config(SD_2_FILE).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "scheduler_config.json").read_text())
    with pytest.raises(ScheduleError, match=rf"{name}.*\n?.*snr_shift_scale"):
        ScheduleConfig.from_dict(values, "f")


def test_an_old_steps_offset_is_corrected_as_in_diffusers():
    """diffusers' pipelines of Stable Diffusion set 1, whatever the file says."""
    for old in ({"steps_offset": 0}, {}):
        values = {**{k: v for k, v in SD_1_FILE.items() if k != "steps_offset"}, **old}
        assert ScheduleConfig.from_dict(values, "f").steps_offset == 1
        assert len(schedule.notices(values)) == len(old)
        # That of SDXL believes the file.
        believed = ScheduleConfig.from_dict(values, "f", believes_offset=True)
        assert believed.steps_offset == 0
        assert schedule.notices(values, believes_offset=True) == []
    assert schedule.notices(SD_1_FILE) == []


def test_an_unknown_key_that_is_null_is_named_and_ignored():
    values = {**SD_1_FILE, "a_new_key": None}
    assert ScheduleConfig.from_dict(values, "f") == ScheduleConfig.from_dict(SD_1_FILE, "f")
    (notice,) = schedule.notices(values)
    assert "'a_new_key'" in notice


def test_unsupported_values_are_refused_all_at_once():
    bad = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "sample",
        "timestep_spacing": "karras",
        "trained_betas": [0.1, 0.2],
        "rescale_betas_zero_snr": "yes",
        "use_karras_sigmas": 1,
        "original_inference_steps": 0,
        "timestep_scaling": -1.0,
        "variance_type": "learned_range",
        "timestep_type": "continuous",
        "use_flow_sigmas": True,
        "num_train_timesteps": 0,
        "steps_offset": "one",
        "set_alpha_to_one": "yes",
        "beta_end": 12,
        "a_new_key": 3,
    }
    values = {key: value for key, value in {**SD_1_FILE, **bad}.items() if key != "beta_start"}
    with pytest.raises(ScheduleError, match="model/scheduler_config.json") as error:
        ScheduleConfig.from_dict(values, "model/scheduler_config.json")
    message = str(error.value)
    assert "beta_start is missing" in message
    assert "unknown key 'a_new_key' (value 3)" in message
    for key, value in bad.items():
        if key != "a_new_key":
            assert f"{key} is {value!r}, expected" in message
    assert "skip_prk_steps" not in message


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("DDIMScheduler", "ddim"),
        ("PNDMScheduler", "ddim"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("LCMScheduler", "lcm"),
    ],
)
def test_the_checkpoint_chooses_the_sampler(name, sampler, tmp_path):
    """And what is written of it is read as the same, here and by diffusers."""
    own = {"use_karras_sigmas": True, "timestep_spacing": "trailing"}
    own |= {"original_inference_steps": 40, "timestep_scaling": 3.0}
    own = {k: v for k, v in own.items() if k in inspect.signature(SCHEDULERS[name]).parameters}
    cfg = ScheduleConfig.from_dict({**SD_2_FILE, **own, "_class_name": name}, "f")
    assert cfg.sampler == sampler
    assert {key: getattr(cfg, key) for key in own} == own
    written = cfg.to_dict()
    assert ScheduleConfig.from_dict(written, "f") == cfg
    (tmp_path / "scheduler_config.json").write_text(json.dumps(written))
    theirs = SCHEDULERS[written["_class_name"]].from_pretrained(tmp_path).config
    assert {key: theirs[key] for key in own} == own


def test_without_signal_at_the_end_levels_agree_with_diffusers():
    said = {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    signal = alphas_cumprod(ScheduleConfig.from_dict(said, "f"))
    assert signal[-1] == 0
    expected = diffusers.DDIMScheduler(**said).alphas_cumprod.double().numpy()
    np.testing.assert_allclose(signal, expected, rtol=1e-5, atol=1e-7)
    with pytest.raises(ScheduleError, match="'epsilon', expected 'v_prediction'"):
        ScheduleConfig.from_dict({**said, "prediction_type": "epsilon"}, "f")


def test_a_config_made_by_hand_is_checked_too():
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        ScheduleConfig(**SD, prediction_type="sample")


def test_what_the_unet_predicts_is_said_before_a_schedule_is_looked_at(
    smallest_checkpoint, tmp_path
):
    """A schedule down to no signal needs v, which the file may leave to whoever uses it."""
    shutil.copytree(smallest_checkpoint, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rescale_betas_zero_snr": True}))
    with pytest.raises(ScheduleError, match="expected 'v_prediction'"):
        sd.read_configs(tmp_path / "model", prediction_type="epsilon")
    found = sd.read_configs(tmp_path / "model", prediction_type="v_prediction").schedule
    assert found.rescale_betas_zero_snr and found.prediction_type == "v_prediction"
