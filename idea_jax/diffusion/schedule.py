"""The noise schedule: betas, noising, the conversions between predictions, and sampling timesteps.

A variance-preserving process, `x_t = alpha_t * x_0 + sigma_t * noise` with
`alpha_t^2 = alphas_cumprod[t]` and `sigma_t^2 = 1 - alphas_cumprod[t]`. Constants are computed in
numpy float64 and cast once, where they meet the latents.
"""

from dataclasses import MISSING, dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.errors import InputError

SPACINGS = ("leading", "trailing", "linspace")

# The schedulers of diffusers whose files are read. First those whose steps a sampler here takes
# (`samplers.SAMPLERS`), then the others.
_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "LCMScheduler": "lcm",
}
_OTHERS = tuple(
    f"{name}Scheduler"
    for name in (
        "DDIMInverse",
        "DDPM",
        "DDPMParallel",
        "PNDM",
        "LMSDiscrete",
        "HeunDiscrete",
        "KDPM2Discrete",
        "KDPM2AncestralDiscrete",
        "DPMSolverMultistepInverse",
        "DPMSolverSinglestep",
        "DPMSolverSDE",
        "DEISMultistep",
        "RePaint",
        "SASolver",
        "TCD",
        "UniPCMultistep",
    )
)
_OTHERWISE = "ddim"  # the sampler in their place

