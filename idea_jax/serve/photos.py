"""Photos that clients send: looked at in memory, kept only where that was asked for.

Face embeddings are biometric data: nothing here logs or prints them.
"""

import dataclasses
import hashlib
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from idea_jax.data import images
from idea_jax.evaluation import looking
from idea_jax.faces import finding, portraits
from idea_jax.faces import models as face_models
from idea_jax.faces.crops import align, face_crop
from idea_jax.faces.embedding import embed_faces, mean_embedding
from idea_jax.serve.problems import printable
from idea_jax.serve.settings import MEGA, ServeConfig

SCORING = "face/scoring.onnx"  # of a checkpoint: a recogniser that nobody is learned with
KEPT_SIDE, KEPT_QUALITY = 4096, 95  # of photos that are kept


@dataclass(frozen=True)
class Upload:
    """A photo in memory; has what `images.PictureFile` has.

    Attributes:
      name: "photo 1" and so on, never the client's own file name.
      chosen: which of several faces, numbered from the left; None for the largest.
    """

    data: bytes
    name: str
    most_pixels: int
    chosen: int | None = None

    def read(self) -> Image.Image:
        """The picture, upright, 8-bit RGB.

        Raises:
          ImageError: it is none, damaged, or too large.
        """
        return images.decode_image(io.BytesIO(self.data), self.name, self.most_pixels)

    def sha256(self) -> str:
        """Hex digest of the bytes that were sent."""
        return hashlib.sha256(self.data).hexdigest()

    def kept(self) -> bytes:
        """The picture as it is kept: a JPEG of its pixels, without anything that came with them."""
        # A new picture: the one that was read has comments and more, which would be written, too.
        image = Image.fromarray(np.asarray(self.read()))
        image.thumbnail((KEPT_SIDE, KEPT_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=KEPT_QUALITY, subsampling=0)
        return buffer.getvalue()

    def __str__(self) -> str:
        return self.name


def uploads(cfg: ServeConfig, files: Sequence[bytes], chosen: Sequence[int | None]) -> list[Upload]:
    """Photos as they were sent, with the faces that were chosen on them."""
    most = cfg.max_photo_megapixels * MEGA
    return [
        Upload(data, f"photo {number}", most, face)
        for number, (data, face) in enumerate(zip(files, chosen, strict=True), 1)
    ]


class Sights:
    """All that the server sees of faces; for one thread at a time, which the lock is for.

    Attributes:
      finder: finds the face that a person is learned with.
      judge: says how alike a picture is; its recogniser may be another one.
    """

    def __init__(self, finder: finding.Finder, scores: face_models.Recogniser):
        self.finder, self.lock = finder, threading.Lock()
        self.judge = looking.Eyes(scores, finder.detector, None)

    def faces_on(self, photo: Upload) -> dict[str, Any]:
        """Size of a photo, and the faces on it; or what is wrong with it."""
        about: dict[str, Any] = {"width": None, "height": None, "faces": [], "chosen": None}
        about["problem"] = None
        try:
            image = photo.read()
            about |= {"width": image.width, "height": image.height}
            with self.lock:
                found = self._found(image, photo.name)
        except (images.ImageError, face_models.FaceError) as error:
            return about | {"problem": printable(error.plain)}
        areas = [float(np.prod(box[2:] - box[:2])) for box, _ in found]
        faces = [
            {"number": number, "box": [round(float(x), 1) for x in box], "score": round(score, 3)}
            for number, (box, score) in enumerate(found)
        ]
        return about | {"faces": faces, "chosen": int(np.argmax(areas))}

    def _found(self, image: Image.Image, name: str) -> list[tuple[np.ndarray, float]]:
        """(box, score) of each face, from left to right; where none is found upright, that of the
        picture turned.

        Raises:
          FaceError: there is none.
        """
        detector = self.finder.detector
        if detector is None:
            sight = self.finder.look_at(image, name)
            return [(sight.box, sight.score)]
        try:
            found = finding.find_faces(detector, image, name)
        except face_models.FaceError:
            face = finding.find_face(detector, image, "largest", name)
            return [(face.box, face.score)]
        return [(face.box, face.score) for face in found]

    def look(self, photos: Sequence[Upload], drop_outliers: bool) -> portraits.Portraits:
        """Looks at the photos of a person, each at the face that was chosen on it.

        Raises:
          ImageError, FaceError: a photo cannot be used; the message names it.
        """
        chooser = _Chooser(self.finder)
        with self.lock:
            return portraits.look(chooser, photos, embeds=True, drop_outliers=drop_outliers)  # type: ignore[arg-type]

    def face_of(self, seen: portraits.Portraits) -> np.ndarray:
        """What likeness to a person is told by: float32[512] of unit norm, as the judge sees them.

        Raises:
          FaceError: the judge cannot see them.
        """
        crops = []
        for picture, sight in zip(seen.pictures, seen.sights, strict=True):
            image = picture.read()
            if sight.points is None:
                crops.append(face_crop(image, pre_aligned=False))
            else:
                crops.append(align(image, sight.points))
        with self.lock:
            return mean_embedding(embed_faces(self.judge.recogniser, crops))

    def likeness(self, pixels: np.ndarray, faces: dict[str, np.ndarray]) -> dict[str, float]:
        """Cosine of each person's face with the most alike one on a picture uint8[H, W, 3]; empty
        where none is found on it.

        Args:
          faces: `face_of` of each, by name.
        """
        if not faces:
            return {}
        with self.lock:
            seen = self.judge.faces_on(Image.fromarray(pixels), "a picture")
        if not len(seen):
            return {}
        return {name: round(float((seen @ face).max()), 4) for name, face in faces.items()}


class _Chooser:
    """A finder that takes the face which was chosen on each photo."""

    def __init__(self, finder: finding.Finder):
        self.finder = finder

    def look(self, photo: Upload) -> Any:
        """What is known of that face; errors as of `Finder.look`."""
        if photo.chosen is None:
            return self.finder.look(photo)  # type: ignore[arg-type]
        own = dataclasses.replace(self.finder, select=str(photo.chosen))
        return own.look(photo)  # type: ignore[arg-type]


def open_sights(cfg: ServeConfig, checkpoint: Path) -> Sights:
    """Loads the face models.

    Raises:
      FaceError: one is missing, or cannot be used.
    """
    path = portraits.find_face_model(
        cfg.face_model, checkpoint, cfg.face_model_dir, accept_licence=cfg.accept_face_licence
    )
    finder = finding.open_finder(path, provider=cfg.face_provider, needs_detector=False)
    own = checkpoint / SCORING
    score = Path(cfg.score_model) if cfg.score_model else own if own.is_file() else None
    if score is None:
        return Sights(finder, finder.recogniser)
    return Sights(finder, face_models.load_recogniser(score, cfg.face_provider))
