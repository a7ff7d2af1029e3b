"""One person's photos and the face on them, for training and for drawing straight from photos."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from idea_jax.config.settings import SampleConfig, TrainConfig
from idea_jax.faces import embedding, finding, packs
from idea_jax.faces import models as face_models
from idea_jax.faces import table as face_table

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Portraits:
    """One person as a run sees them.

    Attributes:
      pictures: those that are used.
      sights: the face on each of them; empty where no face is needed.
      id_embed: float32[512] of unit norm; None where no embedding is wanted.
    """

    pictures: list
    sights: list[face_table.Sight]
    id_embed: np.ndarray | None


def find_face_model(
    face_model: str | None,
    checkpoint_folder: Path,
    face_model_dir: str | None = None,
    *,
    accept_licence: bool = False,
) -> Path:
    """The ArcFace file of a run: the one given, the checkpoint's own, or an installed pack's.

    Raises:
      FaceError: there is none; see `packs.find_recogniser`.
    """
    return packs.find_recogniser(
        face_model, face_model_dir, checkpoint_folder / "face", accept_licence=accept_licence
    )


def open_eyes(
    cfg: TrainConfig | SampleConfig, checkpoint_folder: Path, *, embeds: bool, places: bool
) -> finding.Finder | face_table.FaceTable:
    """What tells the face on a picture: computed before, or found now.

    Args:
      embeds: whether embeddings are wanted.
      places: whether it must be known where the face is, so that the central square will not do.

    Raises:
      FaceError: a file or a model is missing or cannot be used.
    """
    if cfg.face_embeddings is not None:
        return face_table.read(cfg.face_embeddings)
    path = find_face_model(
        cfg.face_model,
        checkpoint_folder,
        cfg.face_model_dir,
        accept_licence=cfg.accept_face_licence,
    )
    # A pack must have a detector; a recogniser that was given alone, or by a checkpoint, need not.
    alone = cfg.face_model is not None or path.parent == checkpoint_folder / "face"
    return finding.open_finder(
        path,
        provider=cfg.face_provider,
        select=cfg.face_select,
        pre_aligned=cfg.pre_aligned,
        embeds=embeds,
        needs_detector=not alone or places or cfg.face_select != "largest",
    )


def look(
    eyes: finding.Finder | face_table.FaceTable,
    pictures: Sequence,
    *,
    embeds: bool,
    drop_outliers: bool,
) -> Portraits:
    """Looks at a person's pictures; leaves out those of somebody else, if asked to.

    Of precomputed faces, pictures without a row are reported and left out: they were named when the
    table was made.

    Args:
      embeds: whether an embedding is wanted; then only can somebody else be told.

    Raises:
      ImageError: a picture cannot be read.
      FaceError: a picture has no usable face, or none is among the precomputed ones.
    """
    shown = tqdm(pictures, desc="faces", unit="img", leave=False, disable=None)
    looked, missing = [], []
    for picture in shown:
        try:
            looked.append((picture, eyes.look(picture)))
        except face_models.FaceError as error:
            if not isinstance(eyes, face_table.FaceTable):
                raise
            missing.append(error)
    if not looked:
        raise missing[0]
    for reason in missing:
        log.warning("left out: %s", reason)
    pictures, sights = [picture for picture, _ in looked], [sight for _, sight in looked]
    if not embeds:
        return Portraits(pictures, sights, None)
    found = np.stack([sight.embed for sight in sights])
    unlike, similarities = embedding.unlike(found)
    for index in np.flatnonzero(unlike):
        log.warning(
            "%s is unlike the other photos (similarity %.2f to their mean, %.2f is usual here): "
            "another person, or another face on it? %s",
            pictures[index].name,
            similarities[index],
            np.median(similarities),
            "It is left out" if drop_outliers else "--drop_outliers leaves it out",
        )
    if drop_outliers:
        kept = np.flatnonzero(~unlike)
        pictures, sights = [pictures[i] for i in kept], [sights[i] for i in kept]
        found = found[kept]
    return Portraits(pictures, sights, embedding.mean_embedding(found))
