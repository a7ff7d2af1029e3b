"""How long a card takes: computed from shapes, at a speed that is known of a device or measured."""

import functools
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from idea_jax import costs
from idea_jax.card.people import Invited
from idea_jax.card.settings import REST, CardConfig
from idea_jax.config.settings import COMPUTE_DTYPES, ENHANCER_DEFAULTS, TrainConfig
from idea_jax.data import text
from idea_jax.enhancer.settings import EnhancerTrainConfig, PrepareConfig
from idea_jax.evaluation import compare
from idea_jax.evaluation.run import Ready
from idea_jax.evaluation.settings import EvaluateConfig
from idea_jax.models import sd
from idea_jax.plan import report
from idea_jax.plan.settings import PlanConfig
from idea_jax.plan.work import JOBS, PUBLISHED
from idea_jax.runtime import chips
from idea_jax.runtime.chips import Chip
from idea_jax.sampling import engine, programs

log = logging.getLogger(__name__)

# Of the text encoders of what was published.
WIDTHS = {(768,): "sd15", (1024,): "sd21", (768, 1280): "sdxl"}
UTILISATION = PlanConfig.utilisation  # its default
STEPS = 2  # of the drawing that is timed


class Stage(NamedTuple):
    """A part of a card.

    Attributes:
      name: for people.
      seconds: that it takes; None: not known.
      fits: whether the memory of a device is enough; None: not known.
    """

    name: str
    seconds: float | None
    fits: bool | None = None


@dataclass(frozen=True)
class Speed:
    """The devices of this process, and how fast they are.

    Attributes:
      rate: FLOP/s of a device, where nothing is known of the chip; else None.
    """

    chip: Chip
    count: int
    rate: float | None

    @property
    def words(self) -> str:
        """How the seconds of a forecast came about."""
        if self.rate is None:
            return f"{self.count} x {self.chip.name}, at {UTILISATION:g} of the peak, an assumption"
        return f"{self.count} x {self.chip.name}, by a drawing of {STEPS} steps that was timed"


def speed_of(cfg: CardConfig, model: sd.StableDiffusion) -> Speed:
    """The speed of the devices that are here; of a chip that is in no table it is measured."""
    device = jax.local_devices()[0]
    chip = chips.of_device(device)
    # Devices of a CPU share its cores.
    count = 1 if chip.platform == "cpu" else jax.local_device_count()
    if chip.peak(COMPUTE_DTYPES[cfg.mixed_precision]):
        return Speed(chip, count, None)
    log.info("a short drawing is timed, to say how long the card takes")
    return Speed(chip, count, measured(model, 1 if chip.platform == "cpu" else cfg.batch_size))


def measured(model: sd.StableDiffusion, size: int) -> float:
    """FLOP/s that a device reaches in a drawing of `size` pictures, with weights of zero."""
    mesh = engine.mesh_of(jax.local_devices()[:1])
    side = model.unet.sample_size * model.vae.downscale
    how = programs.Sampling((side, side), "ddim", STEPS)
    shapes = engine.call_shapes(model, engine.Kind(how, 1, True), size, mesh)
    given = jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), shapes
    )

    def draw(*given):
        return programs.draw_everywhere(mesh, model, *given, how)

    flops = costs.needed(draw, *shapes)
    draw(*given).block_until_ready()
    began = time.perf_counter()
    draw(*given).block_until_ready()
    return flops / (time.perf_counter() - began)


@functools.lru_cache(maxsize=32)  # methods draw alike, and tracing takes seconds
def cost(plan: PlanConfig, chip: Chip, count: int, rate: float | None) -> tuple[float, bool | None]:
    """Seconds of a job, and whether it fits the memory of a device, None if that is not known.

    Args:
      rate: FLOP/s of a device; None to take the chip's.
    """
    job = JOBS[plan.what](plan, chip, count)
    if rate is None:
        seconds = 3600 * report.facts(plan, chip, count, job, None)["hours"]
    else:
        seconds = job.flops * job.calls / rate
    return seconds, report.fits(chip, job, None)


