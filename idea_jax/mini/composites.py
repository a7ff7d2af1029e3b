"""Pictures that a face detector learns from: drawings of people in larger pictures, or nobody.

A drawing fills the picture, as most pictures of the drawn world do; or it stands anywhere in it,
small and turned, and its background goes on to all sides; or several are pasted on something else.
"""

from typing import NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 256  # of the pictures
FACES = 5  # at most, on one picture
# Sides of the smallest and the largest face's ArcFace crop, in pixels, and by how many degrees a
# face is turned at most. Others are not learned.
SMALLEST, LARGEST = 36, 220
TURNED = 50

# What is to be said of a face: nothing, as there is none; that it is there; or, of one that the
# picture's edge cuts in two, whatever one likes.
NONE, WHOLE, CUT = 0, 1, -1


class Drawn(NamedTuple):
    """Drawings to make pictures of, with P people on each."""

    images: np.ndarray  # uint8[N, S, S, 3]
    points: np.ndarray  # float32[N, P, 5, 2]: world.landmarks


class Composite(NamedTuple):
    image: np.ndarray  # uint8[SIZE, SIZE, 3]
    points: np.ndarray  # float32[FACES, 5, 2], in pixels
    state: np.ndarray  # int32[FACES]: NONE, WHOLE or CUT


def crop_square(points: np.ndarray | jax.Array) -> tuple:
    """Returns centre [..., 2] and side [...] of ArcFace's crop by points [..., 5, 2].

    The similarity is the least squares one from insightface's template to the points.
    """
    from insightface.utils import face_align

    template = face_align.arcface_dst[:, 0] + 1j * face_align.arcface_dst[:, 1]
    arms = template - template.mean()
    five = points[..., 0] + 1j * points[..., 1]
    middle = five.mean(-1)
    factor = five @ arms.conj() / (arms @ arms.conj()).real
    centre = middle + factor * (55.5 + 55.5j - template.mean())
    xp = np if isinstance(points, np.ndarray) else jax.numpy
    return xp.stack([centre.real, centre.imag], axis=-1), 112 * abs(factor)


