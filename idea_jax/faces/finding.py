"""From a picture to the face on it: find, choose, look again, and see whose it is.

The detector, the recogniser and the alignment are insightface's own. Embeddings are biometric data:
nothing here logs or prints them.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from idea_jax.data import images
from idea_jax.faces import packs
from idea_jax.faces import table as face_table
from idea_jax.faces.crops import align, alignment, face_crop, roll, turned_back
from idea_jax.faces.embedding import embed_faces
from idea_jax.faces.models import (
    SIZE,
    TRAINED_SMALL,
    Detector,
    FaceError,
    Recogniser,
    check_select,
    load_detector,
    load_recogniser,
)
from idea_jax.faces.table import Sight

log = logging.getLogger(__name__)

DET_SIZE = 640  # side of the detector's input, insightface's own default


# Until a face is found: side of the detector's input, threshold of its score, border around the
# picture as a share of its longer side. A face that fills the picture, or is cut by its edge, is
# found with a border, or when it is smaller; what is left is a face that is hard to see.
ATTEMPTS = (
    (DET_SIZE, 0.5, 0.0),
    (DET_SIZE, 0.5, 0.5),
    (DET_SIZE // 2, 0.5, 0.5),
    (DET_SIZE // 4, 0.5, 0.5),
    (DET_SIZE, 0.3, 0.0),
    (DET_SIZE // 2, 0.3, 0.5),
)


# The second look is at a square of this side around a face, in sides of its ArcFace crop: 2 to 3
# are alike on people of the mini's validation split, and better than 1.6 and 4.
LOOK_SIDE = 2.5

# What it sees is the same face if its crop's middle is no farther from that of the first look than
# this share of its side, and if neither side is more than so many times the other's. Points of the
# first look are off by less, and another face is farther away.
SAME_APART, SAME_SIZE = 0.3, 1.6

# A detector places the points of a face on its side, or upside down, as if it were nearly upright.
# One that seems to be turned by more than so many degrees is looked for in the turned picture.
# Upside down, what is left are the scores: that of the first look at the picture turned over has to
# be higher, and that of the second by this much. Of 237 upright pictures of the mini's validation
# split one is turned over so, by mistake.
ON_ITS_SIDE, SURER = 45.0, 0.03

# The side, in pixels of the picture, of a face's ArcFace crop below which a notice is due.
TINY = 32


class Face(NamedTuple):
    """A detected face, in pixels of the picture: box float32[4] (left, top, right, bottom), points
    float32[5, 2] (left eye, right eye, nose, corners of the mouth, as seen), score 0 to 1."""

    box: np.ndarray
    points: np.ndarray
    score: float


def detect(
    detector: Detector,
    image: Image.Image,
    *,
    size: int = DET_SIZE,
    threshold: float = 0.5,
    border: float = 0.0,
) -> list[Face]:
    """Returns the faces that the detector sees on an RGB picture, from left to right.

    Args:
      size: side of the detector's input in pixels; ignored by a model of one fixed size.
      threshold: least score.
      border: width of a grey border that is put around the picture, as a share of its longer
        side.

    Raises:
      FaceError: the detector cannot process the picture: too thin, or no SCRFD at all.
    """
    width, height = image.size
    # insightface shrinks with OpenCV's bilinear filter, which skips pixels of large photos. With a
    # wide border, the picture is made smaller for it.
    input_side = max(detector.model.static_input_size or (DET_SIZE,))
    shrink = max(width, height) * max(1, 0.5 + border) / (2 * input_side)
    if shrink > 1:
        image = image.resize((max(1, round(width / shrink)), max(1, round(height / shrink))))
    scale = np.array([width / image.width, height / image.height], np.float32)
    pixels = np.asarray(image)[:, :, ::-1]
    margin = round(border * max(image.size))
    if margin:
        pixels = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), constant_values=127)
    try:
        boxes, points = detector.model.detect(
            np.ascontiguousarray(pixels), input_size=(size, size), det_thresh=threshold
        )
    except Exception as error:  # of OpenCV, NumPy or onnxruntime, without a common base
        raise FaceError(
            f"the detector {detector.path} cannot process a picture of {width} x {height} pixels "
            f"({type(error).__name__}: {error}); crop a picture that is too thin, and see whether "
            "the file is an SCRFD detector with five points per face"
        ) from error
    boxes[:, :4] = (boxes[:, :4] - margin) * np.tile(scale, 2)
    points = (points - margin) * scale
    found = [
        Face(box[:4].astype(np.float32), five.astype(np.float32), float(box[4]))
        for box, five in zip(boxes, points, strict=True)
        if np.isfinite(box).all() and (box[2:4] > box[:2]).all()
    ]
    return sorted(found, key=lambda face: (face.box[0] + face.box[2], face.box[1]))


def attempts(detector: Detector) -> list[tuple[int, float, float]]:
    """Returns `ATTEMPTS` as a detector can make them.

    One with an input of a fixed size sees no smaller one; there the border is as wide as makes the
    face as small.
    """
    fixed = detector.model.static_input_size
    if fixed is None:
        return list(ATTEMPTS)
    return [
        (max(fixed), threshold, ((1 + 2 * border) * DET_SIZE / size - 1) / 2)
        for size, threshold, border in ATTEMPTS
    ]


def find_faces(detector: Detector, image: Image.Image, name: Any) -> list[Face]:
    """Returns the faces on a picture, from left to right, trying harder until there is one.

    Raises:
      FaceError: there is none, and the message has the picture's `name`; or the detector cannot
        process it in any way.
    """
    failures, ways = [], attempts(detector)
    for size, threshold, border in ways:
        try:
            found = detect(detector, image, size=size, threshold=threshold, border=border)
        except FaceError as error:  # a picture that is too thin is not so with a border
            failures.append(error)
            continue
        if found:
            if (size, threshold, border) != ways[0]:
                log.info(
                    "%s: a face was found only with detection size %d, threshold %g, border %g; "
                    "see whether it is the right one",
                    name,
                    size,
                    threshold,
                    border,
                )
            return found
    if len(failures) == len(ways):
        raise failures[0]
    raise FaceError(
        f"no face found in {name} ({image.width} x {image.height} pixels), neither as it is, nor "
        f"with a border, nor at smaller sizes, nor with a threshold of {ATTEMPTS[-1][1]}; take a "
        "photo with a larger, clearer face",
        advice=", or crop and align it to 112 x 112 yourself and use --pre_aligned",
    )


def choose(found: Sequence[Face], select: str, image_size: tuple[int, int], name: Any) -> Face:
    """Returns the face that `select` means: one of `face_models.SELECT`, or a number from the left.

    Args:
      found: at least one, from left to right, as `find_faces` returns them.
      image_size: width and height of the picture.

    Raises:
      FaceError: there is no face of that number.
    """
    index = _index(found, select, image_size, name)
    if len(found) > 1:
        log.info(
            "%s: %d faces; taken is number %d from the left (--face_select %s)",
            name,
            len(found),
            index,
            select,
        )
    return found[index]


def _index(found: Sequence[Face], select: str, image_size: tuple[int, int], name: Any) -> int:
    boxes = np.stack([face.box for face in found]).astype(np.float64)
    if select == "largest":
        index = int(np.argmax((boxes[:, 2:] - boxes[:, :2]).prod(axis=1)))
    elif select == "center":
        offsets = (boxes[:, :2] + boxes[:, 2:]) / 2 - np.array([image_size], np.float64) / 2
        index = int(np.argmin((offsets**2).sum(axis=1)))
    elif select in ("left", "right"):
        index = 0 if select == "left" else len(found) - 1
    else:
        index = int(select)
        if index >= len(found):
            raise FaceError(
                f"{name} has no face {index}: from the left they are 0 to {len(found) - 1}",
                advice=f" (--face_select {index})",
            )
    return index


def look_again(detector: Detector, image: Image.Image, face: Face) -> Face:
    """Returns a face as a second look sees it: cut out upright and large, and detected there.

    A detector places the points of a face that is small or turned worse, and a recogniser sees a
    crop by such points as somebody else. How much it is: `python -m idea_jax.mini.looks`.

    Args:
      image: RGB, the picture that `face` was found on.

    Returns:
      The face in pixels of the picture, its box that of the oval in the box of the second look;
      `face` itself where that look finds none, or none that could be the same.

    Raises:
      FaceError: as `alignment`, of the points that were given.
    """
    matrix = alignment(face.points)
    side = max(detector.model.static_input_size or (DET_SIZE,))
    turned, shift = _around(matrix, side)
    # What lies beyond the picture is as the border that the first look may have put around it.
    square = _cut_out(image, turned, shift, side)
    try:
        found = detect(detector, square)
    except FaceError:  # it did process the picture, so this is no reason to give up
        return face
    best, least = face, SAME_APART
    middle, size = _crop_of(matrix)
    for box, points, score in found:
        points = (points @ turned.T + shift).astype(np.float32)
        try:
            its_middle, its_size = _crop_of(alignment(points))
        except FaceError:
            continue
        apart = np.linalg.norm(its_middle - middle) / size
        if apart <= least and 1 / SAME_SIZE <= its_size / size <= SAME_SIZE:
            best, least = Face(_turned_box(box, turned, shift), points, score), apart
    return best


def find_face(detector: Detector, image: Image.Image, select: str, name: Any) -> Face:
    """Returns the face on a picture that `select` means, looked at twice, also where the picture
    lies on its side or is upside down.

    Raises:
      FaceError: as `find_faces`, `choose` and `alignment`.
    """
    try:
        found = find_faces(detector, image, name)
    except FaceError:
        turned = _on_turned(detector, image, select, name, (90, 270, 180))
        if turned is None:
            raise
        return look_again(detector, image, turned)
    face = choose(found, select, image.size, name)
    again = look_again(detector, image, face)
    if abs(roll(face.points)) > ON_ITS_SIDE:
        turned = _on_turned(detector, image, select, name, (90, 270))
        margin = 0.0
    else:
        turned = _on_turned(detector, image, select, name, (180,))
        margin = SURER
    if turned is None or turned.score <= face.score:
        return again
    turned = look_again(detector, image, turned)
    return turned if turned.score > again.score + margin else again


def _on_turned(
    detector: Detector, image: Image.Image, select: str, name: Any, turns: Sequence[int]
) -> Face | None:
    """Returns the surest face on the picture turned by some of 90, 180 and 270 degrees, in pixels
    of the picture as it is; None if there is none."""
    seen: list[Face] = []
    for degrees in turns:
        turned = image.transpose(getattr(Image.Transpose, f"ROTATE_{degrees}"))
        try:
            found = detect(detector, turned)
            face = found[_index(found, select, turned.size, name)] if found else None
            if face is not None:
                alignment(face.points)  # raises if they are no face's
        except FaceError:
            continue
        if face is not None:
            corners = turned_back(face.box.reshape(2, 2), degrees, image.size)
            box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
            seen.append(Face(box, turned_back(face.points, degrees, image.size), face.score))
    return max(seen, key=lambda face: face.score) if seen else None


def _crop_of(matrix: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns middle [2] and side, in pixels of the picture, of the crop of an `alignment`."""
    middle = np.full(2, (SIZE - 1) / 2)
    return np.linalg.solve(matrix[:, :2], middle - matrix[:, 2]), SIZE / np.hypot(*matrix[:, 0])


