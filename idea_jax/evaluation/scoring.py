"""From what was seen to a score for each picture, and from these to a summary: pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from idea_jax.evaluation import metrics
from idea_jax.evaluation.asked import STYLE, Asked
from idea_jax.evaluation.gallery import Problem
from idea_jax.evaluation.modes import Mode, of_person, prompt_value

# What a picture has of its own, and what follows from several.
OF_PICTURES = ("identity", "held_out", "copy_paste", "prompt_score", "image_score")
SCORES = ("identity", "identity_zero", "detected", *OF_PICTURES[1:], "diversity")
ALL = "all but style"  # the rows that a method is judged by


@dataclass(frozen=True)
class ScoredPicture:
    """The scores of one picture; those that it has not are None.

    Attributes:
      picture: its path below the method's folder; sha256: of its content.
      faces: how many were found on it.
      identity: to the photos that were learned from; held_out: to other photos of the person.
      error: why it has no scores, or not all of them.
    """

    method: str
    person: str
    prompt: str
    group: str
    picture: str
    sha256: str | None = None
    faces: int | None = None
    identity: float | None = None
    held_out: float | None = None
    copy_paste: float | None = None
    prompt_score: float | None = None
    image_score: float | None = None
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a person: their photos as the networks see them.

    Attributes:
      photos, held_out: float32[P, 512], the largest face of each photo that has one.
      images: float32[P, D], CLIP's embeddings of the photos that were learned from.
    """

    photos: np.ndarray
    held_out: np.ndarray
    images: np.ndarray


def score(
    row: ScoredPicture,
    asked: Asked,
    faces: np.ndarray,
    image: np.ndarray,
    known: Known | None,
    text: np.ndarray | None,
) -> ScoredPicture:
    """Returns a row with the scores of its picture.

    Args:
      faces: float32[F, 512] on the picture, the largest first.
      image: float32[D], CLIP's embedding; empty without a CLIP.
      known: the person; None of somebody without photos.
      text: float32[D], CLIP's embedding of what was asked for; None without one.
    """
    values: dict = {"faces": len(faces)}
    if len(image) and text is not None:
        values["prompt_score"] = float(image.astype(np.float64) @ text)
    error = None
    if known is None or not len(known.photos):
        error = "there is no photo of this person with a face on it"
    if known is not None:
        # Where more than one face is to be seen, the person's is the one that is most like them.
        own = faces if asked.shows_several else faces[:1]
        values["identity"] = metrics.similarity(own, known.photos)
        values["held_out"] = metrics.similarity(own, known.held_out)
        face = metrics.best_face(own, known.photos)
        if face is not None:
            values["copy_paste"] = metrics.mean_copy_paste(face, known.photos, known.held_out)
        if len(image) and len(known.images):
            values["image_score"] = float((known.images.astype(np.float64) @ image).mean())
    return ScoredPicture(**{**asdict(row), **values, "error": error})


def by_prompt(rows: Sequence[ScoredPicture]) -> dict[tuple[str, str], list[ScoredPicture]]:
    """Returns the rows that could be scored, by person and prompt."""
    found: dict[tuple[str, str], list[ScoredPicture]] = {}
    for row in rows:
        if row.faces is not None:
            found.setdefault((row.person, row.prompt), []).append(row)
    return found


def values_of(mode: Mode, score: str, rows: Sequence[ScoredPicture]) -> tuple[float | None, float]:
    """Returns a score of the pictures of one prompt, and how many they are."""
    if score in ("identity", "identity_zero", "detected") and any(row.error for row in rows):
        return None, 0  # nobody to compare with: no miss of the method's
    own = "identity" if score in ("identity_zero", "detected") else score
    return prompt_value(mode, score, [getattr(row, own) for row in rows])


def person_sums(
    mode: Mode,
    score: str,
    rows: Sequence[ScoredPicture],
    diversities: Mapping[tuple[str, str], float | None],
) -> dict[str, tuple[float, float]]:
    """Returns what each person adds to the mean of a score: a sum, and what it is over.

    Args:
      diversities: by person and prompt, of the same method.
    """
    each: dict[str, list] = {}
    for (person, prompt), some in by_prompt(rows).items():
        value = (
            (diversities.get((person, prompt)), 1)
            if score == "diversity"
            else values_of(mode, score, some)
        )
        each.setdefault(person, []).append(value)
    return {person: of_person(mode, prompts) for person, prompts in each.items()}


def person_means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float | None]:
    """Returns each person's own mean; None of those who have none."""
    return {person: a / b if b else None for person, (a, b) in sums.items()}


def is_judged(row: ScoredPicture) -> bool:
    """Whether a row counts for a method as a whole: recognisers are brittle on styles."""
    return row.group != STYLE


def summarise(
    mode: Mode,
    rows: Sequence[ScoredPicture],
    diversities: Mapping[str, Mapping[tuple[str, str], float | None]],
    people: Mapping[str, Known],
    problems: Sequence[Problem],
    seed: int = 0,
) -> dict:
    """Returns everything that a report says of methods and people, as plain values.

    Args:
      diversities: by method, and there by person and prompt.
      seed: of the bootstrap.
    """
    # A method of whom there is no picture at all is a row without numbers.
    named = [*(row.method for row in rows), *(problem.method for problem in problems)]
    methods, sums = list(dict.fromkeys(filter(None, named))), {}
    summary: dict = {"mode": mode.name, "headline": mode.headline, "methods": {}, "people": {}}
    for method in methods:
        own = [row for row in rows if row.method == method]
        groups = {ALL: [row for row in own if is_judged(row)]}
        groups |= {
            name: [row for row in own if row.group == name]
            for name in dict.fromkeys(row.group for row in own)
        }
        summary["methods"][method] = {}
        for group, some in groups.items():
            found = {
                name: person_sums(mode, name, some, diversities.get(method, {})) for name in SCORES
            }
            summary["methods"][method][group] = {
                name: _plain(metrics.estimate(*_columns(found[name]), seed=seed)) for name in SCORES
            } | {"pictures": sum(row.faces is not None for row in some)}
            if group == ALL:
                sums[method] = found
        names = dict.fromkeys(row.person for row in own)
        means = {name: person_means(sums[method][name]) for name in SCORES}
        summary["people"][method] = {
            person: {name: means[name].get(person) for name in SCORES} for person in names
        }
    summary["differences"] = [
        {
            "methods": [one, other],
            **{
                name: _plain(
                    metrics.difference(
                        person_means(sums[one][name]), person_means(sums[other][name]), seed
                    )
                )
                for name in SCORES
            },
        }
        for one, other in combinations(methods, 2)
    ]
    floors = metrics.floors([known.photos for known in people.values()])
    ceilings = [metrics.pairs_of_one(known.photos, known.held_out) for known in people.values()]
    for name, values in (("floor", floors), ("ceiling", ceilings)):
        there = [value for value in values if value is not None]
        summary[name] = _plain(metrics.estimate(there, seed=seed))
        summary[f"{name}s"] = dict(zip(people, values, strict=True))
    summary["problems"] = [problem._asdict() for problem in problems]
    return summary


def _columns(sums: Mapping[str, tuple[float, float]]) -> tuple[list[float], list[float]]:
    pairs = list(sums.values())
    return [a for a, _ in pairs], [b for _, b in pairs]


def _plain(estimate: metrics.Estimate | None) -> dict | None:
    return estimate._asdict() if estimate is not None else None
