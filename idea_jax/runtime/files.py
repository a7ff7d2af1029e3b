"""Files read and written so that a failure never costs an earlier result, and safe names."""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from idea_jax.errors import InputError


class WriteError(InputError, OSError):
    """A result cannot be written; the message names it, the cause and what to do."""


def cannot_write(path: str | os.PathLike, error: BaseException) -> WriteError:
    """The error to raise when `error` kept `path` from being written."""
    reason = getattr(error, "strerror", None) or error
    advice = "free some disk space or choose another folder"
    if isinstance(error, FileExistsError | NotADirectoryError):
        advice = "a file is where a folder is needed, so choose another folder"
    return WriteError(
        f"cannot write {path}: {reason}; {advice}. Nothing that was there before is lost"
    )


def read_object(path: Path, wrong: type[InputError]) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
      wrong: what is raised, with the file and the cause, where it cannot be read or holds another
        thing.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise wrong(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise wrong(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise wrong(f"{path} holds a {type(values).__name__}, expected an object")
    return values


@contextmanager
def atomic_write(path: str | os.PathLike, *, private: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` only if the block succeeds.

    The temporary file keeps the suffix of `path`, since many writers choose the format by it. On
    any error it is removed, and whatever was at `path` before is untouched.

    Args:
      private: nobody but the user may read the file; otherwise it gets the permissions that any new
        file gets.

    Raises:
      WriteError: the disk is full, or the place cannot be written to.
    """
    path = Path(path)
    made = absent(path.parent)

    def make():
        return tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)

    try:
        handle, name = make_in(path.parent, make)
        os.close(handle)
    except OSError as error:
        raise cannot_write(path, error) from error
    temporary = Path(name)
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield temporary
        # mkstemp makes it private; a writer may have made the file anew, with other permissions.
        os.chmod(temporary, 0o600 if private else 0o666 & ~umask)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        remove_empty(made)
        if isinstance(error, OSError) and not isinstance(error, WriteError):
            raise cannot_write(path, error) from error
        raise


@contextmanager
def write_together(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder; moves its files into `folder` only if the block succeeds.

    For results that belong together: on any error `folder` keeps what it held, so that it never
    mixes the files of two runs.

    Raises:
      WriteError: the disk is full, or the place cannot be written to.
    """
    folder = Path(folder)
    made = absent(folder.parent)
    try:
        temporary = Path(make_in(folder, lambda: tempfile.mkdtemp(prefix=".tmp-", dir=folder)))
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                target = folder / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)
    except OSError as error:
        raise cannot_write(folder, error.__cause__ or error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        remove_empty([folder, *made])  # not empty, as a rule: only what was made in vain goes


def absent(folder: Path) -> list[Path]:
    """A folder and those that it lies in, as far as they are not there; the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: Sequence[Path]) -> None:
    """Removes those folders in which nothing lies; the innermost come first."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def make_in(folder: Path, make: Callable[[], Any]) -> Any:
    """What `make` makes in a folder, which is made first if it is not there.

    Another run may remove the folder in between, while it is empty: it is then made again.
    """
    for _ in range(9):
        with suppress(FileNotFoundError):
            folder.mkdir(parents=True, exist_ok=True)
            return make()
    folder.mkdir(parents=True, exist_ok=True)
    return make()


def say(text: str) -> None:
    """Prints results, whatever the terminal or pipe can say; a finished run does not fail at it.

    Letters that it cannot say become escapes. Where nobody reads any more, nothing is printed.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        # Python flushes it once more at its end, and would complain then.
        with suppress(OSError, AttributeError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_writable(folder: str | os.PathLike) -> None:
    """Proves that files can be written to a folder, which need not be there, before any work is
    done. Nothing is left of it: a run that fails later leaves no empty folder.

    Raises:
      WriteError: they cannot.
    """
    made, probe = absent(Path(folder)), Path(folder) / ".writable"
    try:
        with atomic_write(probe) as temporary:
            temporary.write_bytes(b"idea_jax")
        probe.unlink()
    except OSError as error:
        raise cannot_write(folder, error.__cause__ or error) from error
    finally:
        remove_empty(made)


def is_lfs_pointer(path: str | os.PathLike) -> bool:
    """Whether a file is what git-lfs leaves in the place of a large one that was not fetched."""
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs.github.com/spec")


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    private: bool = False,
) -> None:
    """Writes a safetensors file, atomically; equal contents are equal files.

    The library orders the metadata at random, so the header is written again with sorted keys.

    Args:
      private: as of `atomic_write`.

    Raises:
      WriteError: the disk is full, or the place cannot be written to.
    """
    from safetensors.numpy import save

    content = save(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # the data stay aligned, as the format asks
    with atomic_write(path, private=private) as temporary:
        temporary.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def slug(text: str, length: int = 80) -> str:
    """Returns a folder name for any text: letters, digits and dashes, then a hash of the text.

    The hash keeps two texts apart that look alike once their other characters are gone. The name
    has no path separator, does not start with a dot and is at most `length + 9` characters long.
    """
    readable = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{readable}-{digest}" if readable else digest


def json_digest(values: dict | Sequence) -> str:
    """Returns the SHA-256 of values as JSON with sorted keys, hexadecimal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def write_json(
    path: Path, values: dict | Sequence, *, indent: int = 2, sort_keys: bool = False
) -> None:
    """Writes readable JSON, atomically."""
    content = json.dumps(values, indent=indent, sort_keys=sort_keys, ensure_ascii=False) + "\n"
    with atomic_write(path) as temporary:
        # Lone surrogates (file names that are no UTF-8) become JSON's own escapes.
        temporary.write_bytes(content.encode("utf-8", "backslashreplace"))
