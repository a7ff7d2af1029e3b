"""Learning people for a server: as `idea-train` does, a few steps at a time."""

import dataclasses
import logging
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from idea_jax import jobs
from idea_jax.config import reading
from idea_jax.config.settings import ConfigError, TrainConfig
from idea_jax.data import people
from idea_jax.data.tokenizer import Tokenizer
from idea_jax.faces.portraits import Portraits
from idea_jax.formats import enhancer as enhancers
from idea_jax.formats.identity import Identity
from idea_jax.method import condition
from idea_jax.models import hub, sd
from idea_jax.runtime import devices
from idea_jax.runtime.files import atomic_write, write_json
from idea_jax.sampling import programs
from idea_jax.sampling.engine import KnownPerson, person_of
from idea_jax.serve import shelf
from idea_jax.serve.photos import Sights, Upload
from idea_jax.serve.problems import HttpProblem
from idea_jax.serve.settings import ServeConfig
from idea_jax.training import group
from idea_jax.training.learner import Learner, Work, begin, write_results
from idea_jax.training.photos import digest_of
from idea_jax.training.program import Program, Shape, lower_step, place_frozen
from idea_jax.training.results import Base
from idea_jax.training.start import (
    known_names,
    method_of,
    optimizer_of,
    optimizer_settings,
    starting_ids,
    starting_tokens,
)

log = logging.getLogger(__name__)

SLOTS = (1, 2, 4, 8, 16)  # photos that a program of learning has room for, or as many as may be
# Settings of idea-train that mean something on a server, which decides the others itself.
READ = set(
    "profile n_pseudo_tokens initialize_tokens celeb_path train_parts token_basis self_contained "
    "drop_outliers resolution crop crop_margin center_crop regulariser reg_weight beta kv kv_rank "
    "train_batch_size gradient_accumulation_steps steps_per_call early_stopping evaluation_steps "
    "learning_rate adapter_learning_rate enhancer_learning_rate enhanced_learning_rate "
    "kv_learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles adam_beta1 adam_beta2 "
    "adam_epsilon adam_weight_decay".split()
)
SHOWN = 5  # pictures on the way
MINI_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "mini_paper.yaml"
MINI_MARGIN = 1.3  # what the mini was trained on shows that much around a face


@dataclass(frozen=True)
class Pupil:
    """Somebody who is to be learned, as they were asked for.

    Attributes:
      keeps_photos, keeps_face: whether these are kept beside the identity.
      shows: whether pictures are drawn on the way.
    """

    name: str
    photos: tuple[Upload, ...]
    steps: int
    seed: int
    keeps_photos: bool
    keeps_face: bool
    shows: bool
    replaces: bool


@dataclass(frozen=True)
class Course:
    """What all who are learned with as many steps and photos share; and its optimiser, in words."""

    work: Work
    optimizer: dict

    def lower(self) -> jax.stages.Lowered:
        """The program of a step, from shapes alone."""
        work = self.work
        return lower_step(work.program, work.shape, work.cfg.seed, work.enhancer, self.optimizer)


