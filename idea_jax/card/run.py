"""`idea-evaluate --card`: from a checkpoint and people to a folder that can be passed on."""

import json
import logging
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from idea_jax import jobs
from idea_jax.card import forecast, people
from idea_jax.card.people import Invited
from idea_jax.card.settings import REST, TRAIN, CardConfig
from idea_jax.config.reading import build, read_yaml
from idea_jax.config.settings import COMPUTE_DTYPES, ConfigError, reading
from idea_jax.enhancer import fit, preparing, shards
from idea_jax.enhancer.settings import CELEBRITIES, EnhancerTrainConfig, PrepareConfig
from idea_jax.evaluation import compare, output
from idea_jax.evaluation import run as evaluation
from idea_jax.evaluation.run import held_settings
from idea_jax.evaluation.settings import EvaluateConfig
from idea_jax.faces import portraits
from idea_jax.faces.models import FaceError
from idea_jax.formats import enhancer as enhancers
from idea_jax.models import hub, sd
from idea_jax.models.tensor_files import find_weights
from idea_jax.runtime.files import atomic_write, check_writable, file_digest, write_json
from idea_jax.runtime.signals import Interrupted
from idea_jax.runtime.versions import versions

log = logging.getLogger(__name__)

SETTINGS, FORECAST, RESULT, ABOUT = "settings.json", "forecast.json", "card", "card.json"
# What may differ when a card goes on: it changes no number.
FREE = "card batch_size attention compile_cache face_provider identities_per_step".split()
FREE += "same_recogniser accept_face_licence with_pictures dry_run".split()
# Those that say nothing to others, and those of which the last part of a path does.
OURS = "card people dataset_dir compile_cache".split()
PATHS = "enhancer enhancer_config face_model face_model_dir".split()
PATHS += "score_model prompts clip tokenizer_name original_config".split()
PATHS += ["pretrained_model_name_or_path"]
OF_MODEL = "revision variant tokenizer_name prediction_type original_config".split()
OF_MODEL += "mixed_precision attention compile_cache".split()
# Of the methods: those with a shared ID-Enhancer, and those that know none.
WITH = "paper,paper@steps=0"
OTHERS = "official,cross_init,textual_inversion"
# By the widths of the text encoders.
CONFIGS: dict[tuple[int, ...], str] = {
    (768,): "enhancer_sd15",
    (1024,): "enhancer_sd21",
    (768, 1280): "enhancer_sdxl",
}
ON_THE_WAY = {"checkpointing_steps": 100, "checkpoints_total_limit": 2}

README = """\
# A card of {checkpoint}

`idea-evaluate --card` has learned {people} people with each of these methods, drawn and scored
them: {methods}.

* `report.html`: the numbers with their intervals, in one page without a link{pictures}.
* `summary.json`, `table.md`, `rows.jsonl`, `rows.csv`: the same for programs, and a row for each
  picture.
* `card.json`: settings, versions, devices, SHA-256 of all models, seconds of each part.

People are numbers here. No file holds a name, a path or a face embedding.
"""


@dataclass(frozen=True)
class CardPlan:
    """What is done for a card, settled before anything is trained.

    Attributes:
      found: the checkpoint.
      trains: whether a shared ID-Enhancer is trained; prepare, train: with which settings.
      comparison: of the methods. Its `enhancer` is a file that is there or will be, "auto" or
        "none".
    """

    found: hub.Checkpoint
    model: sd.StableDiffusion
    invited: Invited
    trains: bool
    prepare: PrepareConfig
    train: EnhancerTrainConfig
    comparison: EvaluateConfig


def run(cfg: CardConfig) -> list[Path]:
    """Makes a card; returns the paths of its report and of `card.json`. The same call goes on where
    it was stopped.

    Raises:
      as `evaluation.run.run`, `enhancer.preparing.run` and `enhancer.fit.run`.
    """
    out = Path(cfg.card)
    if cfg.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            begin(cfg, Path(folder))
        return []
    check_writable(out)
    with jobs.only_run(out, 0, "--card"):
        held = held_settings(cfg, out / SETTINGS, FREE, ("people", "dataset_dir"))
        plan = begin(cfg, out)
        write_json(out / SETTINGS, held)
        enhance(plan, out)
        with timed(out, "learning, drawing and scoring"):
            scored = evaluation.evaluate(plan.comparison)
            output.write(scored, Path(plan.comparison.output_dir))
        return write(cfg, plan, scored)


