"""Programs as they were traced: kept for the next run, which then traces and lowers nothing.

XLA's compiled programs are kept by JAX (`compile_cache`), and found by what was lowered: to have
that, each run would trace its functions anew, which takes longer than all that follows. Here what
was lowered is kept, too, as `jax.export` writes it: StableHLO, which is data and runs nothing when
it is read. It lies in the same folder, under a digest of all that it depends on: see `key_of`.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import export

from idea_jax.runtime import sources
from idea_jax.runtime.compile_cache import folder
from idea_jax.runtime.files import atomic_write
from idea_jax.runtime.versions import versions

log = logging.getLogger(__name__)

SUFFIX, MAGIC = ".trace", b"idea_jax trace 1\n"
MOST = 64  # files that are kept; those used longest ago are removed beyond this
# Settings of JAX that change nothing that is traced, among others where things are kept.
OTHER_SETTINGS = ("cache", "log", "dump", "traceback", "num_cpu_devices", "coordinat")
# Operations that XLA may take back from one version to the next. It is the same one here: its
# version is part of the key.
UNSTABLE = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


class Kind(NamedTuple):
    """A jitted function of positional arguments that is kept as traced.

    Attributes:
      name: of the compiled program, in files and logs.
      static: places of the arguments that are no arrays.
      donated: places of those whose memory the results may take.
      outputs: arguments -> a tree of the structure of what the function returns.
    """

    name: str
    static: tuple[int, ...]
    donated: tuple[int, ...]
    outputs: Callable[..., Any]


# What this process has traced or read: by function, static arguments, structure and types.
_ready: dict[tuple, Callable] = {}
_lock = threading.Lock()


def lower(kind: Kind, function: Any, arguments: Sequence, about: Any = None) -> jax.stages.Lowered:
    """A function lowered for arguments, or shapes of such: read from an earlier run, or traced.

    Args:
      function: jitted; what it computes depends on its arguments and the package's sources alone.
      about: all that the static arguments are, in values whose `repr` says everything; None where
        they are such themselves.
    """
    leaves = leaves_of(kind, arguments)
    exported = None
    with suppress(NotKept):
        key = key_of(kind, arguments, about)
        exported = read(kind, key)
        if exported is None:
            exported = trace(kind, function, arguments)
            write(kind, key, exported)
    if exported is None:
        return function.lower(*arguments)
    call = jitted(kind, exported, arguments)
    lowered = call.lower(*leaves)
    with _lock:
        _ready[identity_of(kind, function, arguments)] = call
    return lowered


def call(kind: Kind, function: Callable, *arguments: Any) -> Any:
    """What a function returns: by the program that `lower` has made for such arguments, if any."""
    ready = _ready.get(identity_of(kind, function, arguments)) if _ready else None
    if ready is None:
        return function(*arguments)
    results = ready(*leaves_of(kind, arguments))
    return jax.tree.unflatten(jax.tree.structure(kind.outputs(*arguments)), results)


class NotKept(Exception):
    """A program cannot be kept, or nothing is."""


def dynamic(kind: Kind, arguments: Sequence) -> list:
    """The arguments that are trees of arrays."""
    return [tree for place, tree in enumerate(arguments) if place not in kind.static]


def leaves_of(kind: Kind, arguments: Sequence) -> list:
    """The arrays of all arguments, one after the other."""
    return jax.tree.leaves(dynamic(kind, arguments))


def donated_leaves(kind: Kind, arguments: Sequence) -> tuple[int, ...]:
    """Places of the arrays whose memory the results may take, among `leaves_of`."""
    found: list[int] = []
    first = 0
    for place, tree in enumerate(arguments):
        if place not in kind.static:
            count = len(jax.tree.leaves(tree))
            found += range(first, first + count) if place in kind.donated else ()
            first += count
    return tuple(found)


def identity_of(kind: Kind, function: Callable, arguments: Sequence) -> tuple:
    """By what a call of this process finds the program that was lowered for such arguments."""
    leaves, structure = jax.tree.flatten(dynamic(kind, arguments))
    static = tuple(arguments[place] for place in kind.static)
    return function, static, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def key_of(kind: Kind, arguments: Sequence, about: Any) -> str:
    """Hexadecimal digest of all that what is traced depends on: the package's sources, versions,
    JAX's settings, the static arguments, and the types and places of the others.

    Raises:
      NotKept: something of it cannot be told, or the sources have changed since they were loaded.
    """
    own = sources.digest() if folder() is not None else None
    if own is None or not hasattr(os, "geteuid"):
        raise NotKept
    leaves, structure = jax.tree.flatten(dynamic(kind, arguments))
    settings = {
        name: value
        for name, value in sorted(jax.config.values.items())
        if not any(word in name for word in OTHER_SETTINGS)
    }
    if about is None:
        about = [arguments[place] for place in kind.static]
    places = [getattr(leaf, "sharding", None) for leaf in leaves]
    kinds = {(d.platform, d.device_kind) for place in places if place for d in place.device_set}
    parts = (
        *(MAGIC, own, versions(), settings, kind.name, kind.static, kind.donated, about),
        *(structure, [(leaf.shape, str(leaf.dtype)) for leaf in leaves], places, sorted(kinds)),
        (jax.default_backend(), jax.process_count(), jax.local_device_count()),
    )
    text = "\n".join(map(repr, parts))
    # What is told by its place in memory, or in part, is not told.
    if " at 0x" in text or "..." in text or "<function" in text:
        raise NotKept
    return hashlib.sha256(text.encode()).hexdigest()


def trace(kind: Kind, function: Callable, arguments: Sequence) -> export.Exported:
    """Traces and lowers a function of the arrays of its arguments.

    Raises:
      NotKept: it holds something that cannot be exported.
    """
    structure = jax.tree.structure(dynamic(kind, arguments))

    def of_leaves(*leaves):
        trees = iter(jax.tree.unflatten(structure, leaves))
        given = [x if i in kind.static else next(trees) for i, x in enumerate(arguments)]
        return jax.tree.leaves(function(*given))

    of_leaves.__name__ = kind.name
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in UNSTABLE]
    donated = donated_leaves(kind, arguments)
    try:
        jitted = jax.jit(of_leaves, donate_argnums=donated)
        return export.export(jitted, disabled_checks=allowed)(*leaves_of(kind, arguments))
    except (ValueError, NotImplementedError) as error:
        log.debug("%s is not kept: %s", kind.name, error)
        raise NotKept from error


def jitted(kind: Kind, exported: export.Exported, arguments: Sequence) -> Any:
    """What was exported, as a jitted function of arrays."""

    def of_leaves(*leaves):
        return exported.call(*leaves)

    of_leaves.__name__ = kind.name
    return jax.jit(of_leaves, donate_argnums=donated_leaves(kind, arguments))


def path_of(kind: Kind, key: str) -> Path:
    """Where a program is kept.

    Raises:
      NotKept: nothing is.
    """
    where = folder()
    if where is None:
        raise NotKept
    return where / f"{kind.name}-{key}{SUFFIX}"


def read(kind: Kind, key: str) -> export.Exported | None:
    """What an earlier run has traced; None if there is none, or none that can be used.

    Raises:
      NotKept: nothing is kept.
    """
    path = path_of(kind, key)
    try:
        with open(path, "rb") as file:
            about, content = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s is not used: %s", path, error.strerror)
        return None
    head = MAGIC + key.encode() + b"\n"
    payload = content[len(head) + 32 :]
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        log.warning("%s is not used: others than you can write it; it is made again", path)
    elif content[: len(head) + 32] != head + hashlib.sha256(payload).digest():
        log.warning("%s is damaged; it is made again", path)
    else:
        try:
            exported = export.deserialize(bytearray(payload))
            os.utime(path)
            return exported
        except Exception as error:  # whatever a reader of binary files may raise
            log.warning("%s cannot be read (%s); it is made again", path, error)
    return None


def write(kind: Kind, key: str, exported: export.Exported) -> None:
    """Keeps a program; without success nothing is lost but the next run's time."""
    path = path_of(kind, key)
    try:
        payload = bytes(exported.serialize())
        with atomic_write(path, private=True) as temporary:
            digest = hashlib.sha256(payload).digest()
            temporary.write_bytes(MAGIC + key.encode() + b"\n" + digest + payload)
        trim(path.parent)
    except (OSError, ValueError, NotImplementedError, ImportError) as error:
        log.debug("%s is not kept: %s", kind.name, error)


def trim(where: Path) -> None:
    """Removes the programs that were used longest ago beyond `MOST`."""

    def used(path: Path) -> float:
        with suppress(OSError):
            return path.stat().st_mtime
        return 0.0

    for path in sorted(where.glob(f"*{SUFFIX}"), key=used, reverse=True)[MOST:]:
        with suppress(OSError):
            path.unlink()