def _around(matrix: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the way, [2, 2] and [2], from the pixels of the square that a face is cut out to,
    `side` pixels wide, to those of the picture."""
    turned = np.linalg.inv(matrix[:, :2]) * (LOOK_SIDE * SIZE / side)
    middle, _ = _crop_of(matrix)
    return turned, middle - turned @ np.full(2, (side - 1) / 2)


def _cut_out(image: Image.Image, turned: np.ndarray, shift: np.ndarray, side: int) -> Image.Image:
    """Returns the square that `_around` leads from, grey beyond the picture."""
    # Averaged down first, as for the alignment.
    factor = max(1, int(np.hypot(*turned[:, 0])))
    if factor > 1:
        image = image.reduce(factor)
    # Pillow counts from the corner of a pixel, and not from its middle.
    corner = (shift + 0.5 - turned @ np.full(2, 0.5)) / factor
    turned = turned / factor
    return image.transform(
        (side, side),
        Image.Transform.AFFINE,
        (*turned[0], corner[0], *turned[1], corner[1]),
        Image.Resampling.BICUBIC,
        fillcolor=(127, 127, 127),
    )


def _turned_box(box: np.ndarray, turned: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Returns the upright box float32[4] in the picture, around the oval in a box of the square."""
    middle = turned @ ((box[:2] + box[2:]) / 2) + shift
    half = np.hypot(*(turned * (box[2:] - box[:2]) / 2).T)
    return np.concatenate([middle - half, middle + half]).astype(np.float32)


@dataclass(frozen=True)
class Finder:
    """Looks at pictures.

    Attributes:
      recogniser: None if only the place of the face is wanted.
      detector: None to take the central square, or with `pre_aligned` the whole, for the face.
      select: which of several faces is meant.
      pre_aligned: the pictures are aligned crops of 112 x 112 pixels.
      is_quiet: nothing is said of faces that are turned or tiny.
    """

    recogniser: Recogniser | None
    detector: Detector | None
    select: str = "largest"
    pre_aligned: bool = False
    is_quiet: bool = False

    @property
    def about(self) -> face_table.About:
        """What decides the results."""
        return about_of(
            self.recogniser.sha256 if self.recogniser else None,
            self.detector.sha256 if self.detector else None,
            self.select,
            self.pre_aligned,
        )

    def look(self, picture: images.PictureFile) -> Sight:
        """Returns what is known of the face on one picture.

        Raises:
          ImageError: the picture cannot be read.
          FaceError: it has no usable face; the message names the picture.
        """
        return self.look_at(picture.read(), picture)

    def look_at(self, image: Image.Image, name: Any) -> Sight:
        """Returns what is known of the face on an RGB picture.

        Raises:
          FaceError: it has no usable face; the message has the picture's `name`.
        """
        try:
            box, points, score, crop = self._crop(image, name)
            embed = embed_faces(self.recogniser, [crop])[0] if self.recogniser else None
        except FaceError as error:
            if str(name) in str(error):
                raise
            raise FaceError(f"{name}: {error.plain}", advice=error.advice) from error
        return Sight(box, points, score, hashlib.sha256(crop.tobytes()).hexdigest(), embed)

    def _crop(self, image: Image.Image, name: Any) -> tuple:
        if self.pre_aligned:
            from insightface.utils import face_align

            whole = np.array([0, 0, SIZE, SIZE], np.float32)
            crop = face_crop(image, pre_aligned=True)
            return whole, face_align.arcface_dst.copy(), 1.0, crop
        if self.detector is None:
            left, top, side = images.central_square(image.size)
            box = np.array([left, top, left + side, top + side], np.float32)
            return box, None, 1.0, face_crop(image, pre_aligned=False)
        face = find_face(self.detector, image, self.select, name)
        if not self.is_quiet:
            say_of(face, name, TRAINED_SMALL.get(getattr(self.recogniser, "sha256", None), TINY))
        return face.box, face.points, face.score, align(image, face.points)


def about_of(
    face_model: str | None, detector: str | None, select: str, pre_aligned: bool
) -> face_table.About:
    """What decides how faces are seen now, from the digests of the models and the settings."""
    # Only a detector can look again: upright, and upside down.
    return face_table.About(face_model, detector, select, pre_aligned, 1 if detector is None else 3)


def say_of(face: Face, name: Any, least: float) -> None:
    """Says what is to be known of a face: it lies on its side, or its crop is below `least`."""
    turned = roll(face.points)
    if abs(turned) > ON_ITS_SIDE:
        log.info(
            "%s: the face is turned by %.0f degrees; it was found so, but see whether the photo "
            "lies on its side",
            name,
            turned,
        )
    _, side = _crop_of(alignment(face.points))
    if side < least:
        log.info(
            "%s: the face is tiny: what is recognised of it is %.0f pixels wide, and is scaled up "
            "to %d. The embedding may be that of somebody else; take a photo with a larger face",
            name,
            side,
            SIZE,
        )


def open_finder(
    face_model: Path,
    *,
    provider: str = "cpu",
    select: str = "largest",
    pre_aligned: bool = False,
    embeds: bool = True,
    needs_detector: bool = True,
) -> Finder:
    """Loads a recogniser and the detector beside it.

    Args:
      face_model: the recogniser's file.
      embeds: whether embeddings are wanted; otherwise only the detector is loaded.
      needs_detector: otherwise, where there is no detector, the central square of a picture is
        taken for the face, with a warning. Aligned crops need none at all. A detector that is
        there but damaged is an error all the same.

    Raises:
      FaceError: a model is missing, or one of them cannot be used.
    """
    check_select(select)
    log.info("face model: %s (%s)", face_model.name, face_model.parent.name)
    recogniser = load_recogniser(face_model, provider) if embeds else None
    file = None if pre_aligned else detector_beside(face_model, needed=needs_detector)
    terms = packs.licence([path for path in (face_model if embeds else None, file) if path])
    if terms:
        log.info(terms)
    if file is None and not pre_aligned:
        log.warning(
            "there is no face detector beside %s: the central square of each photo is taken for "
            "the face; --face_model_dir PACK finds it",
            face_model.name,
        )
    detector = load_detector(file, provider) if file else None
    if recogniser or detector:
        log.info("the face models run on the %s", (recogniser or detector).provider)
    return Finder(recogniser, detector, select, pre_aligned)


def detector_beside(face_model: Path, *, needed: bool = True) -> Path | None:
    """Returns the detector that lies beside a recogniser; None if there is none.

    Raises:
      FaceError: there is none, but it is needed; or a file that could be it is damaged.
    """
    try:
        return packs.find_in_pack(face_model.parent, "detection")
    except packs.NotInPack:
        if needed:
            raise
        return None
