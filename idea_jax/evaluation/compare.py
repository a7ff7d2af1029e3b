"""Training several methods on the same people, through the step of many people."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from idea_jax import jobs
from idea_jax.config import reading
from idea_jax.config.settings import (
    FACE_PROFILES,
    PROFILE_DEFAULTS,
    ConfigError,
    SampleConfig,
    TrainConfig,
    settings_of,
)
from idea_jax.data import text
from idea_jax.evaluation.draw import FILE
from idea_jax.evaluation.gallery import Problem
from idea_jax.evaluation.settings import OF_MACHINE, OF_MODEL, EvaluateConfig
from idea_jax.models import hub, sd
from idea_jax.training import run as training
from idea_jax.training import start
from idea_jax.training.results import TrainingError

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# How a checkpoint is read: as people are trained, so they are drawn.
OF_BOTH = {name for name in OF_MODEL if name in TrainConfig.__dataclass_fields__}
# Settings that say where something lies, or who is learned and what is drawn: the evaluation's own.
OWN = "pretrained_model_name_or_path train_data_dir output_dir overwrite dataset".split()
OWN += "dataset_dir identities face_embeddings distributed resume_from_checkpoint".split()
OWN += "report_to logging_dir push_to_hub hub_model_id hub_token publish_consent".split()
OWN += "identity learned_embedding_path photo token prompt prompt_file save_dir n_iter".split()
SHORT = {"steps": "max_train_steps", "photos": "pictures_per_person"}


@dataclass(frozen=True)
class Contender:
    """One method of a comparison.

    Attributes:
      name: as it was given, and as the report calls it.
      config: the YAML file that it begins from.
      training, drawing: settings that differ from that, and from the evaluation's.
    """

    name: str
    config: Path
    training: dict[str, Any]
    drawing: dict[str, Any]

    @property
    def uses_face(self) -> bool:
        """Whether a recogniser is seen in training."""
        values = reading.read_yaml(str(self.config)) | self.training
        crops = values.get("crop", PROFILE_DEFAULTS[values["profile"]]["crop"])
        return values["profile"] in FACE_PROFILES or crops == "face"


def read_contenders(given: str, checkpoint: str) -> list[Contender]:
    """Returns the methods of `--compare`, in order.

    Args:
      given: CONFIG or CONFIG@KEY=VALUE;KEY=VALUE, with a comma between them. CONFIG is the name of
        a file of `idea_jax/configs`, without its `mini_` for the mini.

    Raises:
      ConfigError: there is no such file, or a setting is unknown, or a method is there twice.
    """
    known = {spec.name for spec in settings_of(TrainConfig)}
    drawn = {spec.name for spec in settings_of(SampleConfig)} - known | OF_BOTH
    found: list[Contender] = []
    for name in given.split(","):
        base, _, rest = name.strip().partition("@")
        prefix = "mini_" if checkpoint == hub.MINI else ""
        config = CONFIGS / f"{prefix}{base}.yaml"
        if "/" in base or not base or not config.is_file():
            files = [file.stem.removeprefix(prefix) for file in CONFIGS.glob(f"{prefix}*.yaml")]
            ours = sorted(f for f in files if not f.startswith(("mini_", "enhancer_")))
            raise ConfigError(f"--compare {base!r} is unknown; there are {', '.join(ours)}")
        values: dict[str, Any] = {}
        for part in filter(None, rest.split(";")):
            key, sign, value = part.partition("=")
            key = SHORT.get(key.strip(), key.strip())
            if not sign:
                raise ConfigError(f"--compare {name}: {part!r} is no SETTING=VALUE")
            if key not in known | drawn:
                raise ConfigError(
                    f"--compare {name}: {key!r} is no setting of idea-train or idea-sample"
                )
            if key in OWN:
                raise ConfigError(
                    f"--compare {name}: {key!r} is the same for all methods, and no part of one"
                )
            try:
                values[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ConfigError(f"--compare {name}: {part!r} has no readable value") from error
        found.append(
            Contender(
                name.strip(),
                config,
                {key: value for key, value in values.items() if key in known},
                {key: value for key, value in values.items() if key in drawn},
            )
        )
    names = [contender.name for contender in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"--compare has a method twice: {given}")
    return found


def trained_alike(contender: Contender, contenders: Sequence[Contender]) -> str:
    """The name of the first of the methods that trains as this one does, which may be itself."""
    return next(
        other.name
        for other in contenders
        if (other.config, other.training) == (contender.config, contender.training)
    )


def train_config(contender: Contender, cfg: EvaluateConfig, out: Path, seed: int) -> TrainConfig:
    """Returns the settings with which a method is trained.

    Raises:
      ConfigError: they do not fit together.
    """
    values = reading.read_yaml(str(contender.config))
    flags: dict[str, Any] = {
        "pretrained_model_name_or_path": cfg.pretrained_model_name_or_path,
        "train_data_dir": cfg.photos,
        "output_dir": str(out),
        "seed": seed,
        "report_to": "none",
    }
    for name in (*sorted(OF_BOTH - {"enhancer"}), *OF_MACHINE, "identities_per_step"):
        if getattr(cfg, name) is not None:
            flags[name] = getattr(cfg, name)
    profile = contender.training.get("profile", values["profile"])
    if cfg.enhancer != "auto" and "enhancer" not in values and profile == "paper":
        flags["enhancer"] = cfg.enhancer
    if contender.uses_face:
        for name in ("face_model", "face_model_dir", "accept_face_licence"):
            if getattr(cfg, name):
                flags[name] = getattr(cfg, name)
        if cfg.face_provider != "cpu":
            flags["face_provider"] = cfg.face_provider
    # Names and types are looked at in what a file says, so once as if the file said them.
    source = f"{contender.config} or --compare"
    reading.build(TrainConfig, values | contender.training, flags, source=source)
    return reading.build(TrainConfig, values, flags | contender.training, source=source)


def check(
    contender: Contender, cfg: EvaluateConfig, out: Path, seed: int, drawing: Mapping[str, Any]
) -> None:
    """Looks at the settings of a method before anything is trained.

    Args:
      drawing: settings of `SampleConfig` that all methods share.

    Raises:
      ConfigError: one is of the wrong type, out of its range, or does not fit the others.
    """
    train_config(contender, cfg, out, seed)
    values = {"identity": [FILE], "prompt": ["{}"], **drawing}
    flags = {key: value for key, value in values.items() if key not in contender.drawing}
    reading.build(SampleConfig, contender.drawing, flags, source=f"--compare {contender.name}")


def check_beginning(
    contender: Contender, cfg: EvaluateConfig, seed: int, found: hub.Checkpoint
) -> None:
    """Looks whether people can begin with a method: with the shared ID-Enhancer, or with the names
    or words that it takes instead.

    Raises:
      ConfigError: they cannot; EnhancerError: the file cannot be used.
    """
    try:
        own, enhancer = start.settle(train_config(contender, cfg, Path("."), seed), found.folder)
        if enhancer is not None or not own.max_train_steps:
            return
        placeholder = replace(start.placeholder_of(own), n=own.n_pseudo_tokens)
        model = sd.read_configs(found.folder, **start.how_read(own))
        tokenizer, _ = training.read_tokenizer(own, found, model, placeholder)
        names = text.read_names(own.celeb_path) if own.celeb_path else None
        names = names or start.known_names(found.folder)
        start.starting_ids(own, start.method_of(own), tokenizer, names)
    except (ConfigError, text.TextError) as error:
        raise ConfigError(f"--compare {contender.name}: {error}") from error


def train(
    contender: Contender, cfg: EvaluateConfig, out: Path, names: Sequence[str], seed: int
) -> tuple[dict[str, Path], dict, list[Problem]]:
    """Trains everybody with one method; who is done already is left alone.

    Args:
      out: folder of the method's people.
      names: of the people.

    Returns:
      Identity files by person, seconds and people of this call, and who could not be learned.

    Raises:
      what `training.run.run` raises, but for what concerns single people.
    """
    before = {name for name in names if (out / name / FILE).is_file()}
    started, problems = time.perf_counter(), []
    log.info("learning %d people: %s", len(names), contender.name)
    try:
        training.run(train_config(contender, cfg, out, seed))
    except TrainingError:
        # Reports are passed on, and where the photos lie is nobody's business.
        photos = Path(cfg.photos)
        why = {
            record.person: (record.why or "").replace(str(photos), photos.name)
            for record in jobs.read(out)
        }
        problems = [
            Problem(contender.name, name, "training", why.get(name) or "it was not finished")
            for name in names
            if not (out / name / FILE).is_file()
        ]
        if len(problems) in (0, len(names)):
            raise
    files = {name: out / name / FILE for name in names if (out / name / FILE).is_file()}
    new = len(files.keys() - before)
    seconds = time.perf_counter() - started if new else 0.0
    return files, {"training": seconds, "learned": new}, problems
