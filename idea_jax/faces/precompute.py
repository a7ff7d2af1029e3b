"""Adds the faces of many pictures to a table, which training reads instead of the face models."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from idea_jax.data import images
from idea_jax.faces import table as face_table
from idea_jax.faces.finding import Finder
from idea_jax.faces.models import FaceError


def precompute(
    pictures: Sequence[images.PictureFile], out: Path, finder: Finder, *, seconds: float = 30.0
) -> list[tuple[Any, str]]:
    """Adds the faces of pictures to the table at `out`; returns the pictures that failed, and why.

    Pictures whose contents are in the table are not looked at again. The table is saved on the way
    and when anything stops the work, so that the same call goes on with it; then the pictures that
    failed are printed, too.

    Args:
      seconds: least time from one save to the next; each writes the whole table.

    Raises:
      FaceError: `out` is a table that was made in another way, or no table.
      WriteError: it cannot be written.
    """
    about, rows, names = finder.about, {}, {}
    if out.exists():
        table = read_table(out, about)
        rows, names = dict(table.rows), dict(table.names)
    saved, saved_at = len(rows), time.monotonic()

    def save():
        face_table.write(out, face_table.FaceTable(about, rows, names))

    failed = []
    try:
        for picture in tqdm(pictures, unit="img", disable=None):
            try:
                digest = picture.sha256()
                names[digest] = picture.name  # first: no row may be without its name
                if digest not in rows:
                    rows[digest] = finder.look(picture)
            except (FaceError, images.ImageError, OSError) as error:
                failed.append((picture, str(error)))
            if len(rows) > saved and time.monotonic() - saved_at >= seconds:
                save()
                saved, saved_at = len(rows), time.monotonic()
    finally:
        try:
            if len(rows) > saved:
                save()
        finally:
            _print_failed(failed, len(pictures))
    return failed


def read_table(path: Path, about: face_table.About) -> face_table.FaceTable:
    """Reads a table that rows can be added to.

    Raises:
      FaceError: it was made in another way than rows are made now, or it is no table.
    """
    table = face_table.read(path)
    if table.about != about:
        raise FaceError(
            f"{path} was made with {table.about}, now it is {about}; choose another --out, or "
            "delete the file"
        )
    return table


def _print_failed(failed: list[tuple[Any, str]], count: int) -> None:
    if failed:
        print(f"{len(failed)} of {count} pictures cannot be used:", file=sys.stderr)
        width = max(len(picture.name) for picture, _ in failed)
        for picture, why in failed:
            print(f"  {picture.name:{width}}  {why}", file=sys.stderr)
