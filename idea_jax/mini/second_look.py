"""What the second look at a face is worth: small and turned faces, with it and without.

One drawing of each person is put into larger pictures, of every size and turned by every angle of
the table, and its face is found and embedded there. Reported is the similarity to the mean of the
recogniser's embeddings of other drawings of the same person, upright and aligned by their true
points. The second look's settings were chosen on the split validation. The library of
`python -m idea_jax.mini.looks`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from idea_jax.faces import embedding, finding
from idea_jax.faces import models as face_models
from idea_jax.faces.crops import align, turned_back
from idea_jax.mini import composites, drawings, people
from idea_jax.pytrees import stream

DEGREES = (0, 10, 20, 30, 40, 50)
SIDES = (36, 50, 70, 110, 220)  # of the face's crop, in pixels of a picture of composites.SIZE
EACH = 6  # drawings of a person: one that is looked at, the others to compare with


class Seen(NamedTuple):
    """One face on one picture, and its similarities."""

    degrees: int
    side: int
    person: int
    first: float  # as the first look sees it
    second: float  # after the second look
    best: float  # by its true points


class LookRow(NamedTuple):
    """Of some of the faces: means, and 1.96 standard errors of the mean gain."""

    name: str
    faces: int
    first: float
    second: float
    best: float
    uncertain: float


def look(
    finder: finding.Finder, split: str, count: int, seed: int = 0, turn: int = 0
) -> list[Seen]:
    """Looks at the first `count` people of a split, once for each size and angle.

    Faces that are not found at all are left out.

    Args:
      turn: by how many degrees whole pictures are turned counter-clockwise: 0, 90, 180 or 270.
    """
    key = stream(jax.random.key(seed), f"looks {split}")
    set_ = drawings.portraits(people.unnamed(split, count), EACH, key)
    rng = np.random.default_rng([seed, *b"looks"])

    def embed(image: Image.Image, points: np.ndarray) -> np.ndarray:
        return embedding.embed_faces(finder.recogniser, [align(image, points)])[0]

    seen = []
    for person in range(count):
        rows = np.flatnonzero(set_.who == person)
        own = [embed(Image.fromarray(set_.images[row]), set_.points[row]) for row in rows]
        for degrees in DEGREES:
            for side in SIDES:
                number = rng.integers(len(rows))
                others = embedding.mean_embedding(np.delete(own, number, axis=0))
                image, true = composites.placed(
                    rng,
                    set_.images[rows[number]],
                    set_.points[rows[number]],
                    side=side,
                    degrees=degrees * rng.choice([-1, 1]),
                )
                picture, name = Image.fromarray(image), f"a picture of person {person}"
                if turn:
                    picture = picture.transpose(getattr(Image.Transpose, f"ROTATE_{turn}"))
                    true = turned_back(true, 360 - turn, picture.size)
                try:
                    found = finding.find_faces(finder.detector, picture, name)
                except face_models.FaceError:
                    continue
                first = finding.choose(found, finder.select, picture.size, name)
                each = [first.points, finder.look_at(picture, name).points, true]
                likeness = [float(embed(picture, points) @ others) for points in each]
                seen.append(Seen(degrees, side, person, *likeness))
    return seen


def table(seen: Sequence[Seen]) -> list[LookRow]:
    """Returns the rows: all faces, those turned by each angle, those of each size."""
    parts = {"all": seen}
    parts |= {f"turned {d}°": [s for s in seen if s.degrees == d] for d in DEGREES}
    parts |= {f"{side} pixels": [s for s in seen if s.side == side] for side in SIDES}
    rows = []
    for name, them in parts.items():
        first, second, best = np.array([[s.first, s.second, s.best] for s in them]).T
        # Somebody's pictures are not independent of each other: people are what varies.
        who = np.array([s.person for s in them])
        gains = [np.mean((second - first)[who == person]) for person in np.unique(who)]
        uncertain = 1.96 * np.std(gains, ddof=1) / np.sqrt(len(gains)) if len(gains) > 1 else np.nan
        a, b, c = (float(values.mean()) for values in (first, second, best))
        rows.append(LookRow(name, len(them), a, b, c, float(uncertain)))
    return rows


def markdown(rows: Sequence[LookRow]) -> str:
    """Returns the table as Markdown."""
    lines = ["| faces | pictures | first look | second look | gain | true points |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        gain = f"{row.second - row.first:+.3f} ± {row.uncertain:.3f}"
        lines.append(
            f"| {row.name} | {row.faces} | {row.first:.3f} | {row.second:.3f} | {gain} | "
            f"{row.best:.3f} |"
        )
    return "\n".join(lines)
