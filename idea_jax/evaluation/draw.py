"""Drawing the people of an evaluation, through the sampling that draws them for everybody."""

import json
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from idea_jax.config.settings import ConfigError, SampleConfig
from idea_jax.evaluation.asked import OTHER, Asked
from idea_jax.evaluation.gallery import OURS, Problem
from idea_jax.evaluation.modes import Mode
from idea_jax.evaluation.settings import OF_MACHINE, OF_MODEL, EvaluateConfig
from idea_jax.formats.identity import read_identity
from idea_jax.runtime.files import file_digest, slug
from idea_jax.sampling import run as sampling
from idea_jax.sampling.plan import safe_name

log = logging.getLogger(__name__)

FILE = "identity.safetensors"


def find_identities(given: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Returns the identity files of each profile, there by person.

    Args:
      given: files, folders with one, and folders of many people.

    Raises:
      ConfigError: there is none, or two are of the same person and profile.
      IdentityError, FileNotFoundError: a file cannot be used.
    """
    found: dict[str, dict[str, Path]] = {}
    for name in given:
        path = Path(name)
        files = [path]
        if path.is_dir():
            files = [path / FILE] if (path / FILE).is_file() else sorted(path.glob(f"*/{FILE}"))
        if not files:
            raise ConfigError(f"--identity {name} holds no {FILE}, and none of its folders does")
        for file in files:
            person = file.resolve().parent.name if file.name == FILE else file.stem
            own = found.setdefault(read_identity(file).method.profile, {})
            if person in own:
                raise ConfigError(f"--identity has two files of {person}: {own[person]} and {file}")
            own[person] = file
    return found


def settings_of(cfg: EvaluateConfig, mode: Mode) -> dict:
    """The settings of `SampleConfig` that all people of an evaluation share."""

    def chosen(name, default):
        value = getattr(cfg, name)
        return default if value is None else value

    return {
        "pretrained_model_name_or_path": cfg.pretrained_model_name_or_path,
        "num_images_per_prompt": chosen("pictures", mode.pictures),
        "num_inference_steps": chosen("num_inference_steps", mode.steps),
        "guidance_scale": chosen("guidance_scale", mode.guidance),
        "guidance_rescale": cfg.guidance_rescale,
        "vae": cfg.vae,
        "clip_skip": cfg.clip_skip,
        "scheduler": chosen("scheduler", "ddim"),
        "karras_sigmas": cfg.karras_sigmas,
        "timestep_spacing": cfg.timestep_spacing,
        "negative_prompt": chosen("negative_prompt", mode.negative_prompt),
        "seed": chosen("seed", mode.seed),
        **{name: getattr(cfg, name) for name in (*OF_MODEL, *OF_MACHINE)},
    }


def sample_config(settings: dict, **more: Any) -> SampleConfig:
    """The settings of a drawing of `settings_of`, by default of nobody and nothing yet.

    Raises:
      ConfigError: they do not fit together.
    """
    return SampleConfig(**{"identity": [FILE], "prompt": ["{}"], **settings, **more})


def draw(
    method: str, files: Mapping[str, Path], prompts: Sequence[Asked], settings: dict, folder: Path
) -> tuple[dict, list[Problem]]:
    """Draws every prompt of every person of a method that is not drawn yet.

    Args:
      files: identity files by person.
      settings: as `settings_of`.
      folder: of the method.

    Returns:
      Seconds and pictures of this call, and what could not be drawn.

    Raises:
      what `sampling.run.run` raises.
    """
    names, count = list(files), settings["num_images_per_prompt"]
    digests = {name: file_digest(file) for name, file in files.items()}
    alone = [prompt.text for prompt in prompts if OTHER not in prompt.text]
    todo: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        own = folder / safe_name(name)
        mine = {name: digests[name]}
        missing = tuple(text for text in alone if not _is_drawn(own, text, count, mine))
        todo.setdefault(missing, []).append(name)
    together, problems = _together(method, names, prompts)
    together = [text for text in together if not _is_drawn(folder, text, count, digests)]
    calls = [
        (people, texts, folder if len(people) > 1 else folder / safe_name(people[0]))
        for texts, people in todo.items()
        if texts
    ]
    if together:
        calls.append((names, tuple(together), folder))
    started, drawn = time.perf_counter(), 0
    for people, texts, where in calls:
        identity = [str(files[name]) for name in people]
        what = {"identity": identity, "prompt": list(texts), "save_dir": str(where)}
        drawn += count * len(sampling.run(sample_config(settings, **what)))
    return {"drawing": time.perf_counter() - started if calls else 0.0, "drawn": drawn}, problems


def _together(
    method: str, names: Sequence[str], prompts: Sequence[Asked]
) -> tuple[list[str], list[Problem]]:
    """The prompts with two people, by their names: each person with the one half way around."""
    shared = [prompt.text for prompt in prompts if OTHER in prompt.text]
    if not shared:
        return [], []
    if len(names) < 2:
        why = f"{len(shared)} prompts show two people, and there is one"
        return [], [Problem(method, names[0], OTHER, why)]
    texts, problems = [], []
    for number, name in enumerate(names):
        other = names[(number + len(names) // 2) % len(names)]
        if re.search("[{}]", name + other):
            why = f"their names cannot stand in braces: {name}, {other}"
            problems.append(Problem(method, name, OTHER, why))
            continue
        texts += [
            text.replace("{}", f"{{{name}}}").replace(OTHER, f"{{{other}}}") for text in shared
        ]
    return texts, problems


def _is_drawn(folder: Path, prompt: str, count: int, digests: Mapping[str, str]) -> bool:
    """Whether a prompt's pictures lie in a folder, all of them, and of these identity files. Those
    of earlier ones are removed; all other settings are those that the run is held to.

    Args:
      digests: of the identity files, by person.
    """
    own = folder / slug(prompt)
    try:
        about = json.loads((own / OURS).read_text(encoding="utf-8"))
        cast = about.get("identities") or {name: about["identity"] for name in digests}
        is_same = all(seen["sha256"] == digests.get(name) for name, seen in cast.items())
        is_ours = about["prompt"] == prompt
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    if not is_same:
        shutil.rmtree(own)
        return False
    return is_ours and sum(path.stem.isdigit() for path in own.glob("*.png")) == count
