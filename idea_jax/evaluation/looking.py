"""What the networks see on pictures: faces and CLIP's embedding, looked at once for each content.

The results are kept in `seen/`, found by the SHA-256 of a picture's bytes, so that a run that is
started again looks at nothing twice. Face embeddings are biometric data: the files are private, and
nothing here logs or prints them.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from idea_jax.data import images
from idea_jax.evaluation.clip import Clip
from idea_jax.faces import finding
from idea_jax.faces import models as face_models
from idea_jax.faces.crops import align, face_crop
from idea_jax.faces.embedding import embed_faces
from idea_jax.runtime.files import file_digest, json_digest, write_tensors

log = logging.getLogger(__name__)

FACES = 6  # of a picture, the largest ones
CHUNK = 32  # pictures of a file in `seen/`: what an interruption costs at most


class Look(NamedTuple):
    """What was seen on one picture.

    Attributes:
      faces: float32[F, 512] of unit norm, the largest face first.
      image: float32[D] of unit norm, CLIP's; of length 0 without a CLIP.
    """

    faces: np.ndarray
    image: np.ndarray


@dataclass(frozen=True, eq=False)
class Eyes:
    """The networks that score.

    Attributes:
      detector: None to take the central square of each picture for the face.
      clip: None if prompts and pictures are not compared.
    """

    recogniser: face_models.Recogniser
    detector: face_models.Detector | None
    clip: Clip | None

    @property
    def about(self) -> dict:
        """What decides the results, by digests."""
        return {
            "recogniser": self.recogniser.sha256,
            "detector": self.detector.sha256 if self.detector else None,
            "clip": self.clip.digest if self.clip else None,
            "faces": FACES,
            "version": 1,
        }

    def faces_on(self, image: Image.Image, name: str) -> np.ndarray:
        """Returns float32[F, 512]: the faces on an RGB picture, the largest first."""
        try:
            if self.detector is None:
                return embed_faces(self.recogniser, [face_crop(image, pre_aligned=False)])
            found = finding.find_faces(self.detector, image, name)
        except face_models.FaceError:  # no face, or a picture that is too thin to hold one
            return np.zeros((0, face_models.WIDTH), np.float32)
        found = sorted(found, key=lambda face: -np.prod(face.box[2:] - face.box[:2]))[:FACES]
        embeds = [np.zeros((0, face_models.WIDTH), np.float32)]
        for face in found:
            try:
                face = finding.look_again(self.detector, image, face)
                embeds.append(embed_faces(self.recogniser, [align(image, face.points)]))
            except face_models.FaceError:  # points that are those of no face
                continue
        return np.concatenate(embeds)


def open_eyes(score_model: Path, clip: Clip | None, *, crop: str, provider: str) -> Eyes:
    """Loads the recogniser that scores, and the detector that lies beside it.

    Args:
      crop: "face", or "center" to take the central square of each picture for the face.

    Raises:
      FaceError: a model is missing or cannot be used.
    """
    recogniser = face_models.load_recogniser(score_model, provider)
    detector = None
    if crop == "face":
        file = finding.detector_beside(score_model)
        detector = face_models.load_detector(file, provider)
    return Eyes(recogniser, detector, clip)


def look_at(
    eyes: Eyes, paths: Iterable[Path], folder: Path
) -> tuple[dict[Path, Look], dict[Path, str], dict[Path, str]]:
    """Looks at pictures, but for those whose content was looked at before with the same networks.

    Args:
      folder: `seen/` of the run.

    Returns:
      What was seen, the SHA-256 of each file, and why the others cannot be read.
    """
    folder = folder / json_digest(eyes.about)[:16]
    known = _read_all(folder)
    digests: dict[Path, str] = {}
    errors: dict[Path, str] = {}
    for path in dict.fromkeys(paths):
        try:
            digests[path] = file_digest(path)
        except OSError as error:
            errors[path] = f"it cannot be read: {error.strerror}"
    todo = {digest: path for path, digest in digests.items() if digest not in known}
    rows = list(todo.items())
    with tqdm(total=len(rows), desc="looking", unit="img", leave=False, disable=None) as bar:
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            seen, broken = _look_at_some(eyes, part)
            errors |= broken
            if seen:
                _write(folder / f"{next(iter(seen))[:32]}.safetensors", seen)
            known |= seen
            bar.update(len(part))
    reasons = {digests[path]: why for path, why in errors.items() if path in digests}
    errors |= {p: reasons[d] for p, d in digests.items() if d in reasons}
    looks = {path: known[digest] for path, digest in digests.items() if digest in known}
    return looks, digests, errors


def _look_at_some(
    eyes: Eyes, rows: Sequence[tuple[str, Path]]
) -> tuple[dict[str, Look], dict[Path, str]]:
    read, faces, broken = {}, {}, {}
    for digest, path in rows:
        try:
            read[digest] = images.read_image(path)
            faces[digest] = eyes.faces_on(read[digest], path.name)
        except images.ImageError as error:
            broken[path] = str(error).replace(str(path), path.name)  # reports are passed on
    empty = np.zeros((len(read), 0), np.float32)
    embeds = eyes.clip.embed_images(list(read.values())) if eyes.clip else empty
    return {
        digest: Look(faces[digest], image) for digest, image in zip(read, embeds, strict=True)
    }, broken


def _write(path: Path, seen: dict[str, Look]) -> None:
    tensors = {
        "sha256": np.stack([np.frombuffer(bytes.fromhex(digest), np.uint8) for digest in seen]),
        "counts": np.array([len(look.faces) for look in seen.values()], np.int32),
        "faces": np.concatenate([look.faces for look in seen.values()]),
        "images": np.stack([look.image for look in seen.values()]),
    }
    write_tensors(path, tensors, {}, private=True)


def _read_all(folder: Path) -> dict[str, Look]:
    """What earlier runs have seen; a damaged file is looked past."""
    from safetensors.numpy import load_file

    known = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors = load_file(path)
            edges = np.cumsum(tensors["counts"])[:-1]
            faces = np.split(tensors["faces"], edges)
            for row, own, image in zip(tensors["sha256"], faces, tensors["images"], strict=True):
                known[row.tobytes().hex()] = Look(own, image)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            log.warning("%s cannot be used (%s); its pictures are looked at again", path, error)
    return known


def thumbnail(path: Path, side: int) -> Image.Image:
    """Returns a picture scaled down to at most `side` pixels, RGB.

    Raises:
      ImageError: it cannot be read.
    """
    image = images.read_image(path)
    image.thumbnail((side, side))
    return image
