"""What is known of people by their photos, and which photos say nothing of anybody."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from idea_jax.evaluation.gallery import Problem
from idea_jax.evaluation.looking import Look
from idea_jax.evaluation.scoring import Known
from idea_jax.faces import models as face_models

PHOTOS, HELD_OUT = "photos", "held out"  # as reports call them


def unreadable(
    what: str, photos: Mapping[str, list[Path]], errors: Mapping[Path, str]
) -> list[Problem]:
    """The photos that cannot be read, with whose they are."""
    return [
        Problem("", name, f"{what}: {path.name}", errors[path])
        for name, own in photos.items()
        for path in own
        if path in errors
    ]


def apart(
    learned: Mapping[str, list[Path]],
    others: Mapping[str, list[Path]],
    digests: Mapping[Path, str],
) -> tuple[dict[str, list[Path]], list[Problem]]:
    """Returns the held-out photos but for those that were learned from, which are reported."""
    found, problems = {}, []
    for name, photos in others.items():
        seen = {digests[path] for path in learned.get(name, ()) if path in digests}
        found[name] = [path for path in photos if digests.get(path) not in seen]
        why = "it is one of those that were learned from, and is left out"
        problems += [
            Problem("", name, f"{HELD_OUT}: {path.name}", why)
            for path in photos
            if digests.get(path) in seen
        ]
    return found, problems


def know_people(
    learned: Mapping[str, list[Path]],
    others: Mapping[str, list[Path]],
    looks: Mapping[Path, Look],
) -> tuple[dict[str, Known], list[Problem]]:
    """What is known of each person, and whose photos show no face."""
    people, problems = {}, []
    for name, own in learned.items():
        seen = [looks[path] for path in own if path in looks]
        rest = [looks[path] for path in others.get(name, ()) if path in looks]
        images = np.stack([look.image for look in seen]) if seen else np.zeros((0, 0), np.float32)
        people[name] = Known(largest(seen), largest(rest), images)
        problems += faceless(name, PHOTOS, own, looks)
        if others:
            problems += faceless(name, HELD_OUT, others.get(name, []), looks)
    for name in sorted(others.keys() - learned.keys()):
        problems.append(Problem("", name, HELD_OUT, "--photos has nobody of this name"))
    if len(people) < 2:
        problems.append(
            Problem("", "", "people", "there is one person: no floor, and no interval over people")
        )
    return people, problems


def faceless(
    name: str, what: str, photos: Sequence[Path], looks: Mapping[Path, Look]
) -> list[Problem]:
    """The photos of a person that show no face; one line where none of them does. Why there is no
    photo that was learned from at all, `gallery.photos_of` has said."""
    if what == PHOTOS and not photos:
        return []
    seen = [path for path in photos if path in looks]
    missed = [path for path in seen if not len(looks[path].faces)]
    if len(missed) == len(seen):
        return [Problem("", name, what, "there is no photo with a face on it")]
    why = "there is no face on it, so it counts in no identity"
    return [Problem("", name, f"{what}: {path.name}", why) for path in missed]


def largest(looks: Sequence[Look]) -> np.ndarray:
    """float32[P, 512]: the largest face of each photo that has one."""
    faces = [look.faces[0] for look in looks if len(look.faces)]
    return np.stack(faces) if faces else np.zeros((0, face_models.WIDTH), np.float32)