@dataclass(frozen=True)
class Forecast:
    """What is needed to say how long the parts of a card take.

    Attributes:
      checkpoint: its folder, or what stands for one in a single file.
    """

    cfg: CardConfig
    checkpoint: str
    model: sd.StableDiffusion
    speed: Speed

    def stage(self, name: str, what: str, **given) -> Stage:
        """A part that `idea_jax.plan` knows, with settings of `PlanConfig`."""
        chip, count, rate = self.speed.chip, self.speed.count, self.speed.rate
        plan = PlanConfig(
            checkpoint=self.checkpoint,
            what=what,
            device=chip.name,
            mixed_precision=self.cfg.mixed_precision,
            attention="xla" if self.cfg.attention == "xla" else "auto",
            **given,
        )
        seconds, fits = cost(plan, chip, count, rate)
        return Stage(name, seconds, fits)

    def encoding(self, name: str, pictures: int) -> Stage:
        """The autoencoder's view of pictures and their mirrors."""
        side = self.model.unet.sample_size * self.model.vae.downscale
        image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        flops = costs.needed(
            lambda frozen, image: sd.encode_image(self.model, frozen, image),
            sd.shapes(self.model),
            image,
        )
        chip, rate = self.speed.chip, self.speed.rate
        rate = rate or UTILISATION * chip.peak(COMPUTE_DTYPES[self.cfg.mixed_precision])
        return Stage(name, 2 * pictures * flops / (rate * self.speed.count))


def of_enhancer(
    forecast: Forecast, prepare: PrepareConfig, train: EnhancerTrainConfig, invited: Invited
) -> list[Stage]:
    """The parts of preparing and training a shared ID-Enhancer."""
    stages = []
    if forecast.cfg.trains_on == REST:
        people, pictures = invited.rest_people, invited.rest_pictures
        stages.append(forecast.encoding(f"preparing {people} people", pictures))
    else:
        names = len(text.shipped_names())
        pictures = names * prepare.celebrity_pictures
        steps, batch = prepare.celebrity_steps, 8
        name = f"drawing {names} celebrities, {pictures} pictures"
        given = {"people": pictures, "steps": steps, "batch": batch}
        stages.append(forecast.stage(name, "sample", **given))
        stages.append(forecast.encoding("preparing them", pictures))
    if train.max_train_steps:
        name = f"training the ID-Enhancer, {train.max_train_steps} steps"
        given = {"steps": train.max_train_steps, "batch": train.train_batch_size}
        stages.append(forecast.stage(name, "enhancer", **given))
    return stages


def of_comparison(
    forecast: Forecast, cfg: EvaluateConfig, ready: Ready, has_enhancer: bool
) -> list[Stage]:
    """The parts of learning and drawing the test people with each method."""
    stages = []
    people = len(ready.photos[0])
    settings = ready.settings
    for contender in ready.contenders:
        train = compare.train_config(contender, cfg, Path("."), settings["seed"])
        steps = steps_of(train, has_enhancer)
        if steps and compare.trained_alike(contender, ready.contenders) == contender.name:
            given: dict[str, Any] = {
                "people": people,
                "steps": steps,
                "batch": train.train_batch_size,
            }
            given["pictures_per_person"] = forecast.cfg.photos_per_person
            given["kv"] = train.kv
            name = f"learning {people} people, {contender.name}: {steps} steps"
            stages.append(forecast.stage(name, "train", **given))
        own = settings | contender.drawing
        pictures = people * len(ready.prompts) * own["num_images_per_prompt"]
        given = {"people": pictures, "steps": own["num_inference_steps"]}
        given["batch"] = own["batch_size"]
        name = f"drawing {pictures} pictures, {contender.name}"
        stages.append(forecast.stage(name, "sample", **given))
    return stages


def steps_of(train: TrainConfig, has_enhancer: bool) -> int:
    """The steps of each person with a method.

    Args:
      has_enhancer: whether there is, or will be, a shared ID-Enhancer.
    """
    is_shared = has_enhancer and train.profile == "paper" and train.enhancer != "none"
    if is_shared and "max_train_steps" in train.unsaid:
        return ENHANCER_DEFAULTS["max_train_steps"]
    return train.max_train_steps


def planned_as(ready: Ready, model: sd.StableDiffusion) -> str:
    """What `idea_jax.plan` calls the checkpoint."""
    if ready.checkpoint.is_dir():
        return str(ready.checkpoint)
    widths = tuple(text.hidden_size for text in model.encoders)
    return WIDTHS.get(widths, next(iter(PUBLISHED)))


def tell(stages: list[Stage], speed: Speed) -> list[str]:
    """The forecast in lines."""
    lines = [f"how long it takes, with {speed.words}:"]
    for stage in stages:
        said = "not known" if stage.seconds is None else duration(stage.seconds)
        lines.append(
            f"  {said:>9}  {stage.name}"
            + (" (its memory does not fit: see idea-plan)" if stage.fits is False else "")
        )
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    lines.append(f"  {duration(sum(known)):>9}  in all")
    lines.append("compiling, face models and scoring come on top")
    return lines


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def forecast_of(cfg: CardConfig, ready: Ready, model: sd.StableDiffusion) -> Forecast:
    """What the parts of a card are forecast with."""
    return Forecast(cfg, planned_as(ready, model), model, speed_of(cfg, model))
