"""From settings to people, and from their photos to what the frozen model sees of them."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from idea_jax import jobs
from idea_jax.config.settings import ConfigError, TrainConfig
from idea_jax.data import folders, images, people
from idea_jax.data.tokenizer import training_ids
from idea_jax.faces import finding, portraits
from idea_jax.faces import table as face_table
from idea_jax.faces.crops import training_square
from idea_jax.faces.portraits import Portraits
from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.training.results import Base, check_finite
from idea_jax.training.step import Photos

log = logging.getLogger(__name__)


def people_of(cfg: TrainConfig) -> dict[str, list]:
    """The pictures of each person of a run, by their name; nothing of them is read yet.

    A folder that has pictures itself is one person, whose name is empty; otherwise each sub-folder
    that is not hidden is one, and so is each identity of a data set.

    Raises:
      ConfigError: the choice of people does not fit a single person.
      images.ImageError, people.PeopleError: there is nobody, or as `choose_people`.
    """
    if cfg.dataset is not None:
        log.info(people.LICENCE)
        return choose_people(cfg, people.from_celeb_a(cfg.dataset_dir))
    folder = Path(cfg.train_data_dir)
    if folders.has_only_folders(folder):
        return choose_people(cfg, people.from_folders(folder))
    if cfg.identities is not None:
        raise ConfigError(
            f"--identities chooses people, but {folder} holds the photos of one person; expected a "
            "folder with one folder per person"
        )
    paths, skipped = folders.list_images(folder)
    folders.report_skipped(skipped)
    return {"": [images.PictureFile(path) for path in paths]}


def choose_people(cfg: TrainConfig, found: dict[str, list]) -> dict[str, list]:
    """The people of a data set that a run trains, with all of their pictures.

    Raises:
      ConfigError: as `people_of`.
      people.PeopleError: nobody is chosen or has enough pictures, or somebody's name is taken.
    """
    if cfg.resume_from_checkpoint not in (None, "latest"):
        raise ConfigError(
            "--resume_from_checkpoint FOLDER is of one person; for several, only latest can be used"
        )
    chosen = people.choose(found, cfg.identities)
    count = cfg.pictures_per_person
    most = max(map(len, chosen.values()))
    # Who has too few is taken out when their turn comes; that nobody has enough is a mistake.
    if count is not None and most < count:
        raise people.PeopleError(
            f"all of the {len(chosen)} people have fewer pictures than --pictures_per_person "
            f"{count}: {most} at most; take a smaller number, or other --identities"
        )
    if jobs.MANIFEST in chosen:
        raise people.PeopleError(
            f"nobody can be called {jobs.MANIFEST}: --output_dir has a file of that name, which "
            "says what became of everybody; rename that person's folder"
        )
    return chosen


def person_of(cfg: TrainConfig, name: str, pictures: list) -> people.Person:
    """A person with those of the pictures that are trained on and those that are held out.

    Pictures that cannot be read are reported and left out.

    Raises:
      images.ImageError, people.PeopleError: no picture can be used, or there are too few.
    """
    found = images.without_copies(images.readable(pictures))
    return people.split(name, found, cfg.pictures_per_person, cfg.seed)


def open_eyes(
    cfg: TrainConfig, method: condition.Method, checkpoint_folder: Path
) -> finding.Finder | face_table.FaceTable | None:
    """What tells the face on a picture; None if none is needed.

    Raises:
      FaceError: a file or a model is missing or cannot be used.
    """
    places = cfg.crop == "face"
    if not method.uses_face and not places:
        return None
    return portraits.open_eyes(cfg, checkpoint_folder, embeds=method.uses_face, places=places)


def portraits_of(
    cfg: TrainConfig,
    method: condition.Method,
    eyes: finding.Finder | face_table.FaceTable | None,
    person: people.Person,
) -> Portraits:
    """Looks at the pictures that a person is trained on.

    Raises:
      FaceError: a picture has no usable face, or none is among the precomputed ones.
    """
    if eyes is None:
        return Portraits(list(person.train), [], None)
    return portraits.look(
        eyes, person.train, embeds=method.uses_face, drop_outliers=cfg.drop_outliers
    )


def training_pixels(
    cfg: TrainConfig, seen: Portraits, side: int
) -> Iterator[tuple[str, np.ndarray, tuple[int, ...]]]:
    """Yields (name, float32[side, side, 3] in [-1, 1], `size_ids`) of each picture of a
    person. A picture that is cut around the face has the size of the cut.

    After the last one, those are reported whose face is too small to be more than a blur.
    """
    small = []
    for index, picture in enumerate(seen.pictures):
        image = picture.read()
        if cfg.crop == "face":
            points = seen.sights[index].points
            centre, width, angle = training_square(points, image.size, cfg.crop_margin)
            image = images.crop_turned(image, centre, width, angle)
            if width < side / 2:
                small.append(f"{picture} ({width} pixels)")
        sizes = size_ids(image.size, side, center_crop=cfg.center_crop)
        yield picture.name, images.to_pixels(image, side, center_crop=cfg.center_crop), sizes
    if small:
        log.warning(
            "on %d of %d photos the square around the face is smaller than half of the %d pixels "
            "that it is scaled up to, so what is learned will be soft: %s; take photos with a "
            "larger face, or a smaller --resolution",
            len(small),
            len(seen.pictures),
            side,
            ", ".join(small[:5]),
        )


def size_ids(size: tuple[int, int], side: int, *, center_crop: bool) -> tuple[int, ...]:
    """What SDXL is told of a picture that `images.to_pixels` brings to a square.

    Its height and width before; top and left of the square in the picture, once that is scaled; and
    the square's sides.

    Args:
      size: width and height of the picture, in pixels.
    """
    left, top, edge = images.central_square(size) if center_crop else (0, 0, side)
    scale = side / edge
    return size[1], size[0], round(top * scale), round(left * scale), side, side


def encode_pixels(
    base: Base, pictures: Iterable[tuple[str, np.ndarray, tuple[int, ...]]]
) -> Photos:
    """Encodes every picture and its mirror once; the steps only draw from these moments.

    The mirror is encoded too, because the VAE of a mirrored picture is not the mirrored VAE.

    Args:
      pictures: name, float32[side, side, 3] in [-1, 1] and sizes of each.
    """
    model = base.model
    means, logvars, ids = [], [], []
    for name, pixels, sizes in pictures:
        mean, logvar = _encode_image(model, base.frozen, np.stack([pixels, pixels[:, ::-1]]))
        check_finite(np.stack([mean, logvar]), f"the VAE of {base.name}, for {name},")
        means.append(np.asarray(mean))
        logvars.append(np.asarray(logvar))
        ids.append(sizes)
    return Photos(
        mean=jax.numpy.asarray(np.stack(means)),
        logvar=jax.numpy.asarray(np.stack(logvars)),
        count=jax.numpy.int32(len(means)),
        token_ids=jax.numpy.asarray(training_ids(base.tokenizer)),
        size_ids=jax.numpy.asarray(np.int32(ids)) if len(model.encoders) > 1 else None,
    )


# One program for all pictures, and for all people of a process.
_encode_image = jax.jit(sd.encode_image, static_argnums=0)


def all_photos(pictures: list) -> str | None:
    """One SHA-256 of all pictures that there are of a person, hexadecimal, whatever their names and
    their order; None if one of them cannot be read."""
    try:
        digests = sorted({picture.sha256() for picture in pictures})
    except (images.ImageError, OSError):
        return None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def digest_of(pictures: list) -> str:
    """One SHA-256 of the pictures of a person, hexadecimal."""
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(picture.sha256().encode())
    return digest.hexdigest()
