"""Prepared inputs on disk: people as numbers, their faces, and their pictures as the VAE sees them.

A folder holds `index.json` and shards of two files each: `NNNNN.array_record`, one record a picture
(texts and moments), and `NNNNN.safetensors`, the faces of the same pictures in the same order. Face
embeddings are biometric data: the files are for nobody but the user to read, and hold neither names
nor paths. Records are plain numbers of a fixed layout, so reading them runs nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idea_jax import jobs
from idea_jax.errors import InputError
from idea_jax.runtime.files import atomic_write, cannot_write, file_digest, write_tensors

INDEX = "index.json"
FORMAT, FORMAT_VERSION = "idea_jax.enhancer.data", 1
NOTICE = "biometric data: face embeddings of people; delete with --purge when no longer needed"
SHARD = re.compile(r"\d{5}\.(array_record|safetensors)")
WIDTH = 512  # of a face embedding
MAX_TEXTS = 10_000  # of one picture; far above what anybody writes


class ShardsError(InputError, ValueError):
    """A prepared folder is missing, damaged, not complete, or for something else."""


class ShardRecord(NamedTuple):
    """One picture, without its face.

    Attributes:
      person: their number.
      token_ids: int32[K, T] of its texts; K = 0: the texts of the folder.
      mean, std: float16[2, h, w, C], of the scaled latents of the picture and of its mirror.
    """

    person: int
    token_ids: np.ndarray
    mean: np.ndarray
    std: np.ndarray


class Faces(NamedTuple):
    """The faces of R pictures.

    Attributes:
      person: int32[R], whose they are.
      face: float32[R, 512] of unit norm.
      turned: float32[R, 512], of a small or turned version of the picture; zeros where no face was
        found on it.
      box: float32[R, 4], left, top, right, bottom in pixels of the picture.
      name_ids: int32[R, N], tokens of the person's name, -1 where there is none.
      size_ids: int32[R, 6], what SDXL is told of the sizes of each picture; None for others.
    """

    person: np.ndarray
    face: np.ndarray
    turned: np.ndarray
    box: np.ndarray
    name_ids: np.ndarray
    size_ids: np.ndarray | None = None


@dataclass(frozen=True)
class Shard:
    """What the index knows of a shard.

    Attributes:
      number: that names its files.
      pictures: records in it.
      people: that it holds somebody's pictures of; nobody is in two shards.
      until: the place in the source of the first person who is not in it or in an earlier one.
      rejected: pictures that could not be used, since the shard before.
      records, faces: SHA-256 of its two files.
    """

    number: int
    pictures: int
    people: int
    until: int
    rejected: int
    records: str
    faces: str


@dataclass(frozen=True)
class Index:
    """What is in a folder, and what it was made for.

    Attributes:
      base_model, revision, base_weights: the checkpoint; the last are digests of its weights by
        type (`weights_digests` of `prepare`).
      face_model, detector: SHA-256 of the files; detector is None where none was used.
      source, licence, facts: where the pictures are from, under which terms, and what else decides
        what is in the folder.
      settings: of the preparation.
      num_tokens, vocab_size, length: what the token ids are for: pseudo tokens, and the text
        encoder's two tables.
      texts: int lists [K][length], for pictures without texts of their own.
      latent: h, w, C.
      shards: those that are whole.
      is_complete: whether the source was read to its end.
    """

    base_model: str
    revision: str | None
    base_weights: dict
    face_model: str
    detector: str | None
    source: str
    licence: str
    facts: dict
    settings: dict
    num_tokens: int
    vocab_size: int
    length: int
    texts: list
    latent: list
    shards: list[Shard] = field(default_factory=list)
    is_complete: bool = False

    @property
    def has_sizes(self) -> bool:
        """Whether the folder is for SDXL, which is told the sizes of pictures."""
        return self.settings.get("has_sizes") is True

    @property
    def people(self) -> int:
        return sum(shard.people for shard in self.shards)

    @property
    def pictures(self) -> int:
        return sum(shard.pictures for shard in self.shards)

    @property
    def rejected(self) -> int:
        return sum(shard.rejected for shard in self.shards)

    def made_of(self) -> dict:
        """All but what grows: two preparations of the same are equal in it."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("shards", "is_complete", "base_model", "revision")
        }


# --- records --------------------------------------------------------------------------------------


def encode(record: ShardRecord) -> bytes:
    """A record as bytes: person, K, the token ids, mean, std; little-endian."""
    ids = np.ascontiguousarray(record.token_ids, "<i4")
    head = np.array([record.person, len(ids)], "<i4")
    moments = (np.ascontiguousarray(leaf, "<f2") for leaf in (record.mean, record.std))
    return b"".join(leaf.tobytes() for leaf in (head, ids, *moments))


