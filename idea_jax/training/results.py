"""What one person's training shows and writes: losses, grids, identities, what was run."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idea_jax.config.reading import read_yaml, to_yaml
from idea_jax.config.settings import ConfigError, TrainConfig
from idea_jax.data import images, people, text
from idea_jax.data.tokenizer import Tokenizer
from idea_jax.errors import InputError
from idea_jax.formats import learned_embeds
from idea_jax.formats.enhancer import Enhancer
from idea_jax.formats.identity import (
    Identity,
    IdentityError,
    read_identity,
    write_identity,
)
from idea_jax.method import condition, shared
from idea_jax.models import sd
from idea_jax.runtime import files
from idea_jax.runtime.files import (
    atomic_write,
    cannot_write,
    slug,
)
from idea_jax.runtime.versions import versions
from idea_jax.sampling import programs
from idea_jax.training import tensorboard
from idea_jax.training.step import (
    IdentityState,
)


class TrainingError(InputError, RuntimeError):
    """A training that did not come to its end: a value is not finite, or some people failed."""


class OccupiedError(InputError, ValueError):
    """A folder holds somebody else, who would be lost; the message names both."""


@dataclass(frozen=True)
class Base:
    """What a run needs besides the person: the frozen model and its tokenizer, or neither if it
    takes no step."""

    model: sd.StableDiffusion
    frozen: sd.Frozen | None
    tokenizer: Tokenizer | None  # knows the placeholder
    name: str
    revision: str | None


class Results:
    """Everything that is shown and written of one person while they are trained, and at the end."""

    def __init__(
        self,
        cfg: TrainConfig,
        method: condition.Method,
        base: Base,
        output_dir: Path,
        validation: list[str],
        is_word: Callable[[str], bool],
        *,
        enhancer: Enhancer | None = None,
    ):
        self.cfg, self.method, self.base, self.output_dir = cfg, method, base, output_dir
        self.enhancer, self.is_word = enhancer, is_word
        self.token, _ = text.normalise_placeholder(cfg.placeholder_token)
        self.losses: list[tuple[int, float]] = []
        self.log = None
        if cfg.report_to == "tensorboard" and cfg.max_train_steps:
            self.log = tensorboard.Log(output_dir / cfg.logging_dir)
        self.validation_ids = base.tokenizer([*validation, ""]) if validation else None

    def report(self, step: int, values: dict[str, float], state: IdentityState | None) -> None:
        """Notes one step's metrics.

        Args:
          values: those of `Metrics`, by name.
          state: the one before the step; None if the step was finite.

        Raises:
          TrainingError: the step was not finite; the state, which such a step leaves as it was,
            has been saved, unless it is the first one.
        """
        if not values["finite"]:
            raise TrainingError(
                f"step {step}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}; "
                "stopped",
                advice=f". {self.save_last_good(state)}, or use --mixed_precision no",
            )
        self.losses.append((step, values["loss"]))
        if self.log:
            names = ("loss", "denoising", "regulariser", "grad_norm")
            self.log.scalars({f"train/{name}": values[name] for name in names}, step)

    def save_last_good(self, state: IdentityState) -> str:
        """Writes the state before a step that was not finite; says where it is and what to do."""
        good = int(state.step)
        if good == 0:
            return f"No step was finite: check the weights of {self.base.name}"
        path = self.output_dir / f"identity-steps-{good}.safetensors"
        try:
            self.save_identity(state, path)
        except IdentityError:
            return f"Step {good} had left values that are not finite. Lower the learning rate"
        return f"The identity after step {good} is in {path}. Lower the learning rate"

    def is_due(self, step: int) -> bool:
        """Whether anything is saved or drawn at this step."""
        cfg = self.cfg
        validates = self.validation_ids is not None and is_multiple(step, cfg.validation_steps)
        return validates or is_multiple(step, cfg.save_steps)

    def save_on_the_way(self, step: int, state: IdentityState, *, draws: bool = True) -> None:
        """Writes the identity and, if it `draws`, the validation grids of a step where they are
        due."""
        cfg = self.cfg
        if is_multiple(step, cfg.save_steps):
            self.save_embeds(state, self.output_dir / f"learned_embeds-steps-{step}.safetensors")
            if not cfg.only_save_embeds:
                self.save_identity(state, self.output_dir / f"identity-steps-{step}.safetensors")
        validates = draws and self.validation_ids is not None
        if validates and is_multiple(step, cfg.validation_steps):
            self.validate(step, state)

    def validate(self, step: int, state: IdentityState) -> None:
        """Draws the validation prompts with the current state, one grid per prompt."""
        cfg, base = self.cfg, self.base
        size = programs.picture_size(base.model, cfg.resolution, cfg.resolution)
        for prompt, ids in zip(cfg.validation_prompt, self.validation_ids[:-1], strict=True):
            kv = programs.prompt_keys_values(
                base.model,
                self.method,
                base.frozen,
                state.trainable,
                state.given,
                ids,
                self.validation_ids[-1],
                np.float32(1),
            )
            drawn = programs.draw_prompt(
                base.model,
                base.frozen,
                kv,
                programs.Sampling(size, "dpmpp_2m", steps=25),
                seed=cfg.seed,
                count=cfg.num_validation_images,
                batch_size=cfg.num_validation_images,
                guidance_scale=7.5,
            )
            grid = images.image_grid(list(drawn), len(drawn))
            name = f"step-{step:05d}-{slug(prompt)}.png"
            about = {"parameters": f"{prompt}, step {step}, seed {cfg.seed}"}
            images.save_png(self.output_dir / "validation" / name, grid, about)
            if self.log:
                self.log.image(f"validation/{slug(prompt)}", grid, step)

    def save_identity(self, state: IdentityState, path: Path) -> Path:
        """Writes the identity file of a state."""
        method, trainable, enhancer = self.method, state.trainable, None
        if self.enhancer is not None and self.cfg.self_contained:
            method, trainable = shared.self_contained(
                self.enhancer.config, method, self.enhancer.shared, trainable
            )
        elif self.enhancer is not None:
            enhancer = self.enhancer.sha256
        identity = Identity(
            method=method,
            trainable=trainable,
            given=state.given,
            placeholder=self.token,
            base_model=self.base.name,
            revision=self.base.revision,
            seed=self.cfg.seed,
            steps=int(state.step),
            enhancer=enhancer,
        )
        write_identity(path, identity)
        return path

    def save_embeds(self, state: IdentityState, path: Path) -> None:
        """Writes the pseudo tokens alone, in the form that diffusers loads."""
        about = {
            "base_model": self.base.name,
            "revision": self.base.revision or "unknown",
            "profile": self.method.profile,
            "steps": str(int(state.step)),
            "seed": str(self.cfg.seed),
        }
        tokens = jax.device_get(state.trainable["pseudo_tokens"])
        learned_embeds.write(path, self.token, tokens, about)

    def save_webui(self, state: IdentityState, folder: Path) -> None:
        """Writes the pseudo tokens for AUTOMATIC1111 and ComfyUI, where the file is the trigger."""
        path = folder / f"{learned_embeds.trigger_of(self.token, self.is_word)}.safetensors"
        tokens = jax.device_get(state.trainable["pseudo_tokens"])
        learned_embeds.write_webui(path, tokens, {})

    def save_run(
        self,
        steps: int,
        seconds: float,
        person: people.Person,
        photos: str,
        folder: Path,
    ) -> None:
        """Writes the resolved config (`--config` reads it back) and what came of it.

        `photos` is the digest of those that were trained on, by which the person is known again.
        The losses are those since the last start, which may have resumed an earlier one.
        """
        with atomic_write(folder / "config.yaml") as temporary:
            # Without the way this run was resumed, replaced another, or was published: the file
            # says how to learn the same again.
            unpublished: dict = {"push_to_hub": False, "publish_consent": False}
            unpublished |= {"hub_model_id": None, "hub_token": None}
            again = replace(self.cfg, resume_from_checkpoint=None, overwrite=False, **unpublished)
            temporary.write_text(to_yaml(again), "utf-8")
        if not self.losses and steps and (self.output_dir / "run.json").is_file():
            return  # nothing was left to do: what the file says of the run is still true
        about = {
            "base_model": self.base.name,
            "revision": self.base.revision,
            "steps": steps,
            "last_loss": self.losses[-1][1] if self.losses else None,
            "loss_curve": loss_curve(self.losses),
            "seconds": round(seconds, 1),
            "photos": photos,
            "held_out": [picture.name for picture in person.held_out],
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }
        if self.enhancer is not None:
            about["enhancer"] = self.enhancer.sha256
        files.write_json(folder / "run.json", about)

    def close(self) -> None:
        """Flushes the log."""
        if self.log:
            self.log.close()


@dataclass(frozen=True)
class Occupant:
    """Whom a folder of results holds, as far as the folder tells: their placeholder, the digest of
    their photos and where those were."""

    placeholder: str | None
    photos: str | None
    source: str | None


def occupant_of(folder: Path) -> Occupant | None:
    """The person whose results, or results on the way to them, lie in a folder; None if none do."""
    names = "identity.safetensors", "identity-steps-*.safetensors", "learned_embeds*.safetensors"
    found = [path for name in names for path in sorted(folder.glob(name))]
    if not found:
        return None
    placeholder, photos, source = None, None, None
    # Whoever cannot be read is not known to be the person of the next run; runs that did not end,
    # and those of earlier versions, left no note of the photos.
    with suppress(ValueError, OSError):
        if found[0].name.startswith("identity"):
            placeholder = read_identity(found[0]).placeholder
        else:
            (placeholder,) = learned_embeds.read(found[0])
    with suppress(ValueError, OSError, LookupError, TypeError):
        photos = json.loads((folder / "run.json").read_text("utf-8"))["photos"]
    with suppress(ConfigError, AttributeError):
        source = read_yaml(str(folder / "config.yaml")).get("train_data_dir")
    return Occupant(placeholder, photos, source)


def refuse_another(folder: Path, person: Occupant) -> None:
    """Refuses to train a person into a folder that holds another one.

    The same person may be trained again, with whatever settings. Of results without a note of the
    photos the placeholder, and where the photos were, tell whose they are.

    Raises:
      OccupiedError: it holds somebody else.
    """
    there = occupant_of(folder)
    if there is None:
        return
    has_same = there.photos == person.photos
    if there.photos is None:
        has_same = there.source in (person.source, None)
    if has_same and there.placeholder == person.placeholder:
        return
    first, second = (
        (p.placeholder or "somebody, in a file that cannot be read")
        + (f" of {p.source}" if p.source else "")
        for p in (there, person)
    )
    changed = ", which now holds other photos" if first == second else ""
    raise OccupiedError(
        f"{folder} holds {first}, and this run learns {second}{changed}; what was learned first "
        "would be lost: choose another --output_dir, delete that folder, or, where one person is "
        "trained alone, replace it with --overwrite"
    )


def remove_unfinished(cfg: TrainConfig, folder: Path) -> None:
    """Removes what an earlier training in a folder wrote on its way, of which the next one would
    replace only a part. Its results stay until `remove_finished`.

    Raises:
      WriteError: something cannot be removed.
    """
    ours = (
        "identity-steps-*.safetensors",
        "learned_embeds*-steps-*.safetensors",
        "validation/step-*.png",
        f"{cfg.logging_dir}/events*",
        "checkpoints/[0-9]*",
        "checkpoints/damaged-*",
    )
    try:
        for path in [path for pattern in ours for path in folder.glob(pattern)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    except OSError as error:
        raise cannot_write(folder, error) from error


def remove_finished(folder: Path, trigger: str) -> None:
    """Removes the one result of an earlier person that has another name than the next one's."""
    (folder / "webui" / f"{trigger}.safetensors").unlink(missing_ok=True)


def loss_curve(losses: list[tuple[int, float]], points: int = 40) -> list[tuple[int, float]]:
    """Means of at most `points` equal parts of (step, loss), each with its last step."""
    parts = np.array_split(np.array(losses, np.float64).reshape(-1, 2), points)
    return [(int(p[-1, 0]), float(f"{p[:, 1].mean():.6g}")) for p in parts if len(p)]


def is_multiple(step: int, every: int) -> bool:
    """Whether something that happens every N steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


def check_finite(values: Any, source: str) -> None:
    """Raises TrainingError if a frozen network gave values, in a tree, that are not finite."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values)):
        raise TrainingError(
            f"{source} gives values that are not finite: check its weights",
            advice=", and use --mixed_precision no",
        )
