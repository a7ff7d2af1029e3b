"""What is cut out around a face: ArcFace's aligned crop, and the square that is trained on."""

import warnings

import numpy as np
from PIL import Image

from idea_jax.data import images
from idea_jax.faces.models import SIZE, FaceError


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


def roll(points: np.ndarray) -> float:
    """Returns by how many degrees a face is turned clockwise, as its points have it: -180 to 180.

    Raises:
      FaceError: as `alignment`.
    """
    matrix = alignment(points)
    return float(np.degrees(np.arctan2(matrix[0, 1], matrix[0, 0])))


def turned_back(points: np.ndarray, degrees: int, size: tuple[int, int]) -> np.ndarray:
    """Returns points float32[N, 2] of a turned picture in pixels of the picture as it was.

    Args:
      degrees: by how much it was turned counter-clockwise: 90, 180 or 270.
      size: its width and height before.
    """
    x, y = np.asarray(points, np.float32).T
    right, bottom = np.float32(size[0] - 1), np.float32(size[1] - 1)
    places = {90: (right - y, x), 180: (right - x, bottom - y), 270: (y, bottom - x)}
    return np.stack(places[degrees], axis=-1)


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
