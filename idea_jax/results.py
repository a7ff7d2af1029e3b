"""What one person's training shows and writes: losses, grids, identities, what was run."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np

from idea_jax import checkpoint, learned_embeds, sample, tensorboard
from idea_jax.config import TrainConfig, to_yaml
from idea_jax.data import images, people, text
from idea_jax.files import atomic_write, slug
from idea_jax.formats.enhancer import Enhancer
from idea_jax.method import condition, shared
from idea_jax.models import sd
from idea_jax.train_step import IdentityState


class TrainingError(RuntimeError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Base:
    """What a run needs besides the person: the frozen model and its tokenizer, or neither if it
    takes no step."""

    model: sd.StableDiffusion
    frozen: sd.Frozen | None
    tokenizer: text.Tokenizer | None  # knows the placeholder
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
        *,
        enhancer: Enhancer | None = None,
    ):
        self.cfg, self.method, self.base, self.output_dir = cfg, method, base, output_dir
        self.enhancer = enhancer
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
                f"stopped. {self.save_last_good(state)}, or use --mixed_precision no"
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
        except checkpoint.IdentityError:
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
        for prompt, ids in zip(cfg.validation_prompt, self.validation_ids[:-1], strict=True):
            kv = sample.prompt_keys_values(
                self.method,
                base.model,
                base.frozen,
                state.trainable,
                state.given,
                ids,
                self.validation_ids[-1],
                np.float32(1),
            )
            drawn = sample.draw_prompt(
                base.model,
                base.frozen,
                kv,
                seed=cfg.seed,
                count=cfg.num_validation_images,
                batch_size=cfg.num_validation_images,
                size=sample.picture_size(base.model, cfg.resolution, cfg.resolution),
                scheduler="dpmpp_2m",
                steps=25,
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
        identity = checkpoint.Identity(
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
        checkpoint.write_identity(path, identity)
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
        vectors = np.asarray(state.trainable["pseudo_tokens"])
        learned_embeds.write(path, self.token, vectors, about)

    def save_webui(self, state: IdentityState, folder: Path) -> None:
        """Writes the pseudo tokens for AUTOMATIC1111 and ComfyUI, where the file is the trigger."""
        name = re.sub(r"[^a-z0-9]+", "-", self.token).strip("-") or "person"
        path = folder / f"{name}.safetensors"
        learned_embeds.write_webui(path, np.asarray(state.trainable["pseudo_tokens"]), {})

    def save_run(
        self,
        steps: int,
        seconds: float,
        person: people.Person,
        folder: Path,
    ) -> None:
        """Writes the resolved config (`--config` reads it back) and what came of it.

        The losses are those since the last start, which may have resumed an earlier one.
        """
        with atomic_write(folder / "config.yaml") as temporary:
            # Without the way this run was resumed: the file says how to do all of it again.
            temporary.write_text(to_yaml(replace(self.cfg, resume_from_checkpoint=None)), "utf-8")
        if not self.losses and steps and (self.output_dir / "run.json").is_file():
            return  # nothing was left to do: what the file says of the run is still true
        about = {
            "base_model": self.base.name,
            "revision": self.base.revision,
            "steps": steps,
            "last_loss": self.losses[-1][1] if self.losses else None,
            "loss_curve": loss_curve(self.losses),
            "seconds": round(seconds, 1),
            "held_out": [picture.name for picture in person.held_out],
            "device": jax.devices()[0].device_kind,
            "versions": checkpoint.versions(),
        }
        if self.enhancer is not None:
            about["enhancer"] = self.enhancer.sha256
        sample.write_json(folder / "run.json", about)

    def close(self) -> None:
        """Flushes the log."""
        if self.log:
            self.log.close()


def loss_curve(losses: list[tuple[int, float]], points: int = 40) -> list[tuple[int, float]]:
    """Means of at most `points` equal parts of (step, loss), each with its last step."""
    parts = np.array_split(np.array(losses, np.float64).reshape(-1, 2), points)
    return [(int(p[-1, 0]), float(f"{p[:, 1].mean():.6g}")) for p in parts if len(p)]


def is_multiple(step: int, every: int) -> bool:
    """Whether something that happens every N steps (0: never) happens at this one."""
    return every > 0 and step % every == 0
