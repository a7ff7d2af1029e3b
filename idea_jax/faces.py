"""From a picture to the embedding of the face on it: find, choose, look again, align, embed.

The detector, the recogniser and the alignment are insightface's own. Embeddings are biometric data:
nothing here logs or prints them. `python -m idea_jax.faces DIR --out FILE` computes them once for a
folder of pictures or a data set, so that training needs neither the models nor onnxruntime.
"""

import argparse
import hashlib
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from idea_jax import config, face_models, face_table
from idea_jax.data import images, people
from idea_jax.face_models import (
    SIZE,
    WIDTH,
    Detector,
    FaceError,
    Recogniser,
    check_select,
    load_detector,
    load_recogniser,
)
from idea_jax.face_table import Sight
from idea_jax.files import check_writable, say

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

# A photo is unlike the others if its similarity to their mean lies this many standard deviations
# below the median (robustly estimated), and by at least this much. The first is the usual limit of
# the median rule; the second keeps photos that are all alike from being told apart by noise.
OUTLIER_DEVIATIONS = 3.0
OUTLIER_LEAST = 0.15


class Face(NamedTuple):
    """A detected face, in pixels of the picture: box float32[4] (left, top, right, bottom), points
    float32[5, 2] (left eye, right eye, nose, corners of the mouth, as seen), score 0 to 1."""

    box: np.ndarray
    points: np.ndarray
    score: float


# --- finding a face -------------------------------------------------------------------------------


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


def find_faces(detector: Detector, image: Image.Image, name: object) -> list[Face]:
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
                    *(name, size, threshold, border),
                )
            return found
    if len(failures) == len(ways):
        raise failures[0]
    raise FaceError(
        f"no face found in {name} ({image.width} x {image.height} pixels), neither as it is, nor "
        f"with a border, nor at smaller sizes, nor with a threshold of {ATTEMPTS[-1][1]}; take a "
        "photo with a larger, clearer face, or crop and align it to 112 x 112 yourself and use "
        "--pre_aligned"
    )


def choose(found: Sequence[Face], select: str, image_size: tuple[int, int], name: object) -> Face:
    """Returns the face that `select` means: one of `face_models.SELECT`, or a number from the left.

    Args:
        found: at least one, from left to right, as `find_faces` returns them.
        image_size: width and height of the picture.

    Raises:
        FaceError: there is no face of that number.
    """
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
                f"--face_select {index}, but {name} has {len(found)} face(s), numbered from the "
                f"left: 0 to {len(found) - 1}"
            )
    if len(found) > 1:
        log.info(
            "%s: %d faces; taken is number %d from the left (--face_select %s)",
            *(name, len(found), index, select),
        )
    return found[index]


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


# --- crops ----------------------------------------------------------------------------------------


def alignment(points: np.ndarray) -> np.ndarray:
    """Returns the similarity float64[2, 3] that brings five points [5, 2] to ArcFace's template.

    Raises:
        FaceError: the points are not finite, coincide, or do not lie as on a face.
    """
    from insightface.utils import face_align

    points = np.asarray(points, np.float32)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise FaceError("the five points of the face are not finite")
    if np.ptp(points, axis=0).max() < 2:
        raise FaceError("the five points of the face coincide")
    with warnings.catch_warnings():
        # The scikit-image call in it is marked for removal.
        warnings.simplefilter("ignore", FutureWarning)
        matrix = face_align.estimate_norm(points, SIZE)
    template = face_align.arcface_dst
    # Mean distance to the template, in pixels of the crop. Of a face in profile it is below 10;
    # half the spread of the template means that the points say nothing of where a face is.
    error = np.linalg.norm(points @ matrix[:, :2].T + matrix[:, 2] - template, axis=1).mean()
    spread = np.linalg.norm(template - template.mean(axis=0), axis=1).mean()
    if not np.isfinite(matrix).all() or not error < spread / 2:
        raise FaceError("the five points of the face do not lie as on a face")
    return matrix


def align(image: Image.Image, points: np.ndarray) -> np.ndarray:
    """Returns the aligned crop uint8[112, 112, 3] of an RGB picture, black beyond its edge.

    Raises:
        FaceError: as `alignment`.
    """
    from insightface.utils import face_align

    matrix = alignment(points)
    # A large face is averaged down first, to no less than twice the crop's resolution: the bilinear
    # filter of the alignment would skip pixels.
    factor = int(0.5 / np.hypot(*matrix[:, 0]))
    if factor > 1:
        image = image.reduce(factor)
        points = (np.asarray(points) + 0.5) / factor - 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return face_align.norm_crop(np.asarray(image), np.asarray(points, np.float32), SIZE)