# What a scheduler_config.json may say beside the fields of ScheduleConfig, as diffusers' schedulers
# for Stable Diffusion save it. First the keys that would change the noise levels, the sampling
# times or the meaning of the prediction, with the values that leave them as they are here.
_SUPPORTED_VALUES = {
    "_class_name": (*_SAMPLERS, *_OTHERS),
    "beta_schedule": ("scaled_linear", "linear"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": (None, *SPACINGS),
    "trained_betas": (None,),
    # A learned variance is predicted by channels that no network here has.
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "timestep_type": (None, "discrete"),
    "use_flow_sigmas": (None, False),
}

# Then the settings of diffusers' solvers, which the caller replaces by naming a sampler of ours,
# with the values that mean nothing there either; `notices` names the others.
_SOLVER_SETTINGS: dict[str, tuple] = {
    # Clipping to [-1, 1] is for pixels; diffusers' Stable Diffusion pipelines turn it off, too.
    "clip_sample": (False,),
    "thresholding": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (),
    "sigma_min": (),
    "sigma_max": (),
    "lambda_min_clipped": (float("-inf"),),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
}

# With what DPMSolverMultistep takes other steps than `dpmpp_2m`, and the values that do not.
_DPM_SOLVER = {
    "algorithm_type": (None, "dpmsolver++"),
    "solver_order": (None, 2),
    "solver_type": (None, "midpoint"),
}

# Last what only describes, chooses among solvers or belongs to features that are off.
_HARMLESS_KEYS = frozenset(
    {
        "_diffusers_version",
        "algorithm_type",
        "clip_sample_range",
        "corrector_order",
        "disable_corrector",
        "dynamic_thresholding_ratio",
        "eta",
        "euler_at_final",
        "flow_shift",
        "lower_order_final",
        "noise_sampler_seed",
        "predict_x0",
        "predictor_order",
        "sample_max_value",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "tau_func",
        "time_shift_type",
    }
)

# diffusers' pipelines of Stable Diffusion 1.x and 2.x set it, whatever the file says; that of SDXL
# believes the file, and its schedulers take none where there is none.
_STEPS_OFFSET, _NO_OFFSET = 1, 0


class ScheduleError(InputError, ValueError):
    """A noise schedule or a number of sampling steps that is not supported."""


@dataclass(frozen=True)
class ScheduleConfig:
    """The noise schedule that a checkpoint was trained with; field names as in diffusers.

    Attributes:
      set_alpha_to_one: whether DDIM's last step goes to alpha 1, or stops at that of timestep 0.
      steps_offset: added to the timesteps of "leading" spacing.
      timestep_spacing: None where the checkpoint does not say; each sampler then has the default
        of diffusers' scheduler.
      rescale_betas_zero_snr: whether the last timestep is noise alone, with no trace of a picture.
      use_karras_sigmas: whether noise levels are spaced as in arXiv 2206.00364, by the samplers
        that can.
      sampler: the one of `samplers.SAMPLERS` that takes the steps of the checkpoint's own
        scheduler, or DDIM if none does.
      original_inference_steps, timestep_scaling: of a consistency model, for LCM alone: how many
        timesteps it was distilled for, and how fast its boundary condition fades.
    """

    beta_start: float
    beta_end: float
    beta_schedule: str
    num_train_timesteps: int = 1000
    prediction_type: str = "epsilon"
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    timestep_spacing: str | None = None
    rescale_betas_zero_snr: bool = False
    use_karras_sigmas: bool = False
    sampler: str = _OTHERWISE
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __post_init__(self):
        problems = _problems({field.name: getattr(self, field.name) for field in fields(self)})
        if problems:
            raise ScheduleError("noise schedule: " + "; ".join(problems))

    @classmethod
    def from_dict(
        cls, values: dict, where: str, *, believes_offset: bool = False
    ) -> "ScheduleConfig":
        """Reads the contents of a `scheduler_config.json`; `where` names it in the error.

        Args:
          believes_offset: whether `steps_offset` is that of the file (SDXL), or the one that fits.

        Raises:
          ScheduleError: a value that this code does not implement, a key it does not know, or a
            missing key; the message lists all of them.
        """
        known = _known()
        accepted = known | set(_SUPPORTED_VALUES) | set(_SOLVER_SETTINGS) | _HARMLESS_KEYS
        problems = [
            f"{field.name} is missing"
            for field in fields(cls)
            if field.default is MISSING and field.name not in values
        ]
        problems += _problems(values)
        # An unknown key that says nothing switches nothing on; `notices` names it.
        unknown = sorted(key for key in set(values) - accepted if values[key] is not None)
        problems += [f"unknown key {key!r} (value {values[key]!r})" for key in unknown]
        if problems:
            raise ScheduleError(f"{where}: unsupported noise schedule: " + "; ".join(problems))
        own = {key: values[key] for key in known if values.get(key) is not None}
        offset = values.get("steps_offset", _NO_OFFSET) if believes_offset else _STEPS_OFFSET
        return cls(**{**own, "steps_offset": offset, "sampler": _sampler_of(values)})

    def to_dict(self) -> dict:
        """The contents of a `scheduler_config.json` that diffusers and `from_dict` read."""
        values = {key: getattr(self, key) for key in sorted(_known())}
        # An absent timestep_spacing lets each sampler take its own default, and not every scheduler
        # of diffusers knows what is switched off.
        for key in ("timestep_spacing", "rescale_betas_zero_snr", "use_karras_sigmas"):
            if not values[key]:
                del values[key]
        if self.sampler != "lcm":
            del values["original_inference_steps"], values["timestep_scaling"]
        name = next(name for name, sampler in _SAMPLERS.items() if sampler == self.sampler)
        return values | {"_class_name": name, "clip_sample": False}


def _known() -> set[str]:
    """The keys of a `scheduler_config.json` that are fields of `ScheduleConfig`."""
    return {field.name for field in fields(ScheduleConfig)} - {"sampler"}


def _sampler_of(values: dict) -> str:
    """The sampler that takes the steps of the scheduler that a file names, or DDIM."""
    sampler = _SAMPLERS.get(values.get("_class_name", ""), _OTHERWISE)
    if sampler == "dpmpp_2m":
        alike = all(values.get(key) in same for key, same in _DPM_SOLVER.items())
        return sampler if alike else _OTHERWISE
    return sampler


def notices(values: dict, *, believes_offset: bool = False) -> list[str]:
    """What of a `scheduler_config.json` that `ScheduleConfig.from_dict` reads is not as it says."""
    found = []
    offset = values.get("steps_offset", _STEPS_OFFSET)
    if offset != _STEPS_OFFSET and not believes_offset:
        found.append(
            f"steps_offset is {offset}, of an old conversion; {_STEPS_OFFSET} is used, as by "
            "diffusers"
        )
    unused = [
        f"{key} = {values[key]!r}"
        for key, nothing in _SOLVER_SETTINGS.items()
        if values.get(key) not in (None, *nothing)
    ]
    if unused:
        found.append(f"settings of a solver that is not used here: {', '.join(unused)}")
    known = _known() | set(_SUPPORTED_VALUES)
    null = set(values) - known - set(_SOLVER_SETTINGS) - _HARMLESS_KEYS
    found += [f"unknown key {key!r}, which is null, is ignored" for key in sorted(null)]
    return found


def _problems(values: dict) -> list[str]:
    """One message for each value that is not supported; absent keys are no problem here."""

    def is_int(value):
        return isinstance(value, int) and not isinstance(value, bool)

    problems = []
    for key, supported in _SUPPORTED_VALUES.items():
        if key in values and values[key] not in supported:
            expected = " or ".join(repr(value) for value in supported)
            problems.append(f"{key} is {values[key]!r}, expected {expected}")
    for key in ("beta_start", "beta_end"):
        value = values.get(key, 0.5)
        if not isinstance(value, float) or not 0.0 < value < 1.0:
            problems.append(f"{key} is {value!r}, expected a number between 0 and 1")
    whole = {"num_train_timesteps": 1, "steps_offset": 0, "original_inference_steps": 1}
    for key, smallest in whole.items():
        value = values.get(key, smallest)
        if not is_int(value) or value < smallest:
            problems.append(f"{key} is {value!r}, expected an integer of at least {smallest}")
    scaling = values.get("timestep_scaling", 1.0)
    if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not scaling > 0:
        problems.append(f"timestep_scaling is {scaling!r}, expected a number above 0")
    for key in ("set_alpha_to_one", "rescale_betas_zero_snr", "use_karras_sigmas"):
        value = values.get(key, False)
        if not isinstance(value, bool) and not (value is None and key != "set_alpha_to_one"):
            problems.append(f"{key} is {value!r}, expected a boolean")
    if values.get("rescale_betas_zero_snr") and values.get("prediction_type") != "v_prediction":
        problems.append(
            "rescale_betas_zero_snr is True, where noise alone says nothing of a picture, and "
            f"prediction_type is {values.get('prediction_type', 'epsilon')!r}, expected "
            "'v_prediction'"
        )
    return problems


def alphas_cumprod(cfg: ScheduleConfig) -> np.ndarray:
    """Returns float64[num_train_timesteps], decreasing: the squared signal level per timestep.

    diffusers rounds its betas to float32; on Stable Diffusion's schedule its values differ from
    these by at most 1e-6 relative. With `rescale_betas_zero_snr` the last value is zero, and the
    square roots of the others are moved down with it, but for the first (arXiv 2305.08891,
    algorithm 1).
    """
    if cfg.beta_schedule == "scaled_linear":
        betas = np.linspace(cfg.beta_start**0.5, cfg.beta_end**0.5, cfg.num_train_timesteps) ** 2
    else:
        betas = np.linspace(cfg.beta_start, cfg.beta_end, cfg.num_train_timesteps)
    signal = np.cumprod(1.0 - betas)
    if cfg.rescale_betas_zero_snr:
        roots = np.sqrt(signal)
        signal = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    return signal


def add_noise(
    cfg: ScheduleConfig, latents: jax.Array, noise: jax.Array, timesteps: jax.Array
) -> jax.Array:
    """Returns the noised latents, float32 of the shape of `latents`.

    Args:
      latents, noise: float32[B, ...].
      timesteps: int32[B] in 0 .. num_train_timesteps - 1.

    Raises:
      ValueError: the three shapes do not fit together.

    Source: arXiv 2006.11239, eq. 4.
    """
    alpha, sigma = _levels(cfg, latents, noise, timesteps)
    return alpha * latents + sigma * noise


def training_target(
    cfg: ScheduleConfig, latents: jax.Array, noise: jax.Array, timesteps: jax.Array
) -> jax.Array:
    """Returns what the network should predict: the noise, or v for "v_prediction".

    Arguments and errors as for `add_noise`. Source: arXiv 2202.00512, appendix D (v).
    """
    alpha, sigma = _levels(cfg, latents, noise, timesteps)
    return noise if cfg.prediction_type == "epsilon" else alpha * noise - sigma * latents


def denoised_and_noise(
    prediction_type: str,
    prediction: jax.Array,
    x: jax.Array,
    alpha: jax.Array,
    sigma: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Splits `x = alpha * denoised + sigma * noise` by the network's prediction at that level.

    `alpha` and `sigma` are scalars, or of the rank of `x`; alpha**2 + sigma**2 = 1.
    """
    if prediction_type == "epsilon":
        return (x - sigma * prediction) / alpha, prediction
    return alpha * x - sigma * prediction, alpha * prediction + sigma * x


def inference_timesteps(
    cfg: ScheduleConfig, steps: int, spacing: str, *, drop_lowest: bool = False
) -> np.ndarray:
    """Returns timesteps for a sampler to visit: int32[steps], strictly decreasing.

    Args:
      steps: 1 .. num_train_timesteps.
      spacing: "leading", "trailing" or "linspace".
      drop_lowest: whether "leading" and "linspace" lay out one timestep more and drop the lowest,
        as the DPM-Solvers of diffusers do; "trailing" is the same for every sampler.

    Raises:
      ScheduleError: an unknown spacing, or a number of steps that has no timesteps.

    Source: arXiv 2305.08891, table 2, with the rounding of diffusers.
    """
    total = cfg.num_train_timesteps
    if spacing not in SPACINGS:
        raise ScheduleError(f"unknown timestep spacing {spacing!r}, expected one of {SPACINGS}")
    if not 1 <= steps <= total:
        raise ScheduleError(
            f"expected between 1 and {total} sampling steps (the timesteps that the checkpoint "
            f"was trained with), got {steps}"
        )
    points = steps + 1 if drop_lowest else steps
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, points).round()[::-1][:steps]
    elif spacing == "leading":
        timesteps = np.arange(points)[::-1][:steps] * (total // points) + cfg.steps_offset
    else:
        # For some numbers of steps (61 of 1000) rounding makes arange return one value too many.
        timesteps = np.round(np.arange(total, 0, -total / steps))[:steps] - 1
    timesteps = timesteps.astype(np.int32)
    if timesteps[0] >= total or (np.diff(timesteps) >= 0).any():
        raise ScheduleError(
            f"{spacing!r} spacing with steps_offset {cfg.steps_offset} has no {steps} different "
            f"timesteps below {total} for this sampler; take fewer steps"
        )
    return timesteps


def _levels(cfg, latents, noise, timesteps):
    """alpha and sigma at `timesteps`, shaped to multiply `latents`."""
    if noise.shape != latents.shape or timesteps.shape != latents.shape[:1]:
        raise ValueError(
            "expected noise of the shape of the latents and one timestep for each of them, got "
            f"latents {latents.shape}, noise {noise.shape}, timesteps {timesteps.shape}"
        )
    signal = alphas_cumprod(cfg)
    shape = timesteps.shape + (1,) * (latents.ndim - 1)
    alpha = jnp.asarray(np.sqrt(signal), jnp.float32)[timesteps]
    sigma = jnp.asarray(np.sqrt(1.0 - signal), jnp.float32)[timesteps]
    return alpha.reshape(shape), sigma.reshape(shape)