def decode(raw: bytes, index: Index) -> ShardRecord:
    """The record that `encode` made these bytes of.

    Raises:
      ShardsError: they are of another length, or hold what cannot be.
    """
    shape = (2, *index.latent)
    moments = 2 * int(np.prod(shape))
    person, count = np.frombuffer(raw[:8].ljust(8, b"\xff"), "<i4").tolist()
    end = 8 + 4 * count * index.length
    if not 0 <= count <= MAX_TEXTS or len(raw) != end + 2 * moments:
        raise ShardsError(f"a record of {len(raw)} bytes is none of this folder")
    ids = np.frombuffer(raw[8:end], "<i4").reshape(count, index.length)
    mean, std = np.frombuffer(raw[end:], "<f2").reshape(2, *shape)
    if count and not (ids.min() >= 0 and ids.max() < index.vocab_size + index.num_tokens):
        raise ShardsError("a record holds token ids that the text encoder does not have")
    return ShardRecord(person, ids, mean, std)


# --- writing --------------------------------------------------------------------------------------


def write_index(folder: Path, index: Index) -> None:
    """Writes the index, atomically.

    Raises:
      WriteError: the disk is full, or the place cannot be written to.
    """
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, "notice": NOTICE, **asdict(index)}
    with atomic_write(Path(folder) / INDEX, private=True) as path:
        path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def write_shard(folder: Path, number: int, records: Sequence[ShardRecord], faces: Faces) -> dict:
    """Writes the two files of a shard, atomically; returns what `Shard` holds of them.

    Raises:
      WriteError: the disk is full, or the place cannot be written to.
    """
    from array_record.python import array_record_module

    large, small = files_of(folder, number)
    with atomic_write(large, private=True) as path:
        try:
            # One record a group: each is read alone, in any order. Latents hardly compress.
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
            try:
                for record in records:
                    writer.write(encode(record))
            finally:
                writer.close()
        except RuntimeError as error:  # of the array_record library, for a full disk as well
            reason = str(error).partition(";")[0].removeprefix("write() failed: ")
            raise cannot_write(large, OSError(reason)) from error
    columns = {name: leaf for name, leaf in faces._asdict().items() if leaf is not None}
    write_tensors(small, columns, {FORMAT: NOTICE}, private=True)
    return {
        "number": number,
        "pictures": len(records),
        "people": len(set(faces.person.tolist())),
        "records": file_digest(large),
        "faces": file_digest(small),
    }


def files_of(folder: Path, number: int) -> tuple[Path, Path]:
    """The two files of a shard: records and faces."""
    stem = f"{number:05d}"
    return Path(folder) / f"{stem}.array_record", Path(folder) / f"{stem}.safetensors"


def purge(folder: str | Path) -> int:
    """Deletes what a preparation wrote into a folder, and the folder if nothing else is in it.

    Returns:
      How many files were deleted.

    Raises:
      ShardsError: the folder is no prepared one, or is being prepared; nothing is deleted.
      OSError: a file cannot be deleted.
    """
    folder = Path(folder)
    if not is_prepared(folder):
        raise ShardsError(
            f"{folder} is no prepared folder: it has no {INDEX} of this kind; nothing was deleted"
        )
    try:
        with jobs.only_run(folder, 0):
            return delete(folder)
    except jobs.JobsError as error:
        raise ShardsError(
            f"{folder} is being prepared by another process; wait until that has ended, or stop "
            "it; nothing was deleted"
        ) from error


def delete(folder: Path) -> int:
    """As `purge`, where nobody else is using the folder."""
    ours = [path for path in folder.iterdir() if SHARD.fullmatch(path.name)]
    unfinished = [path for path in folder.glob(".tmp-*") if path.is_file()]
    locks = [path for path in folder.glob(".lock-*") if path.is_file()]
    # The index last: a purge that was interrupted can be repeated.
    paths = [*ours, *unfinished, folder / INDEX]
    for path in [*locks, *paths]:
        path.unlink()
    with suppress(OSError):  # it holds something else
        folder.rmdir()
    return len(paths)


def is_prepared(folder: Path) -> bool:
    """Whether a folder has an index of this kind, of whatever version."""
    try:
        about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return isinstance(about, dict) and about.get("format") == FORMAT
    except (OSError, ValueError, RecursionError):
        return False


def clean(folder: Path, index: Index) -> None:
    """Removes what a preparation that was killed left half-written."""
    whole = {path.name for shard in index.shards for path in files_of(folder, shard.number)}
    for path in Path(folder).iterdir():
        is_ours = path.name.startswith(".tmp-") or SHARD.fullmatch(path.name)
        if is_ours and path.name not in whole and path.is_file():
            path.unlink()


# --- reading --------------------------------------------------------------------------------------