class School:
    """Learns people with the frozen model that draws them; for the thread that owns JAX.

    Args:
      found, model: the checkpoint, as it draws.
      plain: its tokenizer, without a person.
      enhancer: the shared one, if there is one.
    """

    def __init__(
        self,
        cfg: ServeConfig,
        found: hub.Checkpoint,
        model: sd.StableDiffusion,
        plain: Tokenizer,
        enhancer: enhancers.Enhancer | None,
        sights: Sights,
    ):
        self.cfg, self.found, self.model, self.plain = cfg, found, model, plain
        self.enhancer, self.sights = enhancer, sights
        # As the engine has them, once it is there: the weights, and the devices.
        self.frozen: sd.Frozen | None = None
        self.devices: list[jax.Device] = []
        self.placed: sd.Frozen | None = None
        self.courses: OrderedDict[tuple[int, int], Course] = OrderedDict()

    def settings(self, steps: int, seed: int, name: str) -> TrainConfig:
        """The settings of idea-train with which somebody is learned.

        Raises:
          ConfigError: those of --train_config do not fit, or no step needs a shared ID-Enhancer.
        """
        cfg, of_file = self.cfg, {}
        path = cfg.train_config
        if path is None and self.found.name == hub.MINI:
            path, of_file = str(MINI_CONFIG), {"crop_margin": MINI_MARGIN}
        if path is not None:
            of_file |= reading.read_yaml(path)
            of_file.pop("pretrained_model_name_or_path", None)
        if unread := sorted(of_file.keys() - READ):
            raise ConfigError(
                f"{unread[0]} in --train_config {path} has no effect on a server; leave it out"
            )
        places = self.sights.finder.detector is not None
        flags: dict[str, Any] = {
            name: getattr(cfg, name)
            for name in ("mixed_precision", "attention", "prediction_type", "original_config")
            if getattr(cfg, name) is not None
        }
        flags |= {"crop": "face"} if places and "crop" not in of_file else {}
        if not places:
            of_file.pop("crop_margin", None)
        flags |= {
            "pretrained_model_name_or_path": self.found.name,
            "train_data_dir": shelf.PHOTOS,
            "output_dir": name,
            "placeholder_token": f"<{name}>",
            "max_train_steps": steps,
            "seed": seed,
            "report_to": "none",
            "enhancer": "auto" if self.enhancer else "none",
        }
        built = reading.build(TrainConfig, of_file, flags, source=path)
        if self.enhancer is None:
            return reading.resolve(built, None)
        of_enhancer = self.enhancer.config
        fixed = {"n_pseudo_tokens": of_enhancer.num_tokens, "beta": of_enhancer.beta}
        return reading.resolve(built, fixed)

    def slots(self, photos: int) -> int:
        """Photos that the program for so many has room for."""
        return next((n for n in SLOTS if n >= photos), self.cfg.max_photos)

    def check(self, steps: int) -> None:
        """Refuses a number of steps that cannot be taken here.

        Raises:
          HttpProblem: it is too large, it needs a shared ID-Enhancer, or it is one number too many.
        """
        if not 0 <= steps <= self.cfg.max_learn_steps:
            raise HttpProblem(
                "invalid", f"steps must lie between 0 and {self.cfg.max_learn_steps}, got {steps}"
            )
        if steps == 0 and self.enhancer is None:
            raise HttpProblem(
                "invalid", "this model has no shared ID-Enhancer, so that steps must be at least 1"
            )
        known = sorted({number for number, _ in self.courses if number})
        if steps and steps not in known and len(known) >= self.cfg.max_learn_programs:
            raise HttpProblem(
                "invalid",
                f"this server has made its {len(known)} programs of learning, for steps "
                f"{', '.join(map(str, known))}: take one of these numbers",
            )

    def check_settings(self, steps: int) -> None:
        """Refuses a number of steps with which the settings of learning do not fit.

        Raises:
          HttpProblem: they do not; the log says why.
        """
        try:
            self.settings(steps, 0, "nobody")
        except ConfigError as error:
            log.warning("nobody can be learned with %d steps: %s", steps, error)
            detail = f"this server's way to learn does not fit {steps} steps: take another number"
            raise HttpProblem("invalid", detail, [{"where": "steps", "detail": detail}]) from error

    def course(self, steps: int, photos: int) -> Course:
        """What those learn with who take so many steps on so many photos."""
        key = steps, self.slots(photos) if steps else 0
        if key not in self.courses:
            self.courses[key] = self._course(*key)
        return self.courses[key]

    def _course(self, steps: int, slots: int) -> Course:
        cfg = self.settings(steps, 0, "nobody")
        method = method_of(cfg, self.enhancer)
        layout = devices.layout(None, None, 1, cfg.train_batch_size, self.devices)
        side, _ = programs.picture_size(
            self.model, cfg.resolution, cfg.resolution, ("resolution",) * 2
        )
        tokenizer = self.plain.with_placeholder(cfg.placeholder_token, cfg.n_pseudo_tokens)
        program, frozen = None, None
        if steps:
            sd.shapes(self.model)
            program = Program(
                self.model,
                method,
                optimizer_of(cfg, method),
                cfg.train_batch_size,
                layout.mesh,
                steps_per_call=cfg.steps_per_call or devices.steps_per_call(),
            )
            frozen = self._place(layout)
        base = Base(self.model, frozen, tokenizer, self.found.name, self.found.revision)
        start = None
        if self.enhancer is None:
            ids = starting_ids(cfg, method, tokenizer, known_names(self.found.folder))
            start = starting_tokens(cfg, method, base, ids)
        work = Work(
            cfg=cfg,
            method=method,
            base=base,
            program=program,
            enhancer=self.enhancer,
            start=start,
            shape=Shape(1, max(slots, 1), side),
            eyes=self.sights.finder,
            validation=[],
            layout=layout,
            about={},
            is_word=self.plain.is_word,
        )
        return Course(work, optimizer_settings(cfg, method))

    def _place(self, layout: devices.Layout) -> sd.Frozen:
        """The frozen weights where the step wants them: the same for all courses."""
        if self.placed is None:
            self.placed = place_frozen(self.frozen, layout.mesh, False)
        return self.placed

    def method(self, steps: int) -> condition.Method:
        """The method of those who are learned with so many steps."""
        return method_of(self.settings(steps, 0, "nobody"), self.enhancer)

    def look(self, pupil: Pupil) -> tuple[Portraits, np.ndarray | None]:
        """The faces on somebody's photos, and the one by which likeness is told, if it is wanted.

        Not for the thread that owns JAX: it has nothing to do with it.

        Raises:
          ImageError, FaceError: a photo cannot be used.
        """
        drops = self.settings(pupil.steps, pupil.seed, pupil.name).drop_outliers
        seen = self.sights.look(pupil.photos, drops)
        # Also where it is not kept: pictures on the way have a likeness.
        wants = pupil.keeps_face or (pupil.shows and pupil.steps)
        return seen, self.sights.face_of(seen) if wants else None

    def begin(self, pupil: Pupil, seen: Portraits, folder: Path) -> "Lesson":
        """Somebody before their first step."""
        shared = self.course(pupil.steps, len(seen.pictures)).work
        cfg = self.settings(pupil.steps, pupil.seed, pupil.name)
        tokenizer = self.plain.with_placeholder(cfg.placeholder_token, cfg.n_pseudo_tokens)
        work = dataclasses.replace(
            shared, cfg=cfg, base=dataclasses.replace(shared.base, tokenizer=tokenizer)
        )
        person = people.Person("", tuple(seen.pictures))
        return Lesson(pupil, work, begin(work, person, seen, folder), folder)


