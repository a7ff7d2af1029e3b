"""The people that a server keeps: a folder each, which is there as a whole or not at all.

`DATA/people/NAME` holds `identity.safetensors` and what else training writes, `person.json` (when,
from how many photos), `job.json` (the record that `idea_jax.jobs` keeps of a person), and, where it
was asked for, the photos and the face by which likeness is told. A new person is written beside the
others under a hidden name, and gets the own one in one step.
"""

import dataclasses
import functools
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from idea_jax import jobs
from idea_jax.data.text import Placeholder
from idea_jax.errors import InputError
from idea_jax.formats.identity import Identity, IdentityError, check_identity, read_identity
from idea_jax.models import sd
from idea_jax.runtime.files import atomic_write, file_digest, write_json, write_tensors
from idea_jax.sampling.engine import KnownPerson
from idea_jax.sampling.plan import NOBODY
from idea_jax.serve.problems import HttpProblem

log = logging.getLogger(__name__)

PEOPLE, ABOUT, FACE, COVER = "people", "person.json", "face.safetensors", "cover.png"
PHOTOS = "photos"
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
NEW, OLD, GONE = ".tmp-", ".old-", ".gone-"  # how the names of folders begin that are no person


@dataclass(frozen=True)
class Resident:
    """Somebody on the shelf.

    Attributes:
      about: `person.json`.
      face: float32[512] of unit norm, by which likeness is told; None if it is not kept.
      sha256: of the identity file.
      bytes: of all their files.
    """

    name: str
    folder: Path
    known: KnownPerson
    about: dict[str, Any]
    face: np.ndarray | None
    sha256: str
    bytes: int
    identity: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What clients are told."""
        cover = None
        if (mark := self.about.get("cover")) is not None:
            cover = f"/v1/identities/{self.name}/cover?v={mark}"
        return {
            "name": self.name,
            "created": self.about["created"],
            "photos": self.about.get("photos", 0),
            "kept_photos": self.about.get("kept_photos", 0),
            "keeps_face": self.face is not None,
            "seconds": self.about.get("seconds"),
            "cover": cover,
            "cover_likeness": self.about.get("cover_likeness"),
            "bytes": self.bytes,
            "sha256": self.sha256,
            **self.identity,
        }


class Shelf:
    """The people of a folder; every method may be called from any thread.

    Who is here is behind one lock, and the files behind another, so that whoever only asks does
    not wait for a disk.

    Args:
      data: the server's folder.
      model: that draws them; enhancer: SHA-256 of the shared ID-Enhancer that is there, if any.
      forget: deletes what else there is of somebody whose deletion was broken off.
    """

    def __init__(
        self,
        data: Path,
        model: sd.StableDiffusion,
        enhancer: str | None,
        forget: Callable[[str], Any] = lambda name: None,
    ):
        self.folder, self.model, self.enhancer = data / PEOPLE, model, enhancer
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.lock, self.disk = threading.Lock(), threading.Lock()
        self.residents: dict[str, Resident] = {}
        self._recover(forget)
        for folder in sorted(self.folder.iterdir()):
            if not self._is_folder(folder.name):
                continue
            try:
                self.residents[folder.name] = self._read(folder, folder)
            except (InputError, OSError) as error:
                log.warning("%s is left out: %s", folder.name, error)

    def _recover(self, forget: Callable[[str], Any]) -> None:
        """Undoes what was under way when the server was killed; ends what was being deleted."""
        for old in self.folder.glob(f"{OLD}*"):
            own = self.folder / old.name.removeprefix(OLD)
            if own.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                old.rename(own)
        for gone in self.folder.glob(f"{GONE}*/*"):
            if not (self.folder / gone.name).exists():  # else they were learned anew
                forget(gone.name)
        for half in (*self.folder.glob(f"{NEW}*"), *self.folder.glob(f"{GONE}*")):
            shutil.rmtree(half, ignore_errors=True)
        for half in self.folder.glob(f"*/{NEW}*"):
            half.unlink(missing_ok=True)

    def _read(self, folder: Path, own: Path) -> Resident:
        """Somebody from their folder.

        Args:
          own: what the folder is called from now on.

        Raises:
          IdentityError, JobsError: it cannot be used.
        """
        path = folder / jobs.RESULT
        identity, digest = read_identity(path), file_digest(path)
        check_identity(identity, self.model, own.name)
        if identity.needs_enhancer and identity.enhancer != self.enhancer:
            raise IdentityError("they began with another shared ID-Enhancer than the server's")
        if (folder / jobs.RECORD).is_file():
            record = jobs.from_line((folder / jobs.RECORD).read_text("ascii", "replace"))
            if record.result != digest:
                raise IdentityError("the identity file was changed since it was written")
        about: dict[str, Any] = {}
        with suppress(OSError, ValueError, TypeError):
            about = dict(json.loads((folder / ABOUT).read_text("utf-8")))
        if not isinstance(about.get("created"), str):
            about["created"] = moment(path.stat().st_mtime)
        return Resident(
            name=own.name,
            folder=own,
            known=known_person(identity, own / jobs.RESULT, digest),
            about=about,
            face=read_face(folder / FACE),
            sha256=digest,
            bytes=sum(file.stat().st_size for file in files_of(folder)),
            identity={
                "steps": identity.steps,
                "model": identity.base_model,
                "profile": identity.method.profile,
                "placeholder": identity.placeholder,
            },
        )

    def all(self) -> list[Resident]:
        """Everybody, the newest first."""
        with self.lock:
            found = list(self.residents.values())
        return sorted(found, key=lambda one: (one.about["created"], one.name), reverse=True)

    def get(self, name: str) -> Resident:
        """Somebody.

        Raises:
          HttpProblem: there is nobody of this name.
        """
        with self.lock:
            found = self.residents.get(name)
        if found is None:
            raise HttpProblem("not-found", "there is nobody of this name")
        return found

    def has(self, name: str) -> bool:
        """Whether there is a folder of this name, if only one that cannot be used."""
        return name in self.residents or self._is_folder(name)

    def _is_folder(self, name: str) -> bool:
        path = self.folder / name
        return bool(NAME.fullmatch(name)) and path.is_dir() and not path.is_symlink()

    def new_folder(self) -> Path:
        """A folder for somebody who is not here yet, or for a copy that goes with the server."""
        return Path(tempfile.mkdtemp(prefix=NEW, dir=self.folder))

    def put(
        self, name: str, made: Path, replace: bool, settle: Callable[[], None] = lambda: None
    ) -> Resident:
        """Takes somebody in whose folder is complete, in one step.

        Args:
          made: of `new_folder`; it gets the person's name.
          settle: called before that; a deletion comes before it or after the step. What it raises
            keeps them out.

        Raises:
          HttpProblem: somebody of this name is here, and is not to be replaced.
          WriteError: the disk is full.
        """
        own, old = self.folder / name, self.folder / f"{OLD}{name}"
        made_known = self._read(made, own)
        for path in (*files_of(made), made):
            sync(path)
        with self.disk:
            if own.exists() and not replace:
                raise HttpProblem("conflict", "somebody of this name is here already")
            settle()
            if own.exists():
                own.rename(old)
            made.rename(own)
            sync(self.folder)
            with self.lock:
                self.residents[name] = made_known
            shutil.rmtree(old, ignore_errors=True)
        return made_known

    def set_cover(self, resident: Resident, png: bytes, mark: str, likeness: float | None) -> None:
        """Keeps a picture of somebody, unless they are gone or another one by now."""
        with self.disk:
            with self.lock:
                is_here = self.residents.get(resident.name) is resident
            if not is_here:
                return
            with atomic_write(resident.folder / COVER) as temporary:
                temporary.write_bytes(png)
            about = resident.about | {"cover": mark, "cover_likeness": likeness}
            write_json(resident.folder / ABOUT, about)
            size = sum(file.stat().st_size for file in files_of(resident.folder))
            covered = dataclasses.replace(resident, about=about, bytes=size)
            with self.lock:
                self.residents[resident.name] = covered

    def hide(self, name: str) -> tuple[list[str], Path | None]:
        """Takes somebody off the shelf, also somebody who cannot be used.

        Returns:
          Their files, as paths below the server's folder, and where these are until `discard`; None
          where there are none. If the server is killed meanwhile, the next start goes on with it.

        Raises:
          HttpProblem: there is nobody of this name.
        """
        own = self.folder / name
        with self.disk:
            with self.lock:
                known = self.residents.pop(name, None)
            if not self._is_folder(name):
                hidden = self._hidden(name)
                if known is None and hidden is None:
                    raise HttpProblem("not-found", "there is nobody of this name")
                left = files_of(hidden / name) if hidden else ()
                return [self.told(own / path.relative_to(hidden / name)) for path in left], hidden
            gone = [self.told(path) for path in files_of(own)]
            hidden = Path(tempfile.mkdtemp(prefix=GONE, dir=self.folder))
            own.rename(hidden / name)
            sync(self.folder)
        return gone, hidden

    def _hidden(self, name: str) -> Path | None:
        """Where somebody is whose deletion has failed before."""
        found = self.folder.glob(f"{GONE}*/{name}") if NAME.fullmatch(name) else ()
        return next((path.parent for path in found), None)

    def discard(self, hidden: Path) -> None:
        """Deletes what was hidden.

        Raises:
          OSError: a file cannot be deleted.
        """
        shutil.rmtree(hidden)

    def told(self, path: Path) -> str:
        """A path as clients are told it."""
        return path.relative_to(self.folder.parent).as_posix()


def known_person(identity: Identity, path: Path, digest: str) -> KnownPerson:
    """Somebody as the engine knows them. All share one word, which prompts never show."""
    placeholder = Placeholder(NOBODY, identity.method.num_tokens)
    load = functools.partial(read_identity, path)
    return KnownPerson(identity.method, placeholder, digest, load)


def read_face(path: Path) -> np.ndarray | None:
    """The face by which likeness is told; None if it is not kept, or damaged."""
    from safetensors.numpy import load_file

    try:
        face = load_file(path)["face"]
    except (FileNotFoundError, SafetensorError, OSError, KeyError):
        return None
    is_face = face.shape == (512,) and face.dtype == np.float32 and np.isfinite(face).all()
    return face if is_face else None


def write_face(folder: Path, face: np.ndarray, recogniser: str) -> None:
    """Keeps a face; only the user of the server may read it.

    Args:
      recogniser: SHA-256 of the model whose embedding it is.
    """
    write_tensors(folder / FACE, {"face": face}, {"recogniser": recogniser}, private=True)


def files_of(folder: Path) -> Iterator[Path]:
    """All files below a folder, in order."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def moment(seconds: float | None = None) -> str:
    """A time in seconds since 1970, by default now, as ISO 8601 in UTC."""
    found = datetime.fromtimestamp(time.time() if seconds is None else seconds, UTC)
    return found.isoformat(timespec="milliseconds").replace("+00:00", "Z")
