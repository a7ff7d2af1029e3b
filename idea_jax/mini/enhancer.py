"""The drawn world as a source of people for a shared ID-Enhancer.

The world knows where the eyes are, so faces are not looked for: a detector would take an hour for
what the recogniser does in minutes, and its points, at the second look, are hardly worse.
"""

from collections.abc import Iterator

import jax
import numpy as np
from PIL import Image

from idea_jax import faces
from idea_jax.enhancer import sources
from idea_jax.face_table import Sight
from idea_jax.mini import captions, composites, drawings, people, traits
from idea_jax.pytrees import stream

SPLIT = "enhancer"
TEXTS = 3  # of a picture
BLOCK = 64  # people who are drawn together
# Deviation of a point from the true one, in sides of ArcFace's crop: a detector's at its best.
POINTS_OFF = 0.01
SMALL = (36.0, 160.0)  # sides of the crop on the small and turned version, in pixels
LICENCE = "MIT: drawn by a program, all people are made up"


def world(recogniser: faces.Recogniser, count: int, each: int, seed: int = 0) -> sources.Source:
    """A source of `count` people of the drawn world, with `each` pictures and their captions.

    None of them is in another split of `mini.people`.

    Args:
      recogniser: the mini's own.
    """
    everybody = people.unnamed(SPLIT, count)
    key = stream(jax.random.key(seed), "drawings for the enhancer")
    total = count * each
    scenes = drawings.random_scenes(stream(key, "scenes"), (total,))
    keys = jax.random.split(stream(key, "drawings"), total)

    def of_block(first: int, last: int) -> Iterator[sources.Person]:
        rows = np.arange(first * each, last * each)
        who = jax.tree.map(lambda leaf: leaf[rows // each], everybody)
        some = jax.tree.map(lambda leaf: leaf[rows], scenes)
        images = drawings.draw(who, some, keys[rows])
        points = drawings.points(who, some, keys[rows])
        for number in range(first, last):
            portraits = []
            for place in range(each):
                row = (number - first) * each + place
                rng = np.random.default_rng([seed, number, place, *b"enhancer"])
                words = captions.scene_words(traits.Scene(*(leaf[row] for leaf in some)))
                texts = tuple(captions.caption(rng, words, "{}") for _ in range(TEXTS))
                sight, turned = look(recogniser, rng, images[row], points[row])
                picture = sources.Drawn(
                    f"person {number}, picture {place}", Image.fromarray(images[row])
                )
                portraits.append(sources.Portrait(picture, texts, sight, turned))
            yield sources.Person(number, portraits)

    def from_place(first: int) -> Iterator[sources.Person]:
        for start in range(first, count, BLOCK):
            yield from of_block(start, min(start + BLOCK, count))

    facts = {"people": count, "each": each, "seed": seed, "texts": TEXTS}
    return sources.Source(
        "drawn world", LICENCE, count, from_place, facts, face_model=recogniser.sha256
    )


def look(
    recogniser: faces.Recogniser, rng: np.random.Generator, image: np.ndarray, points: np.ndarray
) -> tuple[Sight, np.ndarray]:
    """What is seen of the face on a drawing, and the embedding of a small or turned version of it.

    Args:
      image: uint8[64, 64, 3]; points: float32[5, 2].
    """
    picture = Image.fromarray(image)
    _, side = composites.crop_square(points.astype(float))
    seen = (points + rng.normal(0, POINTS_OFF * side, points.shape)).astype(np.float32)
    crop = faces.align(picture, seen)
    size = float(np.exp(rng.uniform(*np.log(SMALL))))
    angle = np.radians(rng.uniform(-composites.TURNED, composites.TURNED))
    larger, five = composites.turned(picture, points, size, angle)
    five = (five + rng.normal(0, POINTS_OFF * size, five.shape)).astype(np.float32)
    embed, turned = faces.embed_faces(recogniser, [crop, faces.align(larger, five)])
    box = np.concatenate([points.min(axis=0), points.max(axis=0)]).astype(np.float32)
    return Sight(box, seen, 1.0, "", embed), turned