class Lesson:
    """Somebody who is being learned.

    Attributes:
      taken: steps so far; loss: the newest, None before the first.
    """

    def __init__(self, pupil: Pupil, work: Work, learner: Learner, folder: Path):
        self.pupil, self.work, self.learner, self.folder = pupil, work, learner, folder
        self.started = time.monotonic()
        every = max(1, pupil.steps // SHOWN)
        self.shown_at = set(range(every, pupil.steps, every)) if pupil.shows else set()
        self.group = group.Group(work, [learner]) if pupil.steps else None
        self.bar = tqdm(total=pupil.steps, disable=True)

    @property
    def taken(self) -> int:
        return self.group.taken[0] if self.group else 0

    @property
    def loss(self) -> float | None:
        losses = self.learner.results.losses
        return losses[-1][1] if losses else None

    def steps(self) -> Iterator[None]:
        """Takes all steps, one call to the devices at a time.

        Raises:
          TrainingError: a step was not finite.
        """
        while self.group is not None and self.group.open_places():
            self.group.step(self.bar)
            if not self.group.open_places() or self.group.is_due():
                self.group.look(self.bar, [])
            if self.learner.error is not None:
                raise self.learner.error
            yield

    def is_shown(self, before: int) -> bool:
        """Whether a picture is due, of the steps after `before`."""
        return any(before < step <= self.taken for step in self.shown_at)

    def person_now(self) -> KnownPerson:
        """Somebody as they are after the steps so far, for the engine."""
        state = group.lane(jax.device_get(self.group.states), 0)
        identity = Identity(
            method=self.work.method,
            trainable=state.trainable,
            given=state.given,
            placeholder="<person>",
            base_model=self.work.base.name,
            revision=self.work.base.revision,
            seed=self.pupil.seed,
            steps=self.taken,
        )
        return person_of(identity, f"{id(self)} after {self.taken} steps")

    def write(self, face: np.ndarray | None, recogniser: str) -> None:
        """Writes all that is kept of somebody into the folder.

        Raises:
          WriteError: the disk is full; IdentityError: a value is not finite.
        """
        pupil, seconds = self.pupil, time.monotonic() - self.started
        write_results(self.learner, self.folder, seconds)
        for number, photo in enumerate(pupil.photos if pupil.keeps_photos else ()):
            (self.folder / shelf.PHOTOS).mkdir(exist_ok=True, mode=0o700)
            with atomic_write(self.folder / shelf.PHOTOS / f"{number}.jpg", private=True) as file:
                file.write_bytes(photo.kept())
        if pupil.keeps_face and face is not None:
            shelf.write_face(self.folder, face, recogniser)
        about = {
            "created": shelf.moment(),
            "photos": len(pupil.photos),
            "kept_photos": len(pupil.photos) if pupil.keeps_photos else 0,
            "seconds": round(seconds, 2),
        }
        write_json(self.folder / shelf.ABOUT, about)
        record = jobs.Record(
            pupil.name,
            status="done",
            attempts=1,
            steps=int(self.learner.state.step),
            seconds=seconds,
            ended=time.time(),
            result=jobs.file_digest(self.folder / jobs.RESULT),
            photos=digest_of(list(pupil.photos)),
        )
        with atomic_write(self.folder / jobs.RECORD) as file:
            file.write_text(jobs.to_line(record) + "\n", encoding="ascii")

    def close(self) -> None:
        """Lets go of what it holds open."""
        self.learner.results.close()
        self.learner.checkpoints.close()
        self.bar.close()


def refuse_settings(school: School) -> None:
    """Looks whether people can be learned with the settings of a server, before it starts.

    Raises:
      ConfigError: they do not fit.
    """
    steps = school.cfg.learn_steps
    if steps or school.enhancer is not None:
        school.settings(steps, 0, "nobody")
    elif school.cfg.max_learn_steps:
        school.settings(1, 0, "nobody")
    else:
        raise ConfigError("--max_learn_steps 0 needs a shared ID-Enhancer: nobody can be learned")