def read_index(folder: str | Path) -> Index:
    """Reads the index of a folder.

    Raises:
      ShardsError: there is none, or it is damaged or of another version.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise ShardsError(
            f"{folder} is no prepared folder: it has no {INDEX}; make one with: "
            f"python -m idea_jax.train_enhancer --prepare {folder} (--help says from what)"
        )
    try:
        about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        form, version = about.pop("format"), about.pop("format_version")
        if form != FORMAT or version != FORMAT_VERSION:
            raise ShardsError(
                f"{folder / INDEX} is of format {form}, version {version}, expected {FORMAT}, "
                f"version {FORMAT_VERSION}; prepare the folder again with this version, or install "
                "the idea_jax that wrote it"
            )
        about.pop("notice")
        entries = about.pop("shards")
        index = Index(**about, shards=[Shard(**entry) for entry in entries])
        problems = wrong_index(index)
    except ShardsError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problems = [type(error).__name__]
    if problems:
        raise ShardsError(
            f"{folder / INDEX} is damaged ({'; '.join(problems[:5])}); delete the folder with "
            "--purge and prepare it again"
        )
    return index


def wrong_index(index: Index) -> list[str]:
    """What in an index is not what a preparation writes."""
    problems = []
    instances: list[Any] = [index, *index.shards]
    for instance in instances:
        for spec in fields(instance):
            value: Any = getattr(instance, spec.name)
            kind: Any = list if spec.name == "shards" else spec.type
            if not isinstance(value, kind) or (kind is int and not 0 <= value < 2**31):
                problems.append(f"{spec.name} is {value!r:.40}")
    if problems:
        return problems
    texts = np.array(index.texts)
    most = index.vocab_size + index.num_tokens
    if texts.ndim != 2 or texts.shape[1] != index.length or texts.dtype.kind != "i":
        problems.append("texts are no token ids")
    elif not (texts.min() >= 0 and texts.max() < most):
        problems.append("texts hold token ids that the text encoder does not have")
    if len(index.latent) != 3 or not all(type(n) is int and 0 < n < 2**12 for n in index.latent):
        problems.append(f"latent is {index.latent!r:.40}")
    return problems


def verify(folder: Path, index: Index) -> list[int]:
    """Numbers of the shards whose files are not what was written."""
    damaged = []
    for shard in index.shards:
        try:
            found = [file_digest(path) for path in files_of(folder, shard.number)]
        except OSError:
            found = []
        if found != [shard.records, shard.faces]:
            damaged.append(shard.number)
    return damaged


def read_faces(folder: Path, index: Index) -> Faces:
    """The faces of all pictures of a folder, in the order of its records.

    Raises:
      ShardsError: a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    shapes = {"person": (), "face": (WIDTH,), "turned": (WIDTH,), "box": (4,)}
    shapes["name_ids"] = (index.num_tokens,)
    if index.has_sizes:
        from idea_jax.models.unet import SIZE_IDS  # --purge reads an index, and no JAX for that

        shapes["size_ids"] = (SIZE_IDS,)
    parts = []
    for shard in index.shards:
        path = files_of(folder, shard.number)[1]
        with damage(path):
            try:
                arrays: Mapping = load_file(path)
            except SafetensorError as error:
                raise ShardsError(str(error)) from error
            numbers = ("person", "name_ids", "size_ids")
            kinds = {name: np.int32 if name in numbers else np.float32 for name in shapes}
            for name, shape in shapes.items():
                value = arrays.get(name)
                if value is None or value.shape != (shard.pictures, *shape):
                    raise ShardsError(f"{name} is missing or of another shape")
                if value.dtype != kinds[name] or not np.isfinite(value).all():
                    raise ShardsError(f"{name} is of another type or not finite")
            parts.append({name: arrays[name] for name in shapes})
    return Faces(**{name: np.concatenate([part[name] for part in parts]) for name in shapes})


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Names a file in what is wrong with it.

    Raises:
      ShardsError: the block raised one, or cannot read the file.
    """
    try:
        yield
    except (ShardsError, OSError, RuntimeError) as error:  # RuntimeError: of array_record
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ShardsError(
            f"{path} is damaged ({reason[:200]}); the same --prepare command finds out which files "
            "are, and makes them again"
        ) from error


class Pictures:
    """The records of a folder by number, from 0; may be read from several threads.

    Raises:
      ShardsError: a file is missing or damaged; reading a record may raise it, too.
    """

    def __init__(self, folder: Path, index: Index):
        from array_record.python import array_record_module

        self.index, self.readers, self.paths = index, [], []
        self.first = np.cumsum([0, *(shard.pictures for shard in index.shards)])
        for shard in index.shards:
            path = files_of(folder, shard.number)[0]
            with damage(path):
                reader = array_record_module.ArrayRecordReader(
                    str(path), "readahead_buffer_size:0", file_reader_buffer_size=32768
                )
                if reader.num_records() != shard.pictures:
                    raise ShardsError(f"{reader.num_records()} records, expected {shard.pictures}")
            self.readers.append(reader)
            self.paths.append(path)

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, number: int) -> ShardRecord:
        shard = int(np.searchsorted(self.first, number, side="right")) - 1
        with damage(self.paths[shard]):
            (raw,) = self.readers[shard].read([int(number - self.first[shard])])
            return decode(raw, self.index)

    def close(self) -> None:
        """Closes the files."""
        for reader in self.readers:
            reader.close()


def remove(folder: Path, numbers: Sequence[int]) -> None:
    """Deletes shards that are to be made again."""
    for number in numbers:
        for path in files_of(folder, number):
            path.unlink(missing_ok=True)
