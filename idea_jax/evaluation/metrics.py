"""Scores from embeddings, their means over people, and the intervals of these: pure functions.

docs/evaluation.md has each formula, its range and what it does not say. Embeddings have unit norm.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000  # of the bootstrap
LEVEL = 0.95  # of its intervals


class Estimate(NamedTuple):
    """A mean over people with its bootstrap interval; `low` and `high` are None for one person."""

    mean: float
    low: float | None
    high: float | None
    people: int


def similarity(faces: np.ndarray, photos: np.ndarray) -> float | None:
    """Returns the mean cosine of a person's photos with a picture; -1 to 1.

    With several faces on the picture it is that of the face that is most like the photos. None
    where the picture has no face, or no photo has.

    Args:
      faces: float32[F, D], those on the picture that may be the person.
      photos: float32[P, D].
    """
    if not len(faces) or not len(photos):
        return None
    return float((faces.astype(np.float64) @ photos.T).mean(axis=1).max())


def best_face(faces: np.ndarray, photos: np.ndarray) -> np.ndarray | None:
    """Returns the face float32[D] that `similarity` is that of; None as there."""
    if not len(faces) or not len(photos):
        return None
    return faces[int((faces.astype(np.float64) @ photos.T).mean(axis=1).argmax())]


def angle(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the angle between two unit vectors in radians; 0 to pi.

    By the sine and the cosine, since the arc cosine has no digits left for small angles.
    """
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(2 * np.arctan2(np.linalg.norm(one - other), np.linalg.norm(one + other)))


def copy_paste(face: np.ndarray, reference: np.ndarray, target: np.ndarray) -> float | None:
    """Returns (angle(drawn, target) - angle(drawn, reference)) / angle(target, reference).

    1 where the picture is the photo that was learned from, -1 where it is the other photo of the
    person, 0 where it is as far from both. The triangle inequality keeps it within -1 and 1. None
    where both photos have the same embedding.
    """
    apart = angle(target, reference)
    if apart < 1e-6:
        return None
    return (angle(face, target) - angle(face, reference)) / apart


def mean_copy_paste(face: np.ndarray, photos: np.ndarray, others: np.ndarray) -> float | None:
    """Returns the mean of `copy_paste` over all pairs of photos that were learned from, and others;
    None where there is no pair of different embeddings."""
    values = [copy_paste(face, photo, other) for photo in photos for other in others]
    return mean([value for value in values if value is not None])


def diversity(embeds: np.ndarray) -> float | None:
    """Returns the mean of 1 - cosine over all pairs of pictures of one prompt; 0 to 2.

    None for fewer than two pictures.

    Args:
      embeds: float32[N, D].
    """
    count = len(embeds)
    if count < 2:
        return None
    cosines = embeds.astype(np.float64) @ embeds.T
    pairs = count * (count - 1)
    return float(1 - (cosines.sum() - np.trace(cosines)) / pairs)


def pairs_of_one(photos: np.ndarray, others: np.ndarray) -> float | None:
    """Returns the ceiling of a person: the mean cosine of true pairs.

    Those are photos that were learned from with other photos of the person; without others, all
    pairs among the photos. None where there is no pair.
    """
    if len(photos) and len(others):
        return float((photos.astype(np.float64) @ others.T).mean())
    apart = diversity(photos)
    return None if apart is None else 1 - apart


def floors(people: Sequence[np.ndarray]) -> list[float | None]:
    """Returns the floor of each person: the mean cosine of their photos with everybody else's.

    Each other person counts alike, however many photos they have. None where there is nobody else,
    or no photo with a face.

    Args:
      people: float32[P, D] of each.
    """
    found = []
    for number, own in enumerate(people):
        others = [other for k, other in enumerate(people) if k != number and len(other)]
        each = [float((own.astype(np.float64) @ other.T).mean()) for other in others if len(own)]
        found.append(mean(each))
    return found


def mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean of the values that are there; None where none is."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def share(hits: Sequence[bool]) -> float | None:
    """Returns the share of true values; None of none."""
    return float(np.mean(hits)) if len(hits) else None


def estimate(
    sums: Sequence[float], counts: Sequence[float] | None = None, seed: int = 0
) -> Estimate | None:
    """Returns sum(sums) / sum(counts) with its 95% bootstrap interval over people.

    People are drawn with replacement, `DRAWS` times, and the interval is that of the quantiles. Of
    one person nobody can tell how far people differ: then there is no interval. None of nobody.

    Args:
      sums: of each person.
      counts: of each person what the sum is over; 1 each if not given.
      seed: of the draws.
    """
    above = np.asarray(sums, np.float64)
    below = np.ones_like(above) if counts is None else np.asarray(counts, np.float64)
    above, below = above[below > 0], below[below > 0]
    if not len(above):
        return None
    middle = float(above.sum() / below.sum())
    if len(above) == 1:
        return Estimate(middle, None, None, 1)
    rng = np.random.default_rng([seed, *b"bootstrap"])
    drawn = rng.integers(0, len(above), (DRAWS, len(above)))
    means = above[drawn].sum(axis=1) / below[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(middle, float(low), float(high), len(above))


def difference(
    ones: Mapping[str, float | None], others: Mapping[str, float | None], seed: int = 0
) -> Estimate | None:
    """Returns the mean of one method's values less another's on the same people, as `estimate`.

    People without both values are left out; `people` says how many are left.

    Args:
      ones, others: a value by each person's name.
    """
    apart = [
        ones[name] - others[name]
        for name in ones
        if ones[name] is not None and others.get(name) is not None
    ]
    return estimate(apart, seed=seed)
