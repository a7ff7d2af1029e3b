"""Where the pictures of a batch are kept: each by the hash of its row, as files or in shards."""

import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from idea_jax.data import images
from idea_jax.errors import InputError
from idea_jax.runtime.files import atomic_write

log = logging.getLogger(__name__)

INDEX, PICTURES, SHARDS = "index.jsonl", "pictures", "shards"
WAITING = ".waiting"  # pictures whose shard is not complete yet
KEY = 32  # letters of a row's hash that name its picture
ROW_GROUP = 100  # rows of a Parquet file that are read together


class StoreError(InputError, ValueError):
    """A folder has pictures already, or what writes this format is not installed."""


class Held(NamedTuple):
    """A picture that is on the disk: in which file, below the folder, and its own SHA-256."""

    file: str
    sha256: str
    about: dict


def parquet() -> Any:
    """pyarrow's module for Parquet.

    Raises:
      StoreError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise StoreError(
            "--format parquet needs the package pyarrow; install it, in the folder of this "
            "project, with: pip install '.[parquet]'"
        ) from error
    return pyarrow.parquet


class Store:
    """The pictures of a folder.

    A picture is first a file of its own, which is there as a whole or not at all. Where shards are
    wanted, `pack` moves it into one; a kill in between leaves it in either place or in both.

    Args:
      kind: "folder", "tar" or "parquet".
      picture: "png", "webp" or "jpeg".
      process: number of this process, which names its shards.
    """

    def __init__(self, out: Path, kind: str, picture: str, process: int = 0):
        self.out, self.kind, self.picture, self.process = out, kind, picture, process
        if kind == "parquet":
            parquet()

    def is_empty(self) -> bool:
        """Whether there is nothing of an earlier run."""
        places = (INDEX, PICTURES, SHARDS, WAITING)
        return not any((self.out / name).exists() for name in places)

    def path(self, digest: str) -> Path:
        """The file of a picture before it is packed."""
        name = f"{digest[:KEY]}.{self.picture}"
        if self.kind == "folder":
            return self.out / PICTURES / digest[:2] / name
        return self.out / WAITING / name

    def put(self, digest: str, data: bytes) -> Held:
        """Writes a picture as a file of its own, atomically.

        Raises:
          WriteError: the disk is full, or the place cannot be written to.
        """
        path = self.path(digest)
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
        return Held(self._name(path), hashlib.sha256(data).hexdigest(), {})

    def _name(self, path: Path) -> str:
        return path.relative_to(self.out).as_posix()

    def held(self, sets_aside: bool = True) -> dict[str, Held]:
        """What is there and whole, by the hash of the row; damaged files are reported.

        Args:
          sets_aside: whether damaged shards are renamed.
        """
        found: dict[str, Held] = {}
        for path in sorted((self.out / SHARDS).glob(f"[0-9]*.{self.kind}")):
            try:
                found |= {digest: held for digest, held, _ in self.shard(path)}
            except Exception as error:  # of tarfile or pyarrow, without a common base
                if not sets_aside:
                    log.warning("%s is damaged (%s)", path, error)
                    continue
                aside = path.with_name(f"damaged-{path.name}")
                log.warning("%s is damaged (%s); renamed to %s", path, error, aside.name)
                with suppress(FileNotFoundError):  # another process has seen it, too
                    path.replace(aside)
        folder = self.out / (PICTURES if self.kind == "folder" else WAITING)
        with ThreadPoolExecutor() as pool:
            for held in pool.map(self._read, sorted(folder.rglob(f"*.{self.picture}"))):
                if held is not None:
                    found.setdefault(held.about["hash"], held)
        return found

    def _read(self, path: Path) -> Held | None:
        """A picture that is a file of its own; None for one that is damaged or of no row."""
        if path.name.startswith("."):
            return None
        try:
            data = path.read_bytes()
            about = json.loads(images.read_text(data)["parameters"])
            if self.path(about["hash"]) != path:
                raise images.ImageError("it is that of another row")
        except (KeyError, TypeError, ValueError, OSError) as error:
            log.warning("%s cannot be used and is drawn again: %s", path, error)
            return None
        return Held(self._name(path), hashlib.sha256(data).hexdigest(), about)

    def shard(self, path: Path) -> Iterator[tuple[str, Held, bytes]]:
        """(hash of the row, what is held, picture) of each row of a shard.

        Raises:
          ValueError, KeyError, OSError, tarfile.TarError, pyarrow's: it is damaged.
        """
        read = self._rows_of_tar if self.kind == "tar" else self._rows_of_parquet
        for data, about in read(path):
            digest = hashlib.sha256(data).hexdigest()
            if digest != about["sha256"]:
                raise ValueError(f"the picture of {about['hash'][:KEY]} was changed")
            yield about["hash"], Held(self._name(path), digest, about), data

    def _rows_of_tar(self, path: Path) -> Iterator[tuple[bytes, dict]]:
        with tarfile.open(path, "r:") as tar:
            members = {member.name: member for member in tar}
            for name, member in members.items():
                if name.endswith(".json"):
                    about = json.loads(_member(tar, member))
                    picture = members[f"{Path(name).stem}.{self.picture}"]
                    yield _member(tar, picture), about

    def _rows_of_parquet(self, path: Path) -> Iterator[tuple[bytes, dict]]:
        file = parquet().ParquetFile(path)
        for batch in file.iter_batches(ROW_GROUP, columns=["image", "row"]):
            for row in batch.to_pylist():
                yield row["image"]["bytes"], json.loads(row["row"])

    def pack(self, digests: Sequence[str], number: int) -> dict[str, Held]:
        """Moves pictures that wait into a shard, whose bytes depend on them alone.

        Returns:
          What is held of each.

        Raises:
          WriteError: the disk is full, or the place cannot be written to.
        """
        path = self.out / SHARDS / f"{self.process:03d}-{number:05d}.{self.kind}"
        files = [self.path(digest) for digest in digests]
        rows = []
        for digest, file in zip(digests, files, strict=True):
            data = file.read_bytes()
            about = json.loads(images.read_text(data)["parameters"])
            rows.append((digest, data, about | {"sha256": hashlib.sha256(data).hexdigest()}))
        with atomic_write(path) as temporary:
            (self._write_tar if self.kind == "tar" else self._write_parquet)(temporary, rows)
        for file in files:
            file.unlink(missing_ok=True)
        return {digest: Held(self._name(path), about["sha256"], about) for digest, _, about in rows}

    def _write_tar(self, path: Path, rows: Sequence[tuple[str, bytes, dict]]) -> None:
        """As WebDataset reads it: files of one name belong together."""
        with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as tar:
            for digest, data, about in rows:
                text = json.dumps(about).encode()
                for suffix, content in ((self.picture, data), ("json", text)):
                    member = tarfile.TarInfo(f"{digest[:KEY]}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    def _write_parquet(self, path: Path, rows: Sequence[tuple[str, bytes, dict]]) -> None:
        """`image` is the column that Hugging Face's datasets take for pictures; the rest of a row
        stands in columns of their own, and whole in `row`."""
        import pyarrow

        table = {
            "image": [
                {"bytes": data, "path": f"{digest[:KEY]}.{self.picture}"}
                for digest, data, _ in rows
            ],
            "row": [json.dumps(about) for _, _, about in rows],
        }
        for name in ("hash", "sha256", "people", "prompt", "negative_prompt", "seed", "number"):
            table[name] = [about[name] for _, _, about in rows]
        parquet().write_table(pyarrow.table(table), path, row_group_size=ROW_GROUP)

    def drop_packed(self, held: dict[str, Held]) -> None:
        """Deletes pictures that wait although a shard has them: a kill came in between."""
        if self.kind == "folder":
            return
        for digest, one in held.items():
            if one.file.startswith(f"{SHARDS}/"):
                self.path(digest).unlink(missing_ok=True)

    def free_numbers(self) -> Iterator[int]:
        """Numbers of shards that this process has not written yet, ascending."""
        number = 0
        while True:
            path = self.out / SHARDS / f"{self.process:03d}-{number:05d}.{self.kind}"
            if not path.exists():
                yield number
            number += 1


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is no file")
    return file.read()


def write_index(out: Path, lines: Sequence[dict]) -> Path:
    """Writes what became of each line of the job file; one JSON object a line."""
    path = out / INDEX
    content = "".join(json.dumps(line) + "\n" for line in lines)
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="ascii")
    return path
