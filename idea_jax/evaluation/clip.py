"""CLIP's view of pictures and texts, with the preprocessing that its weights were trained with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from idea_jax.data.tokenizer import Tokenizer, load_tokenizer
from idea_jax.models import clip, hub
from idea_jax.models.clip import ClipModel, Preprocessing

BATCH = 16  # pictures, or texts, in one call


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP with all that it needs.

    Attributes:
      name: Hub id or the folder's name, for reports.
      digest: of its weights' file; embeddings of different models cannot be compared.
    """

    model: ClipModel
    params: Any
    tokenizer: Tokenizer
    name: str
    digest: str

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Returns float32[N, D] of unit norm; texts that are too long lose their end, as in CLIP.

        Raises:
          TextError: a text is no valid Unicode.
        """
        ids = self.tokenizer(list(texts))
        ends = np.argmax(ids == self.tokenizer.eos, axis=1).astype(np.int32)
        return self._batches(
            lambda rows: clip.embed_texts(self.model, self.params, ids[rows], ends[rows]), len(ids)
        )

    def embed_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Returns float32[N, D] of unit norm for RGB pictures of any size."""
        pixels = [preprocess(image, self.model.preprocessing) for image in images]
        return self._batches(
            lambda rows: clip.embed_images(
                self.model, self.params, np.stack([pixels[row] for row in rows])
            ),
            len(pixels),
        )

    def _batches(self, embed: Any, count: int) -> np.ndarray:
        """Calls of one shape: the last one is filled up."""
        found = [np.zeros((0, self.model.vision.projection_dim), np.float32)]
        for first in range(0, count, BATCH):
            rows = np.minimum(np.arange(first, first + BATCH), count - 1)
            found.append(np.asarray(embed(rows))[: count - first])
        return np.concatenate(found)


def load(name_or_path: str) -> Clip:
    """Loads a CLIP from a local folder or a Hub id.

    Raises:
      CheckpointNotFound, WeightsError, UnsupportedConfig, TextError: it cannot be had or used.
    """
    from idea_jax.runtime.files import file_digest

    folder = hub.resolve_clip(name_or_path)
    model, params = clip.load(folder)
    beside = not model.has_text_projection
    tokenizer = load_tokenizer(
        folder / "tokenizer" if beside else folder,
        model.text.vocab_size,
        model.text.max_position_embeddings,
    )
    weights = folder / "image_encoder" / "model.safetensors"
    digest = file_digest(weights if beside else folder / "model.safetensors")
    name = name_or_path if not Path(name_or_path).is_dir() else folder.resolve().name
    return Clip(model, params, tokenizer, name, digest)


def preprocess(image: Image.Image, how: Preprocessing) -> np.ndarray:
    """Returns float32[side, side, 3] as CLIP's own preprocessing gives it for an RGB picture.

    The shortest edge is resized (bicubic, 8-bit), the central square cut out, black where the
    picture ends, and each channel normalised.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(how.shortest_edge * long / short)
    size = (how.shortest_edge, other) if width <= height else (other, how.shortest_edge)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = ((side - how.side) // 2 for side in size)
    image = image.crop((left, top, left + how.side, top + how.side))
    pixels = np.asarray(image).astype(np.float32) / np.float32(255)
    return (pixels - np.array([[how.mean]], np.float32)) / np.array([[how.std]], np.float32)
