"""Where people come from: folders, CelebA, or the checkpoint's own celebrities.

A source yields people as numbers, in an order that is the same every time, from any place on.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from idea_jax.data import folders, images, people, text
from idea_jax.data.tokenizer import name_token_ids
from idea_jax.enhancer import drawing
from idea_jax.enhancer.shards import ShardsError
from idea_jax.faces import finding
from idea_jax.faces import models as face_models
from idea_jax.faces.table import Sight
from idea_jax.runtime.files import json_digest
from idea_jax.sampling.programs import Sampling
from idea_jax.training.results import Base

log = logging.getLogger(__name__)

CAPTIONS = "captions.jsonl"
OWN_LICENCE = "the terms of whoever has rights in the pictures apply"
CELEB_A_LICENCE = f"a derivative of data for non-commercial research: {people.LICENCE}"
DRAWN_LICENCE = "drawn by the base model: its terms of use apply"
# What a celebrity is drawn as.
PROMPTS = (
    "a photo of {}",
    "a close-up portrait of {}, looking at the camera",
    "a photo of {} outdoors, in daylight",
    "a photo of {} indoors, in a dark suit",
    "a photo of {} smiling, on a red carpet",
    "a black and white photo of {}",
)


class Portrait(NamedTuple):
    """One picture of a person.

    Attributes:
      picture: what has `read()` -> RGB picture, and a name; see `data.images.PictureFile`.
      texts: what it shows, with {} for the person; empty: the training texts.
      sight: the face on it, if it is known already.
      turned: float32[512], the face on a small or turned version of it, if that is known.
    """

    picture: Any
    texts: tuple[str, ...] = ()
    sight: Sight | None = None
    turned: np.ndarray | None = None


class NumberedPerson(NamedTuple):
    """One person: their place in the source, their pictures, and tokens of their name.

    Attributes:
      name_ids: int32[N], -1 where the name has fewer tokens; None where the name is not known to
        the text encoder.
      rejected: pictures of theirs that the source left out, and why.
    """

    number: int
    portraits: Sequence[Portrait]
    name_ids: np.ndarray | None = None
    rejected: Sequence[tuple[Any, str]] = ()


@dataclass(frozen=True)
class Source:
    """People to learn from.

    Attributes:
      kind: what it is called in files.
      licence: terms of its pictures.
      count: of people.
      people: place -> everybody from that place on.
      facts: what else decides which pictures there are; no names, no paths.
      face_model: SHA-256 of the recogniser, where the pictures bring their faces along.
    """

    kind: str
    licence: str
    count: int
    people: Callable[[int], Iterator[NumberedPerson]]
    facts: dict = field(default_factory=dict)
    face_model: str | None = None


class DrawnPicture(NamedTuple):
    """A picture in memory; has what `images.PictureFile` has."""

    name: str
    image: Image.Image

    def read(self) -> Image.Image:
        return self.image


def from_folders(root: str | Path, identities: str | None = None) -> Source:
    """People of a folder with one folder per person.

    In a person's folder there may be `captions.jsonl`, a line {"file": NAME, "text": TEXT} for each
    text of a picture, with {} for the person.

    Raises:
      ImageError: as `folders.list_people`.
      PeopleError: `identities` holds nobody.
      ShardsError: a captions file is damaged.
    """
    found, skipped = folders.list_people(root)
    folders.report_skipped([(path, why) for path, why in skipped if path.name != CAPTIONS])
    chosen = people.choose(found, identities)
    texts = {name: read_captions(Path(root) / name / CAPTIONS) for name in chosen}

    def portraits(name):
        listed = chosen[name]
        if isinstance(listed, images.ImageError):
            return [Portrait(people.NoPictures(listed))]
        return [Portrait(images.PictureFile(p), texts[name].get(p.name, ())) for p in listed]

    return of_people("folders", OWN_LICENCE, list(chosen), portraits)


def from_celeb_a(data_dir: str | Path, identities: str | None = None) -> Source:
    """The people of CelebA.

    Raises:
      PeopleError: as `people.from_celeb_a`, or `identities` holds nobody.
    """
    log.info(people.LICENCE)
    chosen = people.choose(people.from_celeb_a(data_dir), identities)
    return of_people(
        "celeb_a", CELEB_A_LICENCE, list(chosen), lambda name: [*map(Portrait, chosen[name])]
    )


def of_people(
    kind: str, licence: str, names: Sequence[str], portraits: Callable[[str], list[Portrait]]
) -> Source:
    """A source of people whose pictures are there already.

    Args:
      portraits: name -> pictures of that person.
    """
    everyone = [portraits(name) for name in names]
    # Not their names: those of few people could be guessed from a digest.
    facts = {
        "pictures": json_digest([len(them) for them in everyone]),
        # By which other pictures, or other words for them, in their places are noticed.
        "contents": json_digest(
            [[(size_of(p.picture), *p.texts) for p in them] for them in everyone]
        ),
        "marks": json_digest([[mark_of(p.picture) for p in them] for them in everyone]),
    }

    def everybody(first):
        for number in range(first, len(names)):
            yield NumberedPerson(number, portraits(names[number]))

    return Source(kind, licence, len(names), everybody, facts)


def size_of(picture: Any) -> int | None:
    """Bytes of a picture's file; None where it has none."""
    try:
        return picture.path.stat().st_size
    except (AttributeError, OSError):
        return None


