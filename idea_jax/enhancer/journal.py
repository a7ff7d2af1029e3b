"""What a training of the shared enhancer says of itself."""

import logging
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from idea_jax.data import images
from idea_jax.enhancer import likeness
from idea_jax.enhancer.beginning import EnhancerWork
from idea_jax.enhancer.step import (
    EnhancerMetrics,
)
from idea_jax.training import tensorboard
from idea_jax.training.results import TrainingError

log = logging.getLogger(__name__)


class Journal:
    """What a run says of itself; in processes other than the first it only watches.

    Raises (all methods): WriteError, the log cannot be written.
    """

    def __init__(self, work: EnhancerWork, out: Path, taken: int):
        cfg = work.cfg
        self.work, self.out = work, out
        self.losses: list[tuple[int, float]] = []
        self.likeness: list[dict] = []
        self.waited: list[float] = []
        self.similar: list[tuple[float, float]] = []  # sums of similarities, how many faces
        self.log = None
        if cfg.report_to == "tensorboard" and work.first:
            self.log = tensorboard.Log(out / cfg.logging_dir)
        self.bar = tqdm(
            total=cfg.max_train_steps,
            initial=taken,
            unit="step",
            disable=None if work.first else True,
        )

    def step(
        self,
        number: int,
        metrics: EnhancerMetrics,
        drawn: tuple[jax.Array, jax.Array] | None = None,
    ) -> bool:
        """Notes one step; returns whether any process has been asked to stop.

        Args:
          drawn: sum of the similarities of those who were drawn in the step, and on how many
            drawings a face was found; None if nobody was drawn.

        Raises:
          TrainingError: it was not finite.
        """
        values = {name: value.item() for name, value in jax.device_get(metrics)._asdict().items()}
        if not values["finite"]:
            raise TrainingError(
                f"step {number}: loss {values['loss']:g}, gradient norm {values['grad_norm']:g}"
            )
        self.losses.append((number, values["loss"]))
        shown = {f"train/{name}": values[name] for name in ("loss", "grad_norm")}
        if drawn is not None:
            similar, found = map(float, drawn)
            self.similar.append((similar, found))
            shown["train/faces_found"] = found / self.work.cfg.id_loss_drawings
            if found:
                shown["train/likeness"] = similar / found
        if self.log:
            self.log.scalars(shown, number)
        self.bar.update()
        said = f"loss {np.mean([loss for _, loss in self.losses[-50:]]):.4f}"
        likened = self.likeness_of_drawings()
        if likened is not None and likened["mean"] is not None:
            said += f", likeness {likened['mean']:.3f}"
        self.bar.set_postfix_str(said, refresh=False)
        tenth = max(1, self.work.cfg.max_train_steps // 10)
        if self.bar.disable and self.work.first and number % tenth == 0:
            log.info("step %d of %d: %s", number, self.bar.total, said)
        return values["stop"] > 0

    def likeness_of_drawings(self) -> dict[str, float | None] | None:
        """Of the last 50 steps' drawings: "mean", the likeness of those on which a face was found
        (None if none was), and "found", their share; None if nobody was drawn."""
        if not self.similar:
            return None
        similar, found = np.sum(self.similar[-50:], axis=0)
        drawn = len(self.similar[-50:]) * self.work.cfg.id_loss_drawings
        mean = round(float(similar / found), 4) if found else None
        return {"mean": mean, "found": round(float(found / drawn), 4)}

    def wait(self, number: int, share: float) -> None:
        """Notes the share of time in which the training waited for its samples."""
        self.waited.append(share)
        if self.log:
            self.log.scalars({"train/share_waited": share}, number)

    def validation(self, number: int, found: likeness.Likeness) -> None:
        """Notes likeness at 0 steps, and writes the grid."""
        log.info("step %d: %s", number, likeness.about(found))
        values = {"mean": found.mean, "worst": found.worst, "found": found.found}
        self.likeness.append({"step": number, **{k: round(v, 4) for k, v in values.items()}})
        about = {"parameters": f"{self.work.cfg.validation_prompt}, 0 steps, step {number}"}
        images.save_png(self.out / "validation" / f"step-{number:06d}.png", found.grid, about)
        if self.log:
            self.log.scalars({f"likeness/{k}": v for k, v in values.items()}, number)
            self.log.image("likeness/grid", found.grid, number)

    def close(self) -> None:
        self.bar.close()
        if self.log:
            self.log.close()
