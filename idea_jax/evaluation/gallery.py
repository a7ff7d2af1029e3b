"""Which pictures show whom, and what was asked for: folders on disk, perhaps of strangers."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from idea_jax.data import folders
from idea_jax.data.images import ImageError
from idea_jax.evaluation.asked import OTHER
from idea_jax.sampling.plan import safe_name

OURS, TEXT = "run.json", "prompt.txt"  # beside the pictures of a prompt, if anything is


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
    for first in _inside(root):
        prompts = _inside(first)
        for folder in [first, *prompts]:
            pictures = _pictures(folder)
            if not pictures:
                continue
            about = _about(folder)
            name, prompt = _whose(folder, root, about, people)
            if name is None:
                why = "the pictures lie in no folder of a person's: expected PERSON/PROMPT/*.png"
                problems.append(Problem(method, "", str(folder.relative_to(root)), why))
                continue
            shown += [Shown(method, name, prompt, path) for path in pictures]
    if not shown and not problems:
        problems.append(Problem(method, "", root.name, "the folder holds no picture"))
    return shown, problems


def _inside(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ImageError(f"the folder {folder} cannot be read: {error.strerror}") from error
    return [path for path in entries if path.is_dir() and not path.name.startswith(".")]


def _pictures(folder: Path) -> list[Path]:
    try:
        found, _ = folders.list_images(folder)
    except folders.NoPicturesError:
        return []
    if (folder / OURS).is_file():  # beside ours lies their grid
        found = [path for path in found if path.stem.isdigit()]
    return found


def _about(folder: Path) -> dict:
    """What `run.json` or `prompt.txt` say of a folder; nothing where they cannot be read."""
    try:
        if (folder / OURS).is_file():
            about = json.loads((folder / OURS).read_text(encoding="utf-8"))
            return about if isinstance(about, dict) and isinstance(about.get("prompt"), str) else {}
        return {"prompt": (folder / TEXT).read_text(encoding="utf-8-sig").strip()}
    except (OSError, ValueError):
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


def photos_of(root: Path, single: str = "person") -> dict[str, list[Path]]:
    """Returns the photos of each person: of a folder per person, or of one person's folder.

    Args:
      single: the name of the only person of a folder that holds photos itself.

    Raises:
      ImageError: the folder cannot be read, or nobody has a photo.
    """
    if not folders.has_only_folders(root):
        return {single: folders.list_images(root)[0]}
    people, skipped = folders.list_people(root)
    folders.report_skipped(skipped)
    return {name: [] if isinstance(found, ImageError) else found for name, found in people.items()}