def compose(rng: np.random.Generator, alone: Drawn, pairs: Drawn) -> Composite:
    """Returns one picture.

    Args:
      alone: drawings of one person each.
      pairs: drawings of two.
    """
    kinds = {"filled": 0.25, "pair": 0.1, "around": 0.2, "pasted": 0.4, "nobody": 0.05}
    kind = rng.choice(list(kinds), p=list(kinds.values()))
    if kind == "around":
        image, points = _moved(*_pick(rng, alone), **_anywhere(rng), endless=True)
    elif kind in ("filled", "pair"):
        image, points = _moved(*_pick(rng, pairs if kind == "pair" else alone), **_filling(rng))
    else:
        image, points = _background(rng, alone), []
        for _ in range(rng.integers(1, FACES + 1) if kind == "pasted" else 0):
            image, points = _paste(rng, image, points, *_pick(rng, alone))
    width, height = SIZE, SIZE
    if rng.random() < 0.2:  # a picture that is no square is filled up with black
        width = rng.integers(SIZE // 2, SIZE)
    elif rng.random() < 0.2:
        height = rng.integers(SIZE // 2, SIZE)
    pixels = _as_taken(rng, image)
    pixels[height:], pixels[:, width:] = 0, 0
    known, state = np.zeros((FACES, 5, 2), np.float32), np.full(FACES, NONE, np.int32)
    for number, five in enumerate(points):
        known[number], state[number] = five - 0.5, _state(five, (width, height))
    return Composite(pixels, known, state)


def placed(
    rng: np.random.Generator, image: np.ndarray, points: np.ndarray, *, side: float, degrees: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a picture with one face of known size and turn, and that face's points, in pixels.

    Args:
      image: uint8[S, S, 3], a drawing of one person; its background goes on to all sides.
      points: float32[5, 2], of the drawing.
      side: of the face's crop, which lies inside the picture.
      degrees: by which it is turned, clockwise.

    Returns:
      uint8[SIZE, SIZE, 3], of some light, perhaps blurred or noisy; float32[5, 2].
    """
    centre = rng.uniform(side / 2, SIZE - side / 2, 2)
    picture, (five,) = _moved(
        Image.fromarray(image),
        points[None].astype(float) + 0.5,
        side,
        np.radians(degrees),
        centre,
        endless=True,
    )
    return _as_taken(rng, picture), (five - 0.5).astype(np.float32)


_drawn: list[Drawn] = []


def share(alone: Drawn, pairs: Drawn) -> None:
    """Tells this process what `composed` draws with: too much to be sent along with each call."""
    _drawn[:] = alone, pairs


def composed(count: int, rng: np.random.Generator) -> Composite:
    """Returns `count` pictures by `compose`: leaves with a leading axis."""
    made = [compose(rng, *_drawn) for _ in range(count)]
    return Composite(*map(np.stack, zip(*made, strict=True)))


def turned(
    image: Image.Image, points: np.ndarray, side: float, angle: float
) -> tuple[Image.Image, np.ndarray]:
    """Returns a picture of SIZE with one drawing's face in its middle, and its points [5, 2].

    Args:
      points: float[5, 2], as `world.landmarks` has them.
      side: of the face's ArcFace crop, in pixels.
      angle: by which it is turned, in radians.
    """
    centre = np.full(2, SIZE / 2)
    five = np.asarray(points, float)[None] + 0.5
    moved, (five,) = _moved(image, five, side, angle, centre, endless=True)
    return moved, five - 0.5


# Below, points are float64[P, 5, 2] in pixels from the corner of the picture, as Pillow has it.


def _pick(rng: np.random.Generator, drawn: Drawn) -> tuple[Image.Image, np.ndarray]:
    """Returns a drawing, perhaps mirrored, and its points."""
    row = rng.integers(len(drawn.images))
    image, points = Image.fromarray(drawn.images[row]), drawn.points[row].astype(float) + 0.5
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        points = (points * [-1, 1] + [image.width, 0])[:, [1, 0, 2, 4, 3]]
    return image, points


def _filling(rng: np.random.Generator) -> dict:
    """Returns how a drawing is moved that is all of the picture, or nearly."""
    if rng.random() < 0.5:
        return {"side": None, "angle": 0.0, "centre": np.full(2, SIZE / 2)}
    centre = SIZE / 2 + rng.uniform(-0.1, 0.1, 2) * SIZE
    return {"side": None, "angle": rng.uniform(-0.4, 0.4), "centre": centre}


def _anywhere(rng: np.random.Generator) -> dict:
    """Returns how a drawing is moved: the side of its face's crop, radians, where the face is."""
    side = np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST)))
    angle = np.radians(rng.uniform(-TURNED, TURNED))
    return {"side": side, "angle": angle, "centre": rng.uniform(0.0, 1.0, 2) * SIZE}


def _moved(
    image: Image.Image,
    points: np.ndarray,
    side: float | None,
    angle: float,
    centre: np.ndarray,
    *,
    window: np.ndarray | tuple[int, ...] = (0, 0, SIZE, SIZE),
    endless: bool = False,
) -> tuple[Image.Image, np.ndarray]:
    """Returns a picture with the drawing in it, its edges drawn out to all sides, and the points.

    Args:
      side: of the first face's crop; its middle then comes to `centre`. Without, the drawing is
        as large as the picture, and it is the drawing's middle.
      window: the part of the picture that is returned: left, top, right, bottom.
      endless: drawn out as far as the picture goes, not only half as far as the drawing does.
    """
    zoom, pivot = SIZE / image.width, np.full(2, image.width / 2)
    if side is not None:
        pivot, own = crop_square(points[0])
        zoom = side / own
    matrix = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    margin = round(1.5 * SIZE / zoom) if endless else image.width // 2
    drawn_out = np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), "edge")
    left, top, right, bottom = window
    back = np.linalg.inv(matrix)
    shift = pivot + margin - back @ (centre - [left, top])
    turned = Image.fromarray(drawn_out).transform(
        (int(right - left), int(bottom - top)),
        Image.Transform.AFFINE,
        (*back[0], shift[0], *back[1], shift[1]),
        Image.Resampling.BILINEAR,
    )
    return turned, (points - pivot) @ matrix.T + centre