def mark_of(picture: Any) -> str | None:
    """What tells a picture from others at little cost; None where there is none to read."""
    try:
        return picture.mark()
    except (AttributeError, OSError):
        return None


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """Texts of each picture by file name; none if there is no such file.

    Raises:
      ShardsError: a line is not as `from_folders` says.
    """
    if not path.is_file():
        return {}
    found: dict[str, tuple[str, ...]] = {}
    one = text.Placeholder("<x>", 1)
    number = 0
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        for number, line in enumerate(lines, 1):  # noqa: B007 the error says it
            if line.strip():
                entry = json.loads(line)
                name, said = entry["file"], entry["text"]
                if not isinstance(name, str) or not isinstance(said, str):
                    raise ValueError("file and text must be texts")
                text.fill(said, one)
                found[name] = (*found.get(name, ()), said)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        where = f", line {number}" if number else ""
        raise ShardsError(
            f"{path}{where} cannot be used ({error}); expected lines such as "
            '{"file": "1.jpg", "text": "a photo of {} in a garden"}'
        ) from error
    return found


# --- celebrities ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Casting:
    """How celebrities are drawn, and which drawings count.

    Attributes:
      pictures: drawn of each name.
      steps, guidance_scale: of the sampler.
      likeness: least similarity of a picture to the mean of the others of its name.
      batch: pictures that a device draws at once.
      prompts: with {} for the name; picture i of person p is drawn as number p + i of them.
    """

    pictures: int = 4
    steps: int = 20
    guidance_scale: float = 5.0
    likeness: float = 0.3
    batch: int = 8
    prompts: Sequence[str] = PROMPTS


def celebrities(
    base: Base,
    finder: finding.Finder,
    names: Sequence[str],
    casting: Casting,
    *,
    side: int,
    seed: int = 0,
) -> Source:
    """The people of a names file, as the checkpoint itself draws them by their names.

    A picture counts if exactly one face is found on it and it is like the others of its name. A
    name of which fewer than two pictures count is one that the model does not know.

    Args:
      base: its tokenizer knows the placeholder, whose number of tokens those of names get.
      side: of the pictures, in pixels.
    """
    tokenizer, N = base.tokenizer, base.tokenizer.placeholder.n
    name_ids = name_token_ids(tokenizer, names, N)
    mesh = drawing.mesh_of(jax.local_devices())
    frozen = drawing.put(base.frozen, mesh)
    empty = tokenizer([""])[0]
    at_once = max(1, casting.batch * mesh.size // casting.pictures)

    def prompt(number, picture):
        return casting.prompts[(number + picture) % len(casting.prompts)]

    def draw(numbers):
        rows = [(n, i) for n in numbers for i in range(casting.pictures)]
        ids = tokenizer([prompt(n, i).replace("{}", names[n]) for n, i in rows])
        seeds = np.array([((seed + n) % 2**32, i) for n, i in rows], np.uint32)

        def keys_values(rows):
            return drawing.plain_keys_values(base.model, base.frozen, ids[rows], empty)

        drawn = drawing.draw_in_batches(
            mesh,
            base.model,
            frozen,
            keys_values,
            seeds,
            casting.batch,
            Sampling((side, side), "dpmpp_2m", casting.steps),
            casting.guidance_scale,
        )
        pictures = np.concatenate(list(drawn))
        return pictures.reshape(len(numbers), casting.pictures, *pictures.shape[1:])

    def everybody(first):
        for start in range(first, len(names), at_once):
            numbers = list(range(start, min(start + at_once, len(names))))
            # Filled up: one program draws all groups.
            drawn = draw([*numbers, *[numbers[-1]] * (at_once - len(numbers))])
            for number, pictures in zip(numbers, drawn, strict=False):
                found = [
                    Portrait(
                        DrawnPicture(f"{names[number]} {i}", Image.fromarray(p)),
                        (prompt(number, i),),
                    )
                    for i, p in enumerate(pictures)
                ]
                kept, rejected = cast(finder, found, casting.likeness)
                yield NumberedPerson(number, kept, name_ids[number], rejected)

    digest = json_digest([list(names), list(casting.prompts)])
    facts = {
        "names_and_prompts": digest,
        "seed": seed,
        "pictures": casting.pictures,
        "steps": casting.steps,
        "guidance_scale": casting.guidance_scale,
        "likeness": casting.likeness,
    }
    return Source("celebrities", DRAWN_LICENCE, len(names), everybody, facts)


def cast(
    finder: finding.Finder, portraits: Sequence[Portrait], likeness: float
) -> tuple[list[Portrait], list[tuple[Any, str]]]:
    """Those of a name's pictures that count, with their faces; and the others, with the reasons."""
    seen, rejected = [], []
    for portrait in portraits:
        image, name = portrait.picture.read(), portrait.picture.name
        try:
            count = len(finding.find_faces(finder.detector, image, name)) if finder.detector else 1
            if count != 1:
                raise face_models.FaceError(f"{count} faces, expected one")
            seen.append(portrait._replace(sight=finder.look_at(image, name)))
        except face_models.FaceError as error:
            rejected.append((portrait.picture, str(error)))
    while len(seen) > 1:
        embeds = np.stack([portrait.sight.embed for portrait in seen])
        others = embeds.sum(axis=0) - embeds
        norms = np.linalg.norm(others, axis=1)
        similar = (embeds * others).sum(axis=1) / np.maximum(norms, 1e-6)
        worst = int(similar.argmin())
        if similar[worst] >= likeness:
            return seen, rejected
        out = seen.pop(worst)
        why = f"similarity {similar[worst]:.2f} to the others of this name, expected {likeness}"
        rejected.append((out.picture, why))
    rejected += [(portrait.picture, "none is like it: a name unknown to it") for portrait in seen]
    return [], rejected