def begin(cfg: CardConfig, out: Path) -> CardPlan:
    """Settles what will be done, finds what is wrong with it, and says how long it will take.

    Args:
      out: folder that receives the people and the forecast.

    Raises:
      as `run`.
    """
    found = hub.resolve_for(cfg)  # what is wrong with it is said before photos are looked at
    model = sd.read_configs(found.folder, COMPUTE_DTYPES[cfg.mixed_precision], **reading(cfg))
    # Those of a command that was refused may be others than this one asks for.
    invited = people.read(out / "people") if (out / SETTINGS).is_file() else None
    if invited is None:
        invited, chosen = people.choose(cfg)
        people.write(out / "people", invited, chosen, cfg.photos_per_person)
    plan = settle(cfg, out, found, model, invited)
    awaits = plan.trains and not Path(plan.comparison.enhancer).is_file()
    ready = evaluation.look_ahead(plan.comparison, awaits_enhancer=awaits)
    if awaits:
        find_face_model(cfg, found.folder)
    seer = forecast.forecast_of(cfg, ready, model)
    stages = []
    if awaits:
        stages += forecast.of_enhancer(seer, plan.prepare, plan.train, invited)
    has_enhancer = plan.comparison.enhancer != "none"
    stages += forecast.of_comparison(seer, plan.comparison, ready, has_enhancer)
    for line in forecast.tell(stages, seer.speed):
        log.info("%s", line)
    # What was done earlier was forecast then.
    said = read_forecast(out) | {stage.name: stage.seconds for stage in stages}
    write_json(out / FORECAST, said)
    return plan


