"""Who is learned, drawn and scored for a card, and who is left for the shared ID-Enhancer."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from idea_jax.card.settings import CardConfig
from idea_jax.config.settings import ConfigError
from idea_jax.data import images, people
from idea_jax.runtime.files import atomic_write, write_json

log = logging.getLogger(__name__)

HELD_OUT = 8  # photos of a person that are held out, at most
PHOTOS, OTHERS, NOTE = "photos", "held_out", "people.json"


@dataclass(frozen=True)
class Invited:
    """The people of a card, by numbers: their names are nobody's business.

    Attributes:
      test: people who are evaluated; held_out: those of them with other photos.
      until: the place in the source behind the last of them.
      rest_people, rest_pictures: who come after that, and their pictures.
    """

    test: int
    held_out: int
    until: int
    rest_people: int
    rest_pictures: int


def choose(cfg: CardConfig) -> tuple[Invited, list[list]]:
    """Returns the people of a card, and the pictures of the test people, all of which can be read.

    The test people are the first of the source who have enough photos. Who has too few is passed
    over, with a notice.

    Raises:
      ConfigError: there are fewer than two.
      ImageError, PeopleError: as `data.people`.
    """
    source: Mapping[str, list] = (
        people.from_celeb_a(cfg.dataset_dir) if cfg.dataset else people.from_folders(cfg.people)
    )
    chosen: list[list] = []
    until = 0
    for place, own in enumerate(source.values()):
        if len(chosen) == cfg.test_people:
            break
        good = readable(own, cfg.photos_per_person + HELD_OUT)
        if len(good) < cfg.photos_per_person:
            log.warning(
                "person %d of --people is passed over: %d photos can be read, expected %d",
                place + 1,
                len(good),
                cfg.photos_per_person,
            )
        else:
            chosen.append(good)
        until = place + 1
    if len(chosen) < 2:
        raise ConfigError(
            f"a card needs two people at least with {cfg.photos_per_person} photos each that can "
            f"be read, found {len(chosen)}: expected a folder per person in --people"
        )
    if len(chosen) < cfg.test_people:
        log.warning("there are %d people, not %d", len(chosen), cfg.test_people)
    rest = list(source.values())[until:]
    held_out = sum(len(own) > cfg.photos_per_person for own in chosen)
    pictures = sum(map(len, rest))
    return Invited(len(chosen), held_out, until, len(rest), pictures), chosen


def readable(pictures: list, most: int) -> list:
    """The first pictures that can be read."""
    good: list = []
    for picture in pictures:
        if len(good) == most:
            break
        try:
            picture.read()
        except (images.ImageError, OSError) as error:
            log.warning("left out: %s", error)
            continue
        good.append(picture)
    return good


def write(out: Path, invited: Invited, chosen: list[list], learned: int) -> None:
    """Writes `photos/person-000/00.jpg` and so on, and `held_out/` beside it, instead of earlier
    ones.

    Files of the user are linked to, not copied, where the system can do that.

    Args:
      learned: photos of each person that are learned from.
    """
    for kind in (PHOTOS, OTHERS):
        shutil.rmtree(out / kind, ignore_errors=True)
    for number, pictures in enumerate(chosen):
        for place, picture in enumerate(pictures):
            kind = PHOTOS if place < learned else OTHERS
            put(picture, out / kind / f"person-{number:03d}" / f"{place:02d}")
    write_json(out / NOTE, asdict(invited))


def put(picture: Any, target: Path) -> None:
    """Makes a picture a file, with the suffix that it has, else as PNG."""
    path = getattr(picture, "path", None)
    if path is not None:
        target = target.with_suffix(path.suffix.lower())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.symlink(path.resolve(), target)
            return
        except OSError:  # Windows lets few users do it
            content = path.read_bytes()
        with atomic_write(target, private=True) as temporary:
            temporary.write_bytes(content)
        return
    with atomic_write(target.with_suffix(".png"), private=True) as temporary:
        picture.read().save(temporary)


def read(out: Path) -> Invited | None:
    """What an earlier run has written; None if it did not come to an end."""
    try:
        return Invited(**json.loads((out / NOTE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
