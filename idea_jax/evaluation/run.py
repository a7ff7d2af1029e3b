"""An evaluation from beginning to end: draw what is not drawn, look, score, write."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from idea_jax.config.settings import ConfigError, settings_of
from idea_jax.errors import InputError
from idea_jax.evaluation import asked, clip, compare, draw, gallery, looking, metrics
from idea_jax.evaluation.asked import OTHER, Asked
from idea_jax.evaluation.gallery import Problem
from idea_jax.evaluation.known import HELD_OUT, PHOTOS, apart, know_people, unreadable
from idea_jax.evaluation.looking import Eyes
from idea_jax.evaluation.modes import MODES, Mode
from idea_jax.evaluation.output import Scored, machine, write
from idea_jax.evaluation.scoring import ScoredPicture, score, summarise
from idea_jax.evaluation.settings import EvaluateConfig
from idea_jax.faces import models as face_models
from idea_jax.faces import packs, portraits
from idea_jax.formats import enhancer as enhancers
from idea_jax.models import hub
from idea_jax.runtime.files import check_writable, file_digest, write_json
from idea_jax.runtime.versions import versions
from idea_jax.sampling.plan import open_model, safe_name

log = logging.getLogger(__name__)

SETTINGS, TIMES = "settings.json", "seconds.json"
# What may differ when a run goes on: it changes no picture and no score.
# Each method of `--compare` has folders of its own, so they may come and go.
FREE = "output_dir compare batch_size attention compile_cache face_provider images".split()
FREE += "same_recogniser accept_face_licence".split()


class EvaluationError(InputError, ValueError):
    """An evaluation that cannot be done as it was asked for; the message says what to do."""


@dataclass(frozen=True, eq=False)
class Ready:
    """An evaluation of which everything was looked at that can be wrong and is cheap to see.

    Attributes:
      photos: those that are learned from, and others, by person; missed: what was left out of
        these folders.
      contenders: methods that are trained; identities: files by method and person, instead.
      sources: folders of pictures that are there already, by method.
      settings: of the drawing, as `draw.settings_of`; empty if nothing is drawn.
      checkpoint: its folder or file, if one was named.
    """

    mode: Mode
    prompts: list[Asked]
    photos: tuple[dict[str, list[Path]], dict[str, list[Path]]]
    missed: list[Problem]
    contenders: list[compare.Contender]
    identities: dict[str, dict[str, Path]]
    sources: dict[str, Path]
    settings: dict
    checkpoint: Path | None
    eyes: Eyes


def run(cfg: EvaluateConfig) -> list[Path]:
    """Evaluates; returns the paths of the report and the summary.

    Raises:
      ConfigError, TextError, ImageError, FaceError, CheckpointNotFound, WeightsError,
      UnsupportedConfig, EvaluationError: bad input that concerns everybody; what concerns one
      picture or one person stands in the report instead.
    """
    return write(evaluate(cfg), Path(cfg.output_dir))


def look_ahead(cfg: EvaluateConfig, *, awaits_enhancer: bool = False) -> Ready:
    """Looks at everything that can be wrong and is cheap to see; writes nothing.

    Args:
      awaits_enhancer: whether the file of the shared ID-Enhancer is still to be made.

    Raises:
      as `run`.
    """
    mode, out = MODES[cfg.mode], Path(cfg.output_dir)
    prompts = asked.read(cfg.prompts or mode.prompts)
    photos, missed = gallery.photos_of(Path(cfg.photos), PHOTOS)
    held_out: dict[str, list[Path]] = {}
    if cfg.held_out:
        held_out, more = gallery.photos_of(Path(cfg.held_out), HELD_OUT)
        missed += more
    contenders = []
    if cfg.compare is not None:
        contenders = compare.read_contenders(cfg.compare, cfg.pretrained_model_name_or_path)
        if len(photos) < 2:
            raise ConfigError(
                f"--compare needs a folder per person and two people at least in {cfg.photos}"
            )
    sources = images_of(cfg)
    settings = draw.settings_of(cfg, mode) if cfg.images is None else {}
    for contender in contenders:
        where = out / "people" / safe_name(contender.name)
        compare.check(contender, cfg, where, settings["seed"], settings)
    check_writable(out)
    checkpoint = None
    if settings:  # all that is read of a checkpoint is looked for, but for the weights
        found = open_model(draw.sample_config(settings))[0]
        checkpoint = found.folder
    elif cfg.pretrained_model_name_or_path is not None:
        checkpoint = hub.resolve_for(cfg).folder
    for contender in contenders if not awaits_enhancer else ():
        compare.check_beginning(contender, cfg, settings["seed"], found)
    identities = draw.find_identities(cfg.identity) if cfg.identity is not None else {}
    score_model = find_score_model(cfg, checkpoint)
    needs_face = any(contender.uses_face for contender in contenders) or bool(identities)
    enhancer = None
    if checkpoint is not None and not awaits_enhancer:
        enhancer = enhancers.find(cfg.enhancer, checkpoint)
    check_recogniser(cfg, score_model, checkpoint, needs_face, enhancer)
    judge = load_clip(cfg, mode, checkpoint)
    eyes = looking.open_eyes(score_model, judge, crop=cfg.score_crop, provider=cfg.face_provider)
    both = photos, held_out
    return Ready(
        mode, prompts, both, missed, contenders, identities, sources, settings, checkpoint, eyes
    )


def evaluate(cfg: EvaluateConfig) -> Scored:
    """Learns and draws what is not there yet, looks at all pictures, and scores them.

    Raises:
      as `run`.
    """
    out = Path(cfg.output_dir)
    ready = look_ahead(cfg)
    write_json(out / SETTINGS, held_settings(cfg, out / SETTINGS, FREE, ("photos", "held_out")))
    settings, identities, sources = ready.settings, dict(ready.identities), dict(ready.sources)
    learned, _ = ready.photos
    # The pictures of each method.
    problems: list[Problem] = []
    for contender in ready.contenders:
        first = compare.trained_alike(contender, ready.contenders)
        if first != contender.name:  # they differ in how they are drawn
            identities[contender.name] = identities[first]
            problems += [p._replace(method=contender.name) for p in problems if p.method == first]
            continue
        where = out / "people" / safe_name(contender.name)
        files, spent, failed = compare.train(contender, cfg, where, list(learned), settings["seed"])
        note(out, contender.name, spent)
        problems += failed
        identities[contender.name] = files
    drawing = {contender.name: contender.drawing for contender in ready.contenders}
    for method, files in identities.items():
        sources[method] = out / "pictures" / safe_name(method)
        own = settings | drawing.get(method, {})
        spent, failed = draw.draw(method, files, ready.prompts, own, sources[method])
        note(out, method, spent)
        problems += failed
    # What is seen on them, and what that is worth.
    return judge_all(cfg, ready, sources, problems)


def held_settings(cfg: Any, file: Path, free: Sequence[str], paths: Sequence[str]) -> dict:
    """Returns the settings that a folder is held to, so that what two settings lead to never meets
    in a report.

    Args:
      cfg: a dataclass of settings.
      file: in which an earlier run has noted its own, if there was one.
      free: names of those that may differ; paths: of those that are compared as places.

    Raises:
      EvaluationError: the folder is one of other settings.
    """
    held = {name: value for name, value in asdict(cfg).items() if name not in free}
    for name in paths:
        held[name] = str(Path(held[name]).resolve()) if held[name] else None
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        before = held
    except (ValueError, RecursionError) as error:
        raise EvaluationError(
            f"{file} is damaged, so that nobody knows what the pictures beside it were made with; "
            "choose another folder, or delete that one"
        ) from error
    # What an earlier version did not know was as it is by default.
    defaults = {spec.name: spec.default for spec in settings_of(type(cfg))}
    before = defaults | (before if isinstance(before, dict) else held)
    changed = [
        f"--{name}: {before[name]} -> {value}"
        for name, value in held.items()
        if before[name] != value
    ]
    if changed:
        raise EvaluationError(
            f"{file.parent} holds an evaluation with other settings ({', '.join(changed)}); choose "
            "another folder, or delete that one"
        )
    return held


def images_of(cfg: EvaluateConfig) -> dict[str, Path]:
    """The folders of `--images`, by method.

    Raises:
      ConfigError: two methods have the same name, or there is no such folder.
    """
    found: dict[str, Path] = {}
    for given in cfg.images or ():
        name, sign, folder = given.partition("=")
        path = Path(given)
        if sign and name and "/" not in name and not path.exists():
            path = Path(folder)
        else:
            name = path.resolve().name
        if name in found:
            raise ConfigError(f"two of --images are called {name}; tell them apart: METHOD=DIR")
        if not path.is_dir():
            raise ConfigError(
                f"--images {given}: {path} is no folder; expected a folder per person, in it one "
                "per prompt"
            )
        found[name] = path
    return found


def find_score_model(cfg: EvaluateConfig, checkpoint: Path | None) -> Path:
    """The recogniser that scores.

    Raises:
      ConfigError: there is none; FaceError: the pack has none.
    """
    if cfg.score_model is not None:
        path = Path(cfg.score_model).expanduser()
        if not path.exists():
            raise face_models.FaceError(f"--score_model {path} does not exist")
        return packs.find_in_pack(path, "recognition") if path.is_dir() else path
    own = checkpoint / "face" / "scoring.onnx" if checkpoint is not None else None
    if own is None or not own.is_file():
        raise ConfigError(
            "give the recogniser that scores with --score_model FILE.onnx (or the folder of a "
            "pack); it has to be another one than training sees, such as glintr100.onnx of "
            "antelopev2 where people were learned with w600k_r50.onnx of buffalo_l"
        )
    return own


def check_recogniser(
    cfg: EvaluateConfig,
    score_model: Path,
    checkpoint: Path | None,
    needs_face: bool,
    enhancer: Path | None,
) -> None:
    """Refuses to score with what people were learned with, as far as that can be known.

    Args:
      needs_face: whether a recogniser is seen in training that would be the default here.
      enhancer: file of the shared ID-Enhancer, if there is one.

    Raises:
      EvaluationError: it is the same file.
      FaceError: the recogniser of training is missing or cannot be used.
    """
    known: dict[str, str] = {}
    if cfg.face_model is not None or cfg.face_model_dir is not None or needs_face:
        try:
            path = portraits.find_face_model(
                cfg.face_model,
                checkpoint or Path(),
                cfg.face_model_dir,
                accept_licence=cfg.accept_face_licence,
            )
            known[file_digest(path)] = path.name
        except (face_models.FaceError, OSError):
            if cfg.compare is not None or cfg.face_model or cfg.face_model_dir:
                raise
    if enhancer is not None:
        known[enhancers.read(enhancer).about["face_model"]] = f"the recogniser of {enhancer.name}"
    own = file_digest(score_model)
    if own in known and not cfg.same_recogniser:
        raise EvaluationError(
            f"--score_model {score_model} is the recogniser that people are learned with "
            f"({known[own]}): what it calls alike was trained to look alike to it. Give another "
            "one, or --same_recogniser if you want these numbers all the same"
        )


def load_clip(cfg: EvaluateConfig, mode: Mode, checkpoint: Path | None) -> clip.Clip | None:
    """The CLIP of an evaluation; None if there is to be none."""
    if cfg.clip == "none":
        return None
    if cfg.clip != "auto":
        return clip.load(cfg.clip)
    if checkpoint is not None and (checkpoint / "image_encoder" / "config.json").is_file():
        return clip.load(str(checkpoint))
    try:
        return clip.load(mode.clip)
    except hub.CheckpointNotFound as error:
        raise EvaluationError(
            f"{error}; --clip takes the folder of a CLIP, and --clip none scores without one"
        ) from error


def note(out: Path, method: str, spent: Mapping[str, float]) -> None:
    """Adds seconds and counts to what earlier runs of the same folder took."""
    times = read_times(out)
    own = times.setdefault(method, {})
    for name, value in spent.items():
        own[name] = own.get(name, 0) + value
    write_json(out / TIMES, times)


def read_times(out: Path) -> dict:
    """Seconds of training and drawing, people learned and pictures drawn, by method; those of a
    damaged file are lost."""
    try:
        found = json.loads((out / TIMES).read_text(encoding="utf-8"))
        return {name: {k: v + 0 for k, v in own.items()} for name, own in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s cannot be used (%s): its seconds are lost", out / TIMES, error)
        return {}


def judge_all(
    cfg: EvaluateConfig, ready: Ready, sources: Mapping[str, Path], problems: Sequence[Problem]
) -> Scored:
    """Looks at all photos and pictures, and scores them.

    Args:
      sources: the folder of each method.
      problems: found so far.
    """
    mode, eyes, prompts, (learned, others) = ready.mode, ready.eyes, ready.prompts, ready.photos
    problems, shown = [*ready.missed, *problems], []
    groups = {prompt.text: prompt for prompt in prompts}
    for method, folder in sources.items():
        found, missed = gallery.scan(method, folder, list(learned))
        if ready.settings:  # they were drawn here, perhaps before the file of prompts was changed
            asked_for = [picture for picture in found if picture.prompt in groups]
            if len(asked_for) < len(found):
                why = f"{len(found) - len(asked_for)} are of prompts that --prompts has no more"
                missed.append(Problem(method, "", "pictures", why))
            found = asked_for
        shown += found
        problems += missed
        drawn = {picture.person for picture in found}
        for name in sorted(learned.keys() - drawn):
            problems.append(Problem(method, name, "pictures", "there is no picture of them"))
    paths = [path for own in (*learned.values(), *others.values()) for path in own]
    out = Path(cfg.output_dir)
    looks, digests, errors = looking.look_at(
        eyes, [*paths, *(picture.path for picture in shown)], out / "seen"
    )
    for what, photos in ((PHOTOS, learned), (HELD_OUT, others)):
        problems += unreadable(what, photos, errors)
    others, more = apart(learned, others, digests)
    people, missed = know_people(learned, others, looks)
    problems += [*more, *missed]
    texts = embed_prompts(eyes, mode, [picture.prompt for picture in shown])
    rows = []
    seen: dict[str, dict[tuple[str, str], list]] = {}
    for picture in shown:
        prompt = groups.get(picture.prompt) or Asked(picture.prompt, asked.OWN)
        place = str(picture.path.relative_to(sources[picture.method]))
        row = ScoredPicture(picture.method, picture.person, prompt.text, prompt.group, place)
        if picture.path in looks:
            look = looks[picture.path]
            row = ScoredPicture(**{**asdict(row), "sha256": digests[picture.path]})
            known, text = people.get(picture.person), texts.get(picture.prompt)
            row = score(row, prompt, look.faces, look.image, known, text)
            seen.setdefault(picture.method, {}).setdefault((row.person, row.prompt), []).append(
                look.image
            )
        else:
            row = ScoredPicture(**{**asdict(row), "error": errors[picture.path]})
        rows.append(row)
    diversities = {
        method: {key: metrics.diversity(np.stack(own)) for key, own in of.items()}
        for method, of in seen.items()
        if eyes.clip is not None
    }
    seed = mode.seed if cfg.seed is None else cfg.seed
    summary = summarise(mode, rows, diversities, people, problems, seed)
    summary["seconds"] = read_times(out)
    about = describe(cfg, mode, eyes)
    return Scored(rows, [picture.path for picture in shown], people, learned, summary, about)


def embed_prompts(eyes: Eyes, mode: Mode, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """CLIP's embedding of each prompt, as the mode says that it is read; empty without a CLIP."""
    if eyes.clip is None:
        return {}
    unique = list(dict.fromkeys(prompts))
    said = [text.replace("{}", mode.person).replace(OTHER, mode.other) for text in unique]
    # The name of a folder need not be valid Unicode.
    said = [text.encode("utf-8", "replace").decode("utf-8") for text in said]
    return dict(zip(unique, eyes.clip.embed_texts(said), strict=True))


