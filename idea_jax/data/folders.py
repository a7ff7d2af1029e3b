"""Which files of a folder are pictures, and whose."""

import logging
from collections.abc import Sequence
from pathlib import Path

from idea_jax.data.images import ImageError

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif")


class NoPicturesError(ImageError):
    """A folder holds no file that is a picture by its name; `is_empty`: nor anything that is not
    hidden; `skipped`: what it holds, with reasons."""

    is_empty = False
    skipped: list[tuple[Path, str]]


def list_images(folder: str | Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Returns the pictures directly in `folder`, sorted by name, and what was skipped with reasons.

    A picture is known by its suffix (`SUFFIXES`, upper or lower case); whether it can be read is
    found out by `read_image`.

    Raises:
      ImageError: `folder` is missing, no folder, unreadable or without pictures.
    """
    images, skipped = _scan(Path(folder))
    if not images:
        raise _no_pictures(Path(folder), skipped)
    return images, skipped


def has_only_folders(folder: str | Path) -> bool:
    """Whether a folder has no picture itself, but sub-folders that are not hidden.

    Raises:
      ImageError: `folder` is missing, no folder or unreadable.
    """
    images, skipped = _scan(Path(folder))
    return not images and any(reason == "sub-folder" for _, reason in skipped)


def list_people(
    root: str | Path,
) -> tuple[dict[str, list[Path] | ImageError], list[tuple[Path, str]]]:
    """Returns the pictures in the sub-folders of `root`, by the names of these, both sorted.

    Of a sub-folder that is unreadable or has no pictures, the error that says so. Then what was
    skipped with reasons: in the sub-folders, sub-folders that are hidden or nobody's, and files in
    `root`. Nobody's are empty ones, and those whose name begins with `__` and that hold no picture,
    which archives and tools leave behind.

    Raises:
      ImageError: `root` is missing, no folder or unreadable, or no sub-folder has a picture.
    """
    _, people, skipped = _scan_tree(Path(root))
    errors = [found for found in people.values() if isinstance(found, ImageError)]
    if len(errors) == len(people):
        raise errors[0] if errors else _no_pictures(Path(root), skipped)
    return people, skipped


def list_tree(root: str | Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Returns the pictures directly in `root`, then those in its sub-folders; and what was skipped.

    Raises:
      ImageError: as `list_people`, but pictures directly in `root` suffice.
    """
    images, people, skipped = _scan_tree(Path(root))
    for name, found in people.items():
        if isinstance(found, ImageError):
            skipped.append((Path(root) / name, str(found)))
        else:
            images += found
    if not images:
        raise _no_pictures(Path(root), skipped)
    return images, skipped


def report_skipped(skipped: Sequence[tuple[Path, str]]) -> None:
    """Logs what the functions above have skipped."""
    for path, reason in skipped:
        log.warning("skipped %s: %s", path, reason)


def _scan_tree(
    root: Path,
) -> tuple[list[Path], dict[str, list[Path] | ImageError], list[tuple[Path, str]]]:
    """Pictures in `root`, those of each sub-folder or why it has none, and what was skipped."""
    own, entries = _scan(root)
    people: dict[str, list[Path] | ImageError] = {}
    skipped = []
    for entry, reason in entries:
        if reason != "sub-folder":
            skipped.append((entry, reason))
            continue
        try:
            people[entry.name], inside = list_images(entry)
            skipped += inside
        except ImageError as error:
            is_nobody = isinstance(error, NoPicturesError) and (
                error.is_empty or entry.name.startswith("__")
            )
            if is_nobody:
                skipped.append((entry, "it holds no pictures"))
            else:
                people[entry.name] = error
    return own, people, skipped


def _scan(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    images, skipped = [], []
    try:
        for entry in sorted(folder.iterdir()):
            reason = _reason_to_skip(entry)
            if reason:
                skipped.append((entry, reason))
            else:
                images.append(entry)
    except FileNotFoundError:
        raise ImageError(f"the folder of pictures {folder} does not exist") from None
    except NotADirectoryError:
        raise ImageError(
            f"expected a folder of pictures, got the file {folder}; pass the folder that holds it"
        ) from None
    except OSError as error:
        raise ImageError(
            f"the folder of pictures {folder} cannot be read: {error.strerror}"
        ) from error
    return images, skipped


def _no_pictures(folder: Path, skipped: list[tuple[Path, str]]) -> NoPicturesError:
    shown = (f"{path.relative_to(folder)} ({reason})" for path, reason in skipped[:5])
    found = ", ".join(shown) or "nothing"
    more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    error = NoPicturesError(
        f"no pictures in {folder}: expected files ending in {', '.join(SUFFIXES)}, "
        f"found {found}{more}"
    )
    error.skipped = skipped
    error.is_empty = all(reason == "hidden" for _, reason in skipped)
    return error


def _reason_to_skip(entry: Path) -> str | None:
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_dir():
        return "sub-folder"
    if not entry.is_file():
        return "not a regular file"
    if entry.suffix.lower() not in SUFFIXES:
        return f"suffix {entry.suffix or '(none)'}"
    return None
