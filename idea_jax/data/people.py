"""People and their pictures: a folder with one folder per person, or CelebA.

CelebA is read through tensorflow-datasets without TensorFlow, from a set prepared as array_record.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from idea_jax.data import colours, folders, images
from idea_jax.errors import InputError

LICENCE = "CelebA is for non-commercial research only; do not pass its pictures on"
HOW_TO_PREPARE = (
    "prepare it once, where TensorFlow is installed (in the folder of this project: "
    "pip install '.[celeba]' tensorflow): python -c \"import tensorflow_datasets as tfds; "
    "tfds.builder('celeb_a', data_dir='DIR', file_format='array_record').download_and_prepare()\" "
    "(1.4 GB, see docs/faces.md)"
)


class PeopleError(InputError, ValueError):
    """People that cannot be had; the message says where they were looked for and what to do."""


@dataclass(frozen=True)
class StoredPicture:
    """A picture of a prepared data set; has what `images.PictureFile` has.

    Attributes:
      source: the data set, its pictures not decoded.
      index: of the picture in it.
      digest: of the encoded picture, from when the set was listed.
    """

    source: Sequence[Mapping]
    index: int
    digest: str = ""

    @property
    def name(self) -> str:
        """Its number in the data set, which has no file names."""
        return f"{self.index:06d}"

    def read(self) -> Image.Image:
        """The picture, 8-bit RGB.

        Raises:
          ImageError: the data set is damaged.
        """
        try:
            with Image.open(io.BytesIO(self._bytes()), formats=images.FORMATS) as image:
                return colours.to_rgb(image, self)
        except OSError as error:
            raise images.ImageError(f"{self} is damaged ({error}); prepare it again") from error

    def sha256(self) -> str:
        """Hex digest of the encoded picture."""
        return hashlib.sha256(self._bytes()).hexdigest()

    def mark(self) -> str:
        """What tells the picture from others at no cost: the digest from when it was listed."""
        return self.digest

    def _bytes(self) -> bytes:
        try:
            return self.source[self.index]["image"]
        except RuntimeError as error:  # of the array_record library, for files gone or cut off
            raise images.ImageError(f"{self} cannot be read ({error})") from error

    def __str__(self) -> str:
        return f"picture {self.index} of the data set"


@dataclass(frozen=True)
class NoPictures:
    """Stands for the pictures of somebody who has none that can be used; reading it says why."""

    error: images.ImageError

    def read(self) -> Image.Image:
        """There is nothing to read.

        Raises:
          ImageError: always.
        """
        raise self.error

    def sha256(self) -> str:
        """As `read`.

        Raises:
          ImageError: always.
        """
        raise self.error


@dataclass(frozen=True)
class Person:
    """One person: a name that can be that of a folder, and pictures to train on or to hold out.

    A picture is an `images.PictureFile` or a `StoredPicture`.
    """

    name: str
    train: tuple
    held_out: tuple = ()


def from_folders(root: str | Path) -> dict[str, list[images.PictureFile | NoPictures]]:
    """Returns the pictures of each person in a folder that holds one folder per person.

    Whose folder is unreadable or has no pictures is there as well, with `NoPictures`. What is left
    out is reported.

    Raises:
      ImageError: as `folders.list_people`.
    """
    people, skipped = folders.list_people(root)
    folders.report_skipped(skipped)
    return {
        name: [NoPictures(found)]
        if isinstance(found, images.ImageError)
        else [images.PictureFile(path) for path in found]
        for name, found in people.items()
    }


def from_celeb_a(data_dir: str | Path) -> dict[str, list[StoredPicture]]:
    """Returns the pictures of each person of CelebA, by `Identity_No` in five digits.

    All of its splits are taken together: they keep people apart, not pictures.

    Args:
      data_dir: the `data_dir` that tensorflow-datasets prepared it in; it holds `celeb_a/`.

    Raises:
      PeopleError: a package is missing, or the set is not prepared, damaged, or not in a format
        that is read without TensorFlow.
    """
    people: dict[str, list[StoredPicture]] = {}
    try:
        import tensorflow_datasets as tfds

        builder = tfds.builder("celeb_a", data_dir=data_dir)
        if not Path(builder.data_dir).is_dir():
            raise PeopleError(
                f"no prepared CelebA in {data_dir}: expected the folder {builder.data_dir}; "
                f"{HOW_TO_PREPARE}"
            )
        decoders = {"image": tfds.decode.SkipDecoding()}
        source = builder.as_data_source("all", decoders=decoders)
        for index in tqdm(range(len(source)), desc="CelebA", unit="img", disable=None):
            stored = source[index]
            number = int(stored["identity"]["Identity_No"])
            # The picture has been read with the rest, so that its digest costs next to nothing.
            digest = hashlib.blake2b(stored["image"], digest_size=16).hexdigest()
            people.setdefault(f"{number:05d}", []).append(StoredPicture(source, index, digest))
    except PeopleError:
        raise
    except ImportError as error:
        raise PeopleError(
            f"CelebA needs the packages tensorflow-datasets and array_record ({error}); install "
            "them, in the folder of this project, with: pip install '.[celeba]'"
        ) from error
    except Exception as error:  # of tfds, Protocol Buffers and array_record, without a common base
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PeopleError(
            f"CelebA in {data_dir} cannot be read without TensorFlow ({reason[0]}); "
            f"{HOW_TO_PREPARE}"
        ) from error
    return dict(sorted(people.items()))


def places(identities: str | None) -> slice:
    """Returns the range that `choose` is given.

    Raises:
      PeopleError: it is none.
    """
    match = re.fullmatch(r"(\d*)(:?)(\d*)", ":" if identities is None else identities)
    if not match or not (match[1] or match[2]):
        raise PeopleError(f"--identities must be FROM:TO, such as 0:64, got {identities!r}")
    first = int(match[1] or 0)
    return slice(first, (int(match[3]) if match[3] else None) if match[2] else first + 1)


def choose(people: Mapping[str, Any], identities: str | None) -> dict[str, list]:
    """Returns the people whose places, in the order of names, are in a range.

    Args:
      identities: `FROM:TO` without TO, as in Python, either may be left out; or one place.

    Raises:
      PeopleError: it is no range, or holds nobody.
    """
    names = list(people)[places(identities)]
    if not names:
        raise PeopleError(f"--identities {identities} holds nobody: there are {len(people)} people")
    return {name: people[name] for name in names}


def split(name: str, pictures: Sequence, count: int | None, seed: int) -> Person:
    """Returns a person with `count` pictures to train on, chosen by the seed; the rest is held out.

    The choice depends on the seed, the name and the number of pictures only, not on who else is
    there. None takes all pictures to train on.

    Raises:
      PeopleError: the person has fewer pictures.
    """
    if count is None:
        return Person(name, tuple(pictures))
    if len(pictures) < count:
        raise PeopleError(
            f"{name or 'the folder'} has {len(pictures)} picture(s), fewer than "
            f"--pictures_per_person {count}"
        )
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()
    order = np.random.default_rng(list(digest)).permutation(len(pictures))
    chosen = set(order[:count].tolist())
    train = [picture for index, picture in enumerate(pictures) if index in chosen]
    rest = [picture for index, picture in enumerate(pictures) if index not in chosen]
    return Person(name, tuple(train), tuple(rest))
