"""Which pictures show whom, and what was asked for: folders on disk, perhaps of strangers."""

import json
import mimetypes
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from idea_jax.data import folders
from idea_jax.data.images import ImageError
from idea_jax.evaluation.asked import OTHER
from idea_jax.sampling.plan import safe_name

OURS, TEXT = "run.json", "prompt.txt"  # beside the pictures of a prompt, if anything is
LAYOUT = "expected PERSON/PROMPT/*.png"


class Shown(NamedTuple):
    """One picture of a method.

    Attributes:
      prompt: with `{}` for the person and `{other}` for another one, where that is known.
    """

    method: str
    person: str
    prompt: str
    path: Path


class Problem(NamedTuple):
    """What could not be scored, and why; `method` and `person` are empty where nobody's."""

    method: str
    person: str
    what: str
    why: str


def scan(method: str, root: Path, people: Sequence[str]) -> tuple[list[Shown], list[Problem]]:
    """Returns the pictures below a folder: PERSON/PROMPT/*.png, or PROMPT/*.png of one person.

    A prompt is that in `run.json`, as `idea-sample` writes it; or the text of `prompt.txt`; or the
    folder's name with spaces for its underscores. Of a picture of several people, `run.json` says
    who they are, and it is the first one's. Hidden files are left alone.

    Args:
      people: names of those who have photos.

    Raises:
      ImageError: there is no such folder, or it cannot be read.
    """
    shown: list[Shown] = []
    problems: list[Problem] = []

    def add(place: Path, why: str) -> None:
        what = root.name if place == root else str(place.relative_to(root))
        problems.append(Problem(method, "", what, why))

    firsts = _inside(root)
    pictures, _ = _pictures(root)
    if pictures:
        add(root, f"{len(pictures)} picture(s) in no folder of a prompt: {LAYOUT}")
    for first in firsts:
        try:
            folders_of = [first, *_inside(first)]
        except ImageError as error:
            add(first, _plain(error, root))
            continue
        for folder in folders_of:
            try:
                pictures, left = _pictures(folder)
            except ImageError as error:
                add(folder, _plain(error, root))
                continue
            for path, why in left:
                add(path, why)
            if folder != first:
                for deep, count in _deeper(folder):
                    add(deep, f"{count} picture(s) too deep: {LAYOUT}")
            if not pictures:
                continue
            name, prompt = _whose(folder, root, _about(folder), people)
            if name is None:
                add(folder, f"the pictures lie in no folder of a person's: {LAYOUT}")
                continue
            shown += [Shown(method, name, prompt, path) for path in pictures]
    if not shown and not problems:
        problems.append(Problem(method, "", root.name, "the folder holds no picture"))
    return shown, problems


def _inside(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
        return [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    except OSError as error:
        raise ImageError(f"the folder {folder} cannot be read: {error.strerror}") from error


def _plain(error: ImageError, root: Path) -> str:
    """What an error says, without where the folder lies: reports are passed on."""
    return str(error).replace(str(root), root.name)


def _pictures(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The pictures of a folder, and what looks like one and is left out, with the reason.

    Raises:
      ImageError: it cannot be read.
    """
    found: list[Path] = []
    try:
        found, skipped = folders.list_images(folder)
    except folders.NoPicturesError as error:
        skipped = error.skipped
    left = [(path, _reason(why)) for path, why in skipped if _is_picture(path, why)]
    if (folder / OURS).is_file():  # beside ours lies their grid
        found = [path for path in found if path.stem.isdigit()]
    return found, left


def _is_picture(path: Path, why: str) -> bool:
    """Whether somebody may miss what `folders` has skipped: notes beside pictures nobody does."""
    if why in ("hidden", "sub-folder"):
        return False
    kind, _ = mimetypes.guess_type(path.name)
    return path.suffix.lower() in folders.SUFFIXES or (kind or "").startswith("image/")


def _reason(why: str) -> str:
    """Why `folders` has skipped a picture, for a report."""
    return f"it is left out ({why}): expected files ending in {', '.join(folders.SUFFIXES)}"


def _deeper(folder: Path) -> Iterator[tuple[Path, int]]:
    """The folders below a prompt's that hold pictures, and how many."""
    for parent, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        shown = (name for name in files if not name.startswith("."))
        count = sum(Path(name).suffix.lower() in folders.SUFFIXES for name in shown)
        if count and parent != str(folder):
            yield Path(parent), count


def _about(folder: Path) -> dict:
    """What `run.json` or `prompt.txt` say of a folder; nothing where they cannot be read."""
    try:
        if (folder / OURS).is_file():
            about = json.loads((folder / OURS).read_text(encoding="utf-8"))
            return about if isinstance(about, dict) and isinstance(about.get("prompt"), str) else {}
        if (folder / TEXT).is_file():
            return {"prompt": (folder / TEXT).read_text(encoding="utf-8-sig").strip()}
        return {}
    except (OSError, ValueError, RecursionError):
        return {}


def _whose(folder: Path, root: Path, about: dict, people: Sequence[str]) -> tuple[str | None, str]:
    """The person whom the pictures of a folder show, None if nobody knows; and the prompt."""
    prompt = about.get("prompt") or folder.name.replace("_", " ")
    cast = about.get("identities")
    if isinstance(cast, dict) and len(cast) > 1:
        named = [name for name in re.findall(r"\{([^{}]*)\}", prompt) if name in cast]
        if named:
            for name in cast:
                prompt = prompt.replace(f"{{{name}}}", "{}" if name == named[0] else OTHER)
            return named[0], prompt
    if folder.parent != root:
        # A name that cannot be a folder's everywhere has another there.
        folders_of = {safe_name(name): name for name in people}
        own = folder.parent.name
        name = own if own in people else folders_of.get(own, own)
    elif len(people) == 1 and folder.name not in people:
        name = people[0]
    else:
        return None, prompt
    return name, prompt.replace(f"{{{name}}}", "{}")


def photos_of(
    root: Path, what: str, single: str = "person"
) -> tuple[dict[str, list[Path]], list[Problem]]:
    """Returns the photos of each person: of a folder per person, or of one person's folder; and
    what was left out.

    Args:
      what: those photos are, for the report.
      single: the name of the only person of a folder that holds photos itself.

    Raises:
      ImageError: the folder cannot be read, or nobody has a photo.
    """
    problems: list[Problem] = []
    if not folders.has_only_folders(root):
        found, skipped = folders.list_images(root)
        people = {single: found}
    else:
        listed, skipped = folders.list_people(root)
        people = {}
        for name, own in listed.items():
            people[name] = [] if isinstance(own, ImageError) else own
            if isinstance(own, ImageError):
                problems.append(Problem("", name, what, _plain(own, root)))
        folders.report_skipped(skipped)
    for path, why in skipped:
        name = path.parent.name if path.parent != root else ""
        if path.parent == root and path.is_dir() and not path.name.startswith((".", "__")):
            problems.append(Problem("", path.name, what, why))
        elif _is_picture(path, why):
            owner = single if single in people and not name else name
            problems.append(Problem("", owner, f"{what}: {path.name}", _reason(why)))
    return people, problems