def _paste(
    rng: np.random.Generator,
    picture: Image.Image,
    before: list[np.ndarray],
    image: Image.Image,
    points: np.ndarray,
) -> tuple[Image.Image, list[np.ndarray]]:
    """Returns the picture with one more person and the points of all; as it is, where the new one
    would cover somebody."""
    move = _anywhere(rng)
    centre, angle = move["centre"], move["angle"]
    # What is seen of the drawing: all of its square, or an oval around the head, more or less soft.
    reach, oval = move["side"] * rng.uniform(0.6, 0.8, 2), rng.random() < 0.5
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * reach
    if not oval:
        corners = corners @ np.array(
            [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
        )
    low, high = centre + corners.min(0) - 4, centre + corners.max(0) + 4
    if any(np.all((five.max(0) > low) & (five.min(0) < high)) for five in before):
        return picture, before
    low, high = (np.clip(at, 0, SIZE).astype(int) for at in (low, high))
    if np.any(high - low < 2):
        return picture, before
    on_top, (five,) = _moved(image, points, **move, window=(*low, *high))
    mask = Image.new("L", on_top.size, 0)
    middle = centre - low
    if oval:
        ImageDraw.Draw(mask).ellipse([*(middle - reach), *(middle + reach)], fill=255)
        mask = mask.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.05) * move["side"])))
    else:
        ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners + middle], fill=255)
    picture.paste(on_top, (int(low[0]), int(low[1])), mask)
    return picture, [*before, five]


def _background(rng: np.random.Generator, drawn: Drawn) -> Image.Image:
    """Returns a picture of nobody: colours, shapes, pieces of drawings too small to be a face."""
    kind = rng.choice(["plain", "smooth", "pieces"])
    if kind == "plain":
        pixels = rng.integers(0, 256, (1, 1, 3))
    elif kind == "smooth":
        pixels = rng.integers(0, 256, (*rng.integers(1, 9, 2), 3))
    else:
        count = rng.integers(6, 13)
        rows = rng.integers(0, len(drawn.images), (count, count))
        x, y = rng.integers(0, drawn.images.shape[1] - 8, (2, count, count))
        pieces = [
            [drawn.images[r, b : b + 8, a : a + 8] for r, a, b in zip(*line, strict=True)]
            for line in zip(rows, x, y, strict=True)
        ]
        pixels = np.concatenate([np.concatenate(line, axis=1) for line in pieces])
    image = Image.fromarray(pixels.astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(0, 15)):
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        x, y = rng.uniform(0, SIZE, 2)
        a, b = np.exp(rng.uniform(np.log(3), np.log(SIZE / 2), 2))
        box = (x - a, y - b, x + a, y + b)
        shape = rng.integers(4)
        if shape == 0:
            pen.ellipse(box, fill=colour)
        elif shape == 1:
            pen.rectangle(box, fill=colour)
        elif shape == 2:
            pen.line(box, fill=colour, width=int(rng.integers(1, 12)))
        else:  # two of them, as eyes are
            pen.ellipse(box, fill=colour)
            pen.ellipse((box[0] + 2.5 * a, box[1], box[2] + 2.5 * a, box[3]), fill=colour)
    return image


def _as_taken(rng: np.random.Generator, image: Image.Image) -> np.ndarray:
    """Returns the pixels, perhaps blurred, of other light, noisy."""
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2))))
    pixels = np.asarray(image, np.float32) * rng.normal(1, 0.1, 3) + rng.normal(0, 10)
    if rng.random() < 0.3:
        noise = rng.standard_normal(pixels.shape, np.float32)
        pixels = pixels + np.float32(rng.uniform(0, 8)) * noise
    return pixels.clip(0, 255).astype(np.uint8)


def _state(five: np.ndarray, size: tuple[int, int]) -> int:
    """Returns what is to be said of a face: it may be cut, but not in two."""
    inside = np.sum(np.all((five >= 0) & (five < size), axis=-1))
    centre, side = crop_square(five)
    if inside >= 4 and np.all((centre >= 0) & (centre < size)):
        return WHOLE
    return NONE if np.any((centre < -side / 2) | (centre > size + side / 2)) else CUT