def training_square(
    points: np.ndarray, image_size: tuple[int, int], margin: float = 1.0
) -> tuple[tuple[float, float], int, float]:
    """Returns the square to train on, as `images.crop_turned` takes it: centre, side and angle.

    It is that of FFHQ and CelebA-HQ, from the eyes and the mouth, `margin` times as large: it turns
    with the face, which is upright in it. It is moved, and if it must be, made smaller, to lie
    inside the picture.

    Source: arXiv 1710.10196, appendix C (c, s and x).
    """
    eyes, mouth = points[:2].mean(axis=0), points[3:].mean(axis=0)
    across, down = points[1] - points[0], mouth - eyes
    angle = float(np.arctan2(across[1] - down[0], across[0] + down[1]))
    side = margin * max(4.0 * np.hypot(*across), 3.6 * np.hypot(*down))
    # Of the upright square around the turned one.
    reach = abs(np.cos(angle)) + abs(np.sin(angle))
    side = max(1, min(round(side), int(min(image_size) / reach)))
    half = np.minimum(side * reach, image_size) / 2
    x, y = (eyes + 0.1 * down).clip(half, np.array(image_size) - half)
    return (float(x), float(y)), side, angle


def face_crop(image: Image.Image, *, pre_aligned: bool) -> np.ndarray:
    """Returns the RGB crop uint8[112, 112, 3] that the recogniser takes.

    Args:
        image: 8-bit RGB.
        pre_aligned: `image` is an aligned 112x112 crop already and is used as it is. Otherwise its
            central square is scaled, without looking for a face.

    Raises:
        FaceError: `image` is not RGB, or `pre_aligned` and not 112x112.
    """
    if image.mode != "RGB":
        raise FaceError(f"expected an RGB picture, got mode {image.mode}")
    if not pre_aligned:
        # Cropped first: with `box`, Pillow's filter would reach beyond the square.
        square = images.crop_square(image, images.central_square(image.size))
        return np.array(square.resize((SIZE, SIZE), resample=Image.Resampling.BICUBIC))
    if image.size != (SIZE, SIZE):
        width, height = image.size
        raise FaceError(
            f"expected an aligned crop of {SIZE} x {SIZE} pixels, got {width} x {height}; "
            "leave out --pre_aligned for an ordinary photo"
        )
    return np.array(image)


def embed_faces(recogniser: Recogniser, crops: Sequence[np.ndarray]) -> np.ndarray:
    """Returns float32[P, 512] of unit norm for P crops uint8[112, 112, 3] in RGB.

    Raises:
        FaceError: there is no crop, one has another shape or dtype, the model cannot process it, or
            its embedding is not finite or zero.
    """
    if len(crops) == 0:
        raise FaceError("expected at least one face crop, got none")
    embeds = []
    for index, crop in enumerate(crops):
        crop = np.asarray(crop)
        if crop.shape != (SIZE, SIZE, 3) or crop.dtype != np.uint8:
            raise FaceError(
                f"expected face crop {index} to be uint8[{SIZE}, {SIZE}, 3], "
                f"got {crop.dtype}{list(crop.shape)}"
            )
        # insightface works on OpenCV's channel order, and swaps it back before the network. One at
        # a time, since some exported models have a fixed batch of one.
        bgr = np.ascontiguousarray(crop[:, :, ::-1])
        try:
            embeds.append(recogniser.model.get_feat(bgr).reshape(-1))
        except Exception as error:  # of OpenCV or onnxruntime, without a common base
            raise FaceError(
                f"the face model {recogniser.path} cannot process a crop "
                f"({type(error).__name__}: {error}); see whether it is an ArcFace model"
            ) from error
    return _normalise(np.stack(embeds), "the embedding of face crop")


def mean_embedding(embeds: np.ndarray) -> np.ndarray:
    """Returns float32[512] of unit norm: the normalised mean of unit embeddings float32[P, 512].

    Raises:
        FaceError: wrong shape, a value that is not finite, or embeddings that cancel out.
    """
    embeds = np.asarray(embeds, np.float32)
    if embeds.ndim != 2 or embeds.shape[0] == 0:
        raise FaceError(f"expected embeddings [P, {WIDTH}] with P >= 1, got {list(embeds.shape)}")
    mean = embeds.astype(np.float64).mean(axis=0, keepdims=True)
    return _normalise(mean, "the mean embedding")[0]


