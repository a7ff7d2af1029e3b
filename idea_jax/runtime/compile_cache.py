"""Compiled programs: kept for the next run, or made while this one still reads its weights."""

import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

# What the programs that were compiled ahead need on each device, in bytes, the newest last: for the
# message of a run whose memory is too small.
needs: list[int] = []

MAX_BYTES = 4 * 2**30  # the programs used longest ago are removed beyond this
LOCK_SECONDS = 5  # to wait for who writes to the folder
PROGRAM = re.compile(r"(.+-[0-9a-f]{64})-cache")  # file of a program: a name and JAX's key
KEEPS_TRACES = True  # see `runtime.traces`; tests, which replace what is traced, keep none
MIN_SECONDS = 0.1  # programs that compile faster are not worth a file


def use(folder: str | None) -> None:
    """Keeps the programs that this process compiles, and takes those that are kept already.

    XLA's key of a program covers its operations, shapes, options, version and device, so that a
    wrong one is never taken. Call it before the first program is compiled.

    Args:
      folder: where; "off" for nowhere; None for the user's cache folder, unless JAX has been given
        a folder already (`JAX_COMPILATION_CACHE_DIR`), whose size is left to whoever gave it. From
        which compile time on a program is kept is `MIN_SECONDS`, unless JAX has been told
        (`JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`).

    Raises:
      OSError: the folder that was named cannot be written. Without the one that was not named the
        run goes on, and says so.
    """
    # A run that keeps nothing leaves that to itself, not to the next one of the process.
    if "JAX_ENABLE_COMPILATION_CACHE" not in os.environ or folder == "off":
        jax.config.update("jax_enable_compilation_cache", folder != "off")
    if folder == "off":
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    if folder is None and jax.config.jax_compilation_cache_dir:
        return
    try:
        path = Path(folder).expanduser() if folder is not None else user_folder()
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "cannot be written", str(path))
    except OSError as error:
        if folder is not None:
            raise
        log.warning("compiled programs are not kept: %s (%s)", path, error.strerror)
        return
    except RuntimeError as error:  # a user without a home, as in some containers
        if folder is not None:
            raise FileNotFoundError(2, "no such home folder", folder) from error
        log.warning("compiled programs are not kept: %s; --compile_cache names a folder", error)
        return
    remove_unfinished(path)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)


def folder() -> Path | None:
    """Where this process keeps programs; None if nowhere, or nowhere on a disk."""
    where = jax.config.jax_compilation_cache_dir
    if not (KEEPS_TRACES and where and jax.config.jax_enable_compilation_cache):
        return None
    return None if "://" in where else Path(where)


def remove_unfinished(folder: Path) -> None:
    """Deletes the programs that a process had not finished writing when it was killed or the disk
    was full: those without a time of use, which JAX writes last, and those of no bytes.

    JAX never does: it would find each of them broken in every run, compile it, and not write it
    again, as there is a file of that name; one without a time of use would even keep it from
    writing any other. A program that breaks after it was written is not looked for. Nothing is
    deleted where JAX's lock is not: it has kept programs there without a limit of size, or none.
    """
    removed, lock = 0, folder / ".lockfile"
    if not lock.exists():
        return
    try:
        # JAX's own lock: whoever is writing now has not written the time of use either.
        with FileLock(lock, timeout=LOCK_SECONDS):
            for path in folder.iterdir():
                found = PROGRAM.fullmatch(path.name)
                if found and not path.is_symlink() and path.is_file():
                    used = path.with_name(f"{found[1]}-atime")
                    if not used.is_file() or not path.stat().st_size:
                        path.unlink()
                        used.unlink(missing_ok=True)
                        removed += 1
    except (OSError, Timeout, NotImplementedError) as error:
        log.debug("not all unfinished programs were looked for: %s", error)
    if removed:
        log.info("%d compiled programs had not been written to their end; removed", removed)


@contextmanager
def ahead(lower: Callable[[], jax.stages.Lowered]) -> Iterator[None]:
    """Compiles a program in a thread of its own while the block runs, whose end waits for it.

    JAX keeps the program for calls with arguments of the same shapes, types and shardings, as long
    as no context manager of JAX is active around them, which are a thread's own. The block should
    compute nothing on the devices: some compilers choose kernels by how fast they run.

    What goes wrong here only makes the call compile, which meets it again or does not. An error in
    the block is raised at once; what the thread is doing then, tracing or compiling, delays no more
    than the end of the process.

    Args:
      lower: traces and lowers the program.
    """
    is_unwanted, is_done = threading.Event(), threading.Event()

    def compile_it():
        try:
            lowered = lower()
            if not is_unwanted.is_set():
                needs.append(bytes_needed(lowered.compile()))
        except Exception:
            log.debug("not compiled ahead", exc_info=True)
        finally:
            is_done.set()

    threading.Thread(target=compile_it).start()
    try:
        yield
        # Not Thread.join: a signal in it makes Python forget the thread, and crash at its end.
        is_done.wait()
    except BaseException:
        is_unwanted.set()
        raise


def bytes_needed(program: jax.stages.Compiled) -> int:
    """Memory of a compiled program on each device: what goes in, what comes out, all between."""
    stats = program.memory_analysis()
    shared = stats.alias_size_in_bytes  # of arguments that become results
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - shared
    return held + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def user_folder() -> Path:
    """The folder for compiled programs where the platform keeps its users' caches."""
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        base = Path(os.environ["LOCALAPPDATA"])
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "idea_jax" / "compiled"
