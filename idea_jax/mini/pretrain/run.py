"""What the stages of a pretraining share: its folders, its settings, its drawings."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
from filelock import FileLock
from tqdm import tqdm

from idea_jax.data.tokenizer import Tokenizer, load_tokenizer
from idea_jax.errors import InputError
from idea_jax.mini import (
    drawings,
    people,
)
from idea_jax.mini.pretrain.budget import Budget
from idea_jax.models import sd
from idea_jax.pytrees import stream
from idea_jax.runtime.files import write_json

TEXT_LENGTH = 40  # positions of the text encoder


# In the work folder: what the autoencoder is trained with, and the captions.
JUDGE, RECOGNISER = "judge.safetensors", "recogniser.safetensors"

CAPTIONS = "captions.safetensors"
RECORD = "pretraining.json"  # in the checkpoint: how it was made
SUMS = "SHA256SUMS"  # as sha256sum writes and checks them


class PretrainError(InputError, ValueError):
    """A run that cannot be begun or continued as it was asked for."""


@dataclass
class Run:
    """Where a run writes to and what its stages share."""

    folder: Path
    work: Path
    budget: Budget
    seed: int
    quiet: bool = False
    before: float = 0.0  # seconds of training of a stage before it was interrupted

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed)

    def progress(self, rows: range, what: str) -> Iterator:
        return tqdm(rows, desc=what, disable=self.quiet)

    def named(self) -> drawings.Drawings:
        return drawings.drawings(
            self.budget.drawings,
            0.06,
            stream(self.key, "drawings of named people"),
            self.work / "drawings" / "named",
            lambda rows: self.progress(rows, "drawing named people"),
        )

    def portraits(self, split: str) -> drawings.DrawnPortraits:
        return drawings.portraits(
            people.unnamed(split, self.budget.people),
            self.budget.each,
            stream(self.key, f"drawings for {split}"),
            self.work / "drawings" / split,
            lambda rows: self.progress(rows, f"drawing for {split}"),
        )

    def made_before(self, name: str) -> Path:
        """Returns a file of the work folder. Raises: PretrainError if there is none."""
        if not (self.work / name).is_file():
            raise PretrainError(
                f"{self.work / name} is missing: another --work was used, or an earlier version; "
                "choose another folder and begin anew"
            )
        return self.work / name

    def load(self) -> tuple[sd.StableDiffusion, sd.Frozen, Tokenizer]:
        with self.lock():
            model, frozen = sd.load(self.folder)
        text = model.text
        tokenizer = load_tokenizer(
            self.folder / "tokenizer", text.vocab_size, text.max_position_embeddings
        )
        return model, frozen, tokenizer

    def save(self, model: sd.StableDiffusion, frozen: sd.Frozen, *parts: str) -> None:
        """Writes parts of the checkpoint, each in the layout of `sd.save`; the others stay."""
        with self.lock():
            sd.save(self.folder, model, frozen, dtype="float16", parts=parts)

    def lock(self) -> FileLock:
        """For what several stages write, which may run at the same time."""
        return FileLock(self.work / ".lock")


def write_record(folder: Path, record: dict) -> None:
    """Writes what is known of a run."""
    write_json(folder / RECORD, record, indent=1)