def read_forecast(out: Path) -> dict[str, float]:
    """Seconds of the parts, as this and earlier runs have forecast them."""
    try:
        return json.loads((out / FORECAST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def settle(
    cfg: CardConfig, out: Path, found: hub.Checkpoint, model: sd.StableDiffusion, invited: Invited
) -> CardPlan:
    """The settings of all parts.

    Raises:
      ConfigError: they do not fit together, or nobody is left for the enhancer.
    """
    own = enhancers.find("auto", found.folder)
    trains = cfg.enhancer == TRAIN or (cfg.enhancer == "auto" and own is None)
    if trains and cfg.trains_on == REST and invited.rest_people < 2:
        raise ConfigError(
            f"beside the {invited.test} test people {invited.rest_people} are left to train a "
            "shared ID-Enhancer on: give more people, fewer --test_people, --enhancer_people "
            f"{CELEBRITIES}, or --enhancer FILE or none"
        )
    enhancer = str(out / "enhancer" / fit.RESULT) if trains else cfg.enhancer
    methods = cfg.compare
    if methods is None:
        prefix = "mini_" if cfg.pretrained_model_name_or_path == hub.MINI else ""
        has_own = (compare.CONFIGS / f"{prefix}paper_alone.yaml").is_file()
        alone = "paper_alone" if has_own else "paper@enhancer=none"
        methods = ",".join([WITH, alone, OTHERS] if enhancer != "none" else [alone, OTHERS])
    where = out / "people"
    comparison = cfg.evaluation(
        str(where / people.PHOTOS),
        str(where / people.OTHERS) if invited.held_out else None,
        str(out / "evaluation"),
        methods,
        enhancer,
    )
    shared = {name: getattr(cfg, name) for name in OF_MODEL if getattr(cfg, name) is not None}
    shared["pretrained_model_name_or_path"] = cfg.pretrained_model_name_or_path
    faces = ("face_model", "face_model_dir")
    faces_given = {name: getattr(cfg, name) for name in faces if getattr(cfg, name)}
    seed = {} if cfg.seed is None else {"seed": cfg.seed}
    given: dict[str, Any] = {**shared, **faces_given, **seed}
    of_people: dict[str, Any] = {
        "people": CELEBRITIES,
        "celebrity_pictures": cfg.celebrity_pictures,
    }
    if cfg.trains_on == REST:
        of_people = {"people": cfg.people, "dataset": cfg.dataset, "dataset_dir": cfg.dataset_dir}
        of_people["identities"] = f"{invited.until}:"
    of_people["prepare"] = str(out / "prepared")
    of_people["crop"] = cfg.score_crop
    of_people["accept_face_licence"] = cfg.accept_face_licence
    prepare = PrepareConfig(face_provider=cfg.face_provider, **given, **of_people)
    given |= {"data": [prepare.prepare], "output_dir": str(out / "enhancer")}
    given |= {"resume_from_checkpoint": "latest", "report_to": "none"}
    train = build(EnhancerTrainConfig, ON_THE_WAY | training_file(cfg, model), given)
    return CardPlan(found, model, invited, trains, prepare, train, comparison)


def training_file(cfg: CardConfig, model: sd.StableDiffusion) -> dict:
    """The settings of the enhancer's training that a file says: the given, or that of the family.

    Raises:
      ConfigError: it cannot be read.
    """
    if cfg.enhancer_config is not None:
        return read_yaml(cfg.enhancer_config)
    family = CONFIGS.get(tuple(text.hidden_size for text in model.encoders))
    kind = "celeba" if cfg.trains_on == REST else CELEBRITIES
    return read_yaml(str(compare.CONFIGS / f"{family}_{kind}.yaml")) if family else {}


def enhance(plan: CardPlan, out: Path) -> None:
    """Prepares and trains the shared ID-Enhancer, as far as that was not done before.

    Raises:
      Interrupted: by a signal; what was reached is kept.
      as `run`.
    """
    if not plan.trains or Path(plan.comparison.enhancer).is_file():
        return
    if not is_prepared(Path(plan.prepare.prepare)):
        with timed(out, "preparing"):
            preparing.run(plan.prepare)
    try:
        with timed(out, "training the ID-Enhancer"):
            fit.run(plan.train)
    except Interrupted as stopped:
        raise Interrupted(
            stopped.signum, f"stopped; {out} keeps what was reached, and the same command goes on"
        ) from stopped


def is_prepared(folder: Path) -> bool:
    """Whether a folder has all inputs of the training."""
    try:
        return shards.read_index(folder).is_complete
    except (shards.ShardsError, OSError):
        return False


@contextmanager
def timed(out: Path, name: str) -> Iterator[None]:
    """Adds the seconds of a part to those that earlier runs took, also where it is stopped."""
    log.info("%s", name)
    began = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - began
        evaluation.note(out, name, {"seconds": seconds})
        log.info("%s: %s", name, forecast.duration(seconds))


def write(cfg: CardConfig, plan: CardPlan, scored: output.Scored) -> list[Path]:
    """Writes `card/`, which can be passed on; returns the paths of its report and `card.json`."""
    out = Path(cfg.card)
    target = out / RESULT
    report, _ = output.write(scored, target, with_pictures=cfg.with_pictures)
    write_json(target / ABOUT, about(cfg, plan, scored))
    said = README.format(
        checkpoint=plan.found.name,
        people=plan.invited.test,
        methods=", ".join(f"`{name}`" for name in scored.summary["methods"]),
        pictures=", with photos and pictures of the people" if cfg.with_pictures else "",
    )
    with atomic_write(target / "README.md") as path:
        path.write_text(said, encoding="utf-8")
    return [report, target / ABOUT]


def find_face_model(cfg: CardConfig, folder: Path) -> Path:
    """The recogniser of training.

    Raises:
      FaceError: there is none.
    """
    return portraits.find_face_model(
        cfg.face_model, folder, cfg.face_model_dir, accept_licence=cfg.accept_face_licence
    )


def about(cfg: CardConfig, plan: CardPlan, scored: output.Scored) -> dict:
    """What `card.json` says: all that the numbers depend on, and what they took. No path."""
    out, found = Path(cfg.card), plan.found
    models = {f"{name} of scoring": value for name, value in scored.about["models"].items()}
    with suppress(FaceError):  # some methods need none
        face_model = find_face_model(cfg, found.folder)
        models["recogniser of training"] = f"{face_model.name} ({file_digest(face_model)})"
    file = enhancers.find(plan.comparison.enhancer, found.folder)
    enhancer = None
    if file is not None:
        own = enhancers.read(file)
        enhancer = {"sha256": own.sha256, "was_trained_here": plan.trains, **own.about}
    settings = {n: v for n, v in asdict(cfg).items() if v is not None and n not in OURS}
    for name in PATHS:
        if name in settings:
            settings[name] = Path(settings[name]).name
    return {
        "checkpoint": {
            "name": found.name,
            "revision": found.revision,
            "sha256": weights_of(found.folder, cfg.variant),
        },
        "enhancer": enhancer,
        "models": models,
        "people": asdict(plan.invited),
        "settings": settings | {"compare": plan.comparison.compare},
        "environment": {"platform": platform.platform(), **output.machine(), **versions()},
        "forecast": read_forecast(out),
        "seconds": {**evaluation.read_times(out), **scored.summary["seconds"]},
    }


def weights_of(folder: Path, variant: str | None) -> dict[str, str]:
    """SHA-256 of a checkpoint's weight files, by their names."""
    if folder.is_file():
        return {folder.name: file_digest(folder)}
    return {
        f"{part}/{path.name}": file_digest(path)
        for part, stem in hub.WEIGHTS
        for path in find_weights(folder / part, stem, variant)
    }