def describe(cfg: EvaluateConfig, mode: Mode, eyes: Eyes) -> dict:
    """All that the numbers depend on, without paths."""
    paths = ("photos", "held_out", "output_dir", "images", "identity", "compile_cache")
    settings = {
        name: value
        for name, value in asdict(cfg).items()
        if value is not None and name not in paths
    }
    files = ["score_model", "face_model", "face_model_dir", "pretrained_model_name_or_path"]
    files += ["tokenizer_name", "original_config", "vae", "prompts", "clip", "enhancer"]
    for name in files:
        if name in settings and Path(settings[name]).exists():
            settings[name] = Path(settings[name]).name
    if cfg.lora is not None:  # FILE:SCALE keeps its end
        settings["lora"] = [Path(given).name for given in cfg.lora]
    detector = eyes.detector.path.name if eyes.detector else "none: the central square of a picture"
    models = {
        "recogniser": f"{eyes.recogniser.path.name} ({eyes.recogniser.sha256})",
        "detector": f"{detector} ({eyes.detector.sha256})" if eyes.detector else detector,
        "clip": f"{eyes.clip.name} ({eyes.clip.digest})" if eyes.clip else "none",
    }
    return {
        "mode": asdict(mode),
        "settings": settings,
        "models": models,
        "machine": machine(),
        "versions": versions(),
    }
