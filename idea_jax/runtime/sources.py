"""The package's own sources: what they are, and whether this process has loaded just these."""

import functools
import hashlib
import time
from pathlib import Path

BEGAN = time.time()  # of this process, as far as the package goes: commands import this first
FOLDER = Path(__file__).resolve().parent.parent


@functools.cache
def digest(folder: Path = FOLDER) -> str | None:
    """SHA-256 of all Python files of the package, with their names, hexadecimal.

    None if one has changed since this process began: what is loaded may be another one then, and
    nobody can tell of which sources something is that this process makes.
    """
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        about, content = path.stat(), path.read_bytes()
        if max(about.st_mtime, about.st_ctime) >= BEGAN:
            return None
        found.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()
