"""Programs as they were traced: kept for the next run, which then traces and lowers nothing.

XLA's compiled programs are kept by JAX (`compile_cache`), and found by what was lowered: to have
that, each run would trace its functions anew, which takes longer than all that follows. Here what
was lowered is kept, too, as `jax.export` writes it: StableHLO, which is data and runs nothing when
it is read. It lies in the same folder, under a digest of all that it depends on: see `key_of`.
"""

import hashlib
import json
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
# What looks into programs while they run, and so at those that are traced here alone.
DEBUGGING = ("key_reuse", "nans", "infs")
# Operations that XLA may take back from one version to the next. It is the same one here: its
# version is part of the key.
UNSTABLE = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")


class KeptFunction(NamedTuple):
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


def lower(
    kind: KeptFunction, function: Any, arguments: Sequence, about: Any = None
) -> jax.stages.Lowered:
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
        path = path_of(kind.name, key)
        exported = read(path, key, lambda content: export.deserialize(bytearray(content)))
        if exported is None:
            exported, payload = trace(kind, function, arguments)
            write(path, key, payload)
    if exported is None:
        return function.lower(*arguments)
    call = jitted(kind, exported, arguments)
    lowered = call.lower(*leaves)
    with _lock:
        _ready[identity_of(kind, function, arguments)] = call
    return lowered


def call(kind: KeptFunction, function: Callable, *arguments: Any) -> Any:
    """What a function returns: by the program that `lower` has made for such arguments, if any."""
    ready = _ready.get(identity_of(kind, function, arguments)) if _ready else None
    if ready is None:
        return function(*arguments)
    results = ready(*leaves_of(kind, arguments))
    return jax.tree.unflatten(jax.tree.structure(kind.outputs(*arguments)), results)


class NotKept(Exception):
    """A program cannot be kept, or nothing is."""


def dynamic(kind: KeptFunction, arguments: Sequence) -> list:
    """The arguments that are trees of arrays."""
    return [tree for place, tree in enumerate(arguments) if place not in kind.static]


def leaves_of(kind: KeptFunction, arguments: Sequence) -> list:
    """The arrays of all arguments, one after the other."""
    return jax.tree.leaves(dynamic(kind, arguments))


def donated_leaves(kind: KeptFunction, arguments: Sequence) -> tuple[int, ...]:
    """Places of the arrays whose memory the results may take, among `leaves_of`."""
    found: list[int] = []
    first = 0
    for place, tree in enumerate(arguments):
        if place not in kind.static:
            count = len(jax.tree.leaves(tree))
            found += range(first, first + count) if place in kind.donated else ()
            first += count
    return tuple(found)


def identity_of(kind: KeptFunction, function: Callable, arguments: Sequence) -> tuple:
    """By what a call of this process finds the program that was lowered for such arguments."""
    leaves, structure = jax.tree.flatten(dynamic(kind, arguments))
    static = tuple(arguments[place] for place in kind.static)
    return function, static, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def key_of(kind: KeptFunction, arguments: Sequence, about: Any) -> str:
    """Digest of all that what is traced depends on, as `digest_of`: also the static arguments, and
    the types and places of the others.

    Raises:
      NotKept: as `digest_of`.
    """
    leaves, structure = jax.tree.flatten(dynamic(kind, arguments))
    if about is None:
        about = [arguments[place] for place in kind.static]
    places = [getattr(leaf, "sharding", None) for leaf in leaves]
    kinds = {(d.platform, d.device_kind) for place in places if place for d in place.device_set}
    types = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
    here = jax.default_backend(), jax.process_count(), jax.local_device_count()
    return digest_of(
        kind.name, kind.static, kind.donated, about, structure, types, places, sorted(kinds), here
    )


def digest_of(*parts: Any) -> str:
    """Hexadecimal digest of values by their `repr`, with what everything depends on: the package's
    sources, versions, and JAX's settings.

    Raises:
      NotKept: nothing is kept; a value does not say what it is; or the sources have changed since
        they were loaded.
    """
    own = sources.digest() if folder() is not None else None
    is_debugged = any(getattr(jax.config, f"jax_debug_{what}") for what in DEBUGGING)
    if own is None or is_debugged or not hasattr(os, "geteuid"):
        raise NotKept
    settings = {
        name: value
        for name, value in sorted(jax.config.values.items())
        if not any(word in name for word in OTHER_SETTINGS)
    }
    text = "\n".join(map(repr, (MAGIC, own, versions(), settings, *parts)))
    # What is told by its place in memory, or in part, is not told.
    if " at 0x" in text or "..." in text or "<function" in text:
        raise NotKept
    return hashlib.sha256(text.encode()).hexdigest()


def remembered(name: str, about: Any, make: Callable[[], Any]) -> Any:
    """Something that takes long to find out, and can be written as JSON: from an earlier run, or
    made.

    Args:
      about: all that it depends on besides the package's sources and the versions.
    """
    try:
        key = digest_of(name, about)
        path = path_of(name, key)
    except NotKept:
        return make()
    found = read(path, key, json.loads)
    if found is None:
        found = make()
        write(path, key, json.dumps(found).encode())
    return found


def trace(
    kind: KeptFunction, function: Callable, arguments: Sequence
) -> tuple[export.Exported, bytes]:
    """Traces and lowers a function of the arrays of its arguments; returns it also serialised.

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
        exported = export.export(jitted, disabled_checks=allowed)(*leaves_of(kind, arguments))
        return exported, bytes(exported.serialize())
    except (ValueError, NotImplementedError, ImportError) as error:
        log.debug("%s is not kept: %s", kind.name, error)
        raise NotKept from error


def jitted(kind: KeptFunction, exported: export.Exported, arguments: Sequence) -> Any:
    """What was exported, as a jitted function of arrays."""

    def of_leaves(*leaves):
        return exported.call(*leaves)

    of_leaves.__name__ = kind.name
    return jax.jit(of_leaves, donate_argnums=donated_leaves(kind, arguments))


def path_of(name: str, key: str) -> Path:
    """Where a program is kept.

    Raises:
      NotKept: nothing is.
    """
    where = folder()
    if where is None:
        raise NotKept
    return where / f"{name}-{key}{SUFFIX}"


def read(path: Path, key: str, understand: Callable[[bytes], Any]) -> Any:
    """What an earlier run has kept; None if there is none, or none that can be used."""
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
            found = understand(payload)
            os.utime(path)
            return found
        except Exception as error:  # whatever a reader of binary files may raise
            log.warning("%s cannot be read (%s); it is made again", path, error)
    return None


def write(path: Path, key: str, payload: bytes) -> None:
    """Keeps something; without success nothing is lost but the next run's time."""
    try:
        with atomic_write(path, private=True) as temporary:
            digest = hashlib.sha256(payload).digest()
            temporary.write_bytes(MAGIC + key.encode() + b"\n" + digest + payload)
        trim(path.parent)
    except OSError as error:
        log.debug("%s is not kept: %s", path, error)


def trim(where: Path) -> None:
    """Removes the programs that were used longest ago beyond `MOST`."""

    def used(path: Path) -> float:
        with suppress(OSError):
            return path.stat().st_mtime
        return 0.0

    for path in sorted(where.glob(f"*{SUFFIX}"), key=used, reverse=True)[MOST:]:
        with suppress(OSError):
            path.unlink()