def unlike(embeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of P photos are unlike the others, bool[P], and similarities to the mean [P].

    Of fewer than three photos nobody can tell.

    Args:
        embeds: float32[P, 512] of unit norm.
    """
    similarities = np.asarray(embeds, np.float64) @ mean_embedding(embeds).astype(np.float64)
    median = np.median(similarities)
    # 1.4826 makes the median deviation that of a normal distribution.
    deviation = 1.4826 * np.median(np.abs(similarities - median))
    limit = median - max(OUTLIER_DEVIATIONS * deviation, OUTLIER_LEAST)
    return (similarities < limit) & (len(embeds) >= 3), similarities


def _normalise(embeds: np.ndarray, what: str) -> np.ndarray:
    embeds = embeds.astype(np.float64)
    norms = np.linalg.norm(embeds, axis=1, keepdims=True)
    bad = ~np.isfinite(norms[:, 0]) | (norms[:, 0] < 1e-6)
    if bad.any():
        rows = ", ".join(str(row) for row in np.flatnonzero(bad))
        raise FaceError(
            f"{what} (row {rows}) is zero or not finite; check the picture and the face model"
        )
    return (embeds / norms).astype(np.float32)


# --- one picture ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finder:
    """Looks at pictures.

    Attributes:
        recogniser: None if only the place of the face is wanted.
        detector: None to take the central square, or with `pre_aligned` the whole, for the face.
        select: which of several faces is meant.
        pre_aligned: the pictures are aligned crops of 112 x 112 pixels.
    """

    recogniser: Recogniser | None
    detector: Detector | None
    select: str = "largest"
    pre_aligned: bool = False

    @property
    def about(self) -> face_table.About:
        """What decides the results."""
        return _about(
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

    def look_at(self, image: Image.Image, name: object) -> Sight:
        """Returns what is known of the face on an RGB picture.

        Raises:
            FaceError: it has no usable face; the message has the picture's `name`.
        """
        try:
            box, points, score, crop = self._crop(image, name)
            embed = embed_faces(self.recogniser, [crop])[0] if self.recogniser else None
        except FaceError as error:
            named = str(name) in str(error)
            raise FaceError(str(error) if named else f"{name}: {error}") from error
        return Sight(box, points, score, hashlib.sha256(crop.tobytes()).hexdigest(), embed)

    def _crop(self, image: Image.Image, name: object) -> tuple:
        if self.pre_aligned:
            from insightface.utils import face_align

            whole = np.array([0, 0, SIZE, SIZE], np.float32)
            crop = face_crop(image, pre_aligned=True)
            return whole, face_align.arcface_dst.copy(), 1.0, crop
        if self.detector is None:
            left, top, side = images.central_square(image.size)
            box = np.array([left, top, left + side, top + side], np.float32)
            return box, None, 1.0, face_crop(image, pre_aligned=False)
        face = choose(find_faces(self.detector, image, name), self.select, image.size, name)
        face = look_again(self.detector, image, face)
        return face.box, face.points, face.score, align(image, face.points)


def _about(
    face_model: str | None, detector: str | None, select: str, pre_aligned: bool
) -> face_table.About:
    """What decides how faces are seen now, from the digests of the models and the settings."""
    # Only a detector can look twice.
    return face_table.About(face_model, detector, select, pre_aligned, 1 if detector is None else 2)


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
    terms = face_models.licence([path for path in (face_model if embeds else None, file) if path])
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
        return face_models.find_in_pack(face_model.parent, "detection")
    except face_models.NotInPack:
        if needed:
            raise
        return None


# --- many pictures, once --------------------------------------------------------------------------


def precompute(
    pictures: Sequence[images.PictureFile], out: Path, finder: Finder, *, seconds: float = 30.0
) -> list[tuple[object, str]]:
    """Adds the faces of pictures to the table at `out`; returns the pictures that failed, and why.

    Pictures whose contents are in the table are not looked at again. The table is saved on the way
    and when anything stops the work, so that the same call goes on with it; then the pictures that
    failed are printed, too.

    Args:
        seconds: least time from one save to the next; each writes the whole table.

    Raises:
        FaceError: `out` is a table that was made in another way, or no table.
        WriteError: it cannot be written.
    """
    about, rows, names = finder.about, {}, {}
    if out.exists():
        table = read_table(out, about)
        rows, names = dict(table.rows), dict(table.names)
    saved, saved_at = len(rows), time.monotonic()

    def save():
        face_table.write(out, face_table.Table(about, rows, names))

    failed = []
    try:
        for picture in tqdm(pictures, unit="img", disable=None):
            try:
                digest = picture.sha256()
                names[digest] = picture.name  # first: no row may be without its name
                if digest not in rows:
                    rows[digest] = finder.look(picture)
            except (FaceError, images.ImageError, OSError) as error:
                failed.append((picture, str(error)))
            if len(rows) > saved and time.monotonic() - saved_at >= seconds:
                save()
                saved, saved_at = len(rows), time.monotonic()
    finally:
        try:
            if len(rows) > saved:
                save()
        finally:
            _print_failed(failed, len(pictures))
    return failed


def read_table(path: Path, about: face_table.About) -> face_table.Table:
    """Reads a table that rows can be added to.

    Raises:
        FaceError: it was made in another way than rows are made now, or it is no table.
    """
    table = face_table.read(path)
    if table.about != about:
        raise FaceError(
            f"{path} was made with {table.about}, now it is {about}; choose another --out, or "
            "delete the file"
        )
    return table


def _print_failed(failed: list[tuple[object, str]], count: int) -> None:
    if failed:
        print(f"{len(failed)} of {count} pictures cannot be used:", file=sys.stderr)
        width = max(len(picture.name) for picture, _ in failed)
        for picture, why in failed:
            print(f"  {picture.name:{width}}  {why}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the precomputation; returns the exit code, 1 if no picture had a face."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    args = _parser().parse_args(argv)
    try:
        config.check_sources("a folder", args.folder, args.dataset, args.dataset_dir)
        if args.identities is not None and args.dataset is None:
            raise config.ConfigError("--identities has no effect without --dataset")
        config.check_finding(args)
    except config.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        check_select(args.face_select)
        pictures = _pictures(args)
        if args.out.is_dir():
            raise FaceError(
                f"--out {args.out} is a folder; give a file, such as {args.out}/faces.safetensors"
            )
        check_writable(args.out.resolve().parent)
        if args.out.exists():
            face_table.read(args.out)  # a file that is no table is refused before any download
        face_model = face_models.find_recogniser(
            args.face_model, args.face_model_dir, None, accept_licence=args.accept_face_licence
        )
        if args.out.exists():  # and one of other models before these are loaded
            detector = None if args.pre_aligned else detector_beside(face_model)
            digests = (_digest(file) for file in (face_model, detector))
            read_table(args.out, _about(*digests, args.face_select, args.pre_aligned))
        finder = open_finder(
            face_model,
            provider=args.face_provider,
            select=args.face_select,
            pre_aligned=args.pre_aligned,
        )
        failed = precompute(pictures, args.out, finder)
    except (FaceError, images.ImageError, people.PeopleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with {args.out}", file=sys.stderr)
        return 130
    if len(failed) == len(pictures):
        return 1
    say(str(args.out))
    return 0


def _pictures(args: argparse.Namespace) -> list:
    if args.dataset is None:
        paths, skipped = images.list_tree(args.folder)
        images.report_skipped(skipped)
        return [images.PictureFile(path) for path in paths]
    people.places(args.identities)  # it takes minutes until they are needed
    log.info(people.LICENCE)
    chosen = people.choose(people.from_celeb_a(args.dataset_dir), args.identities)
    return [picture for pictures in chosen.values() for picture in pictures]


def _digest(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise FaceError(f"the face model {file} cannot be read: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.faces",
        description="Compute the face embeddings of a folder of photos, and of its sub-folders, or "
        "of a data set, once; training reads them with --face_embeddings. The same command goes on "
        "where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="folder of photos, or of one folder per person"
    )
    parser.add_argument("--dataset", choices=("celeb_a",), help="data set, instead of a folder")
    parser.add_argument(
        "--dataset_dir", help="folder in which tensorflow-datasets prepared it, as array_record"
    )
    parser.add_argument("--identities", help="people of the data set, FROM:TO (default: all)")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--face_model_dir", help="folder of an insightface pack")
    parser.add_argument("--face_model", help="ArcFace model; its detector lies beside it")
    parser.add_argument("--accept_face_licence", action="store_true", help="allow the download")
    parser.add_argument("--face_provider", choices=tuple(face_models.PROVIDERS), default="cpu")
    parser.add_argument("--face_select", default="largest", help="which of several faces")
    parser.add_argument("--pre_aligned", action="store_true", help="photos are 112x112 crops")
    return parser


if __name__ == "__main__":
    sys.exit(main())
