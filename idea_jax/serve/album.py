"""Pictures that a server was asked to keep: a file each, and beside it what it is."""

import json
import logging
import re
import secrets
import threading
import time
from pathlib import Path
from typing import Any

from idea_jax.runtime.files import atomic_write
from idea_jax.serve.problems import HttpProblem

log = logging.getLogger(__name__)

PICTURES = "pictures"
ID = re.compile(r"[0-9a-f]{32}")
TEMPORARY = ".tmp-"  # how the names of files begin that are being written
MEDIA = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}
KINDS = {media: kind for kind, media in MEDIA.items()}
OWN = re.compile(rf"({ID.pattern}|{re.escape(TEMPORARY)}\w+)\.(json|{'|'.join(MEDIA)})")


class Album:
    """The pictures of a folder; every method may be called from any thread.

    A picture is there once its description is, which is written last.

    Args:
      data: the server's folder; most: pictures that are kept, beyond which the oldest go.
    """

    def __init__(self, data: Path, most: int):
        self.folder, self.most, self.lock = data / PICTURES, most, threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.about: dict[str, dict[str, Any]] = {}
        # Other files may lie here, such as pictures of idea-sample: they are left alone.
        own = [path for path in sorted(self.folder.iterdir()) if OWN.fullmatch(path.name)]
        for path in own:
            if path.suffix != ".json" or path.name.startswith(TEMPORARY):
                continue
            try:
                about = json.loads(path.read_text("utf-8"))
                list(about["about"]["people"])  # by whom pictures are found, and deleted
                if self._file(path.stem, about).is_file():
                    self.about[path.stem] = about
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("the description of a picture cannot be used: %s", error)
        # What a kill left: pictures without a description, and the other way round.
        for path in own:
            if path.stem not in self.about:
                path.unlink(missing_ok=True)

    def _file(self, key: str, about: dict[str, Any]) -> Path:
        return self.folder / f"{key}.{KINDS[about['type']]}"

    def keep(self, data: bytes, about: dict[str, Any]) -> dict[str, Any]:
        """Keeps a picture; returns what is told of it.

        Args:
          about: what is told besides its id and place; `type` is its media type.

        Raises:
          WriteError: the disk is full.
        """
        key = f"{time.time_ns():016x}{secrets.token_hex(8)}"
        told = {**about, "id": key, "url": f"/v1/pictures/{key}", "row": None, "data": None}
        # Nobody knows of it yet, so the lock is for the names alone: others do not wait for a disk.
        for path, content in (
            (self._file(key, told), data),
            (self.folder / f"{key}.json", json.dumps(told).encode()),
        ):
            with atomic_write(path) as temporary:
                temporary.write_bytes(content)
        with self.lock:
            self.about[key] = told
            oldest = sorted(self.about)[: max(0, len(self.about) - self.most)]
            gone = {old: self.about.pop(old) for old in oldest}
        self._unlink(gone)
        return told

    def listed(self, name: str | None, limit: int, before: str | None) -> list[dict[str, Any]]:
        """What is told of the newest pictures, the newest first.

        Args:
          name: of somebody on it; None for everybody.
          before: the id of a picture; those that are older than it.
        """
        with self.lock:
            keys = sorted(self.about, reverse=True)
            found = (self.about[key] for key in keys if before is None or key < before)
            own = (one for one in found if name is None or name in one["about"]["people"])
            return [one for one, _ in zip(own, range(limit), strict=False)]

    def get(self, key: str) -> tuple[Path, str]:
        """File and media type of a picture.

        Raises:
          HttpProblem: there is none.
        """
        with self.lock:
            about = self.about.get(key)
        if about is None:
            raise HttpProblem("not-found", "there is no such picture")
        return self._file(key, about), about["type"]

    def remove(self, key: str) -> None:
        """Deletes a picture.

        Raises:
          HttpProblem: there is none.
        """
        with self.lock:
            gone = {key: self.about.pop(key)} if key in self.about else {}
        if not gone:
            raise HttpProblem("not-found", "there is no such picture")
        self._unlink(gone)

    def remove_of(self, name: str) -> list[str]:
        """Deletes all pictures that show somebody; returns their files as the server tells them."""
        with self.lock:
            keys = [key for key, one in self.about.items() if name in one["about"]["people"]]
            gone = {key: self.about.pop(key) for key in keys}
        return self._unlink(gone)

    def _unlink(self, gone: dict[str, dict[str, Any]]) -> list[str]:
        """Deletes the files of pictures, the description first; returns both of each."""
        files = []
        for key, about in gone.items():
            files += [self.folder / f"{key}.json", self._file(key, about)]
        for path in files:
            path.unlink(missing_ok=True)
        return [path.relative_to(self.folder.parent).as_posix() for path in files]
