"""Writing files so that a failure never costs an earlier result, and safe names for folders."""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it to `path` only if the block succeeds.

    The temporary file keeps the suffix of `path`, since many writers choose the format by it. On
    any error it is removed, and whatever was at `path` before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    # mkstemp makes the file private to the user; a result gets the permissions any new file gets.
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~umask)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def slug(text: str, length: int = 80) -> str:
    """Returns a folder name for any text: letters, digits and dashes, then a hash of the text.

    The hash keeps two texts apart that look alike once their other characters are gone. The name
    has no path separator, does not start with a dot and is at most `length + 9` characters long.
    """
    readable = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:length].strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{readable}-{digest}" if readable else digest
