"""What every command runs in: a mistake of the user or the machine is one message, no traceback.

It imports nothing that is slow, so that a command can read its arguments first: `--help` and a
mistake in them cost no second of JAX.
"""

import atexit
import gc
import logging
import sys
from collections.abc import Callable

from idea_jax.errors import InputError
from idea_jax.runtime import signals, sources  # noqa: F401 so that it knows when this began

# Libraries speak up only when something is wrong; a run's own messages are the program's.
QUIET = ("jax", "httpx", "httpx2", "httpcore", "huggingface_hub", "transformers")
# Orbax logs a traceback for each error that it raises as well.
SILENT = ("absl", "orbax")

# What to try where the memory is too small, if a program has no better advice.
SMALLER = "a smaller batch, --mixed_precision bf16, or --shard_frozen on several devices"


class EnvironmentRefused(InputError, ValueError):
    """JAX cannot be loaded with the settings that it finds in the environment."""


def load_jax() -> None:
    """Imports JAX, which reads its settings then, and sets what changes numbers as this package has
    it.

    Raises:
      EnvironmentRefused: a variable whose name begins with JAX_ has a value that JAX refuses.
    """
    try:
        import jax  # noqa: F401
    except ValueError as error:
        raise EnvironmentRefused(
            f"JAX cannot be loaded ({error}); correct or unset what begins with JAX_ in the "
            "environment"
        ) from error
    from idea_jax.runtime import devices

    devices.pin_settings()


def speak() -> None:
    """Has the program's own messages shown on the standard error, and few of the libraries'."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in SILENT:
        logging.getLogger(name).setLevel(logging.CRITICAL)


def run(
    work: Callable[[], int | None],
    *,
    needs_jax: bool = True,
    also: tuple[type[Exception], ...] = (),
    smaller: str = SMALLER,
    interrupted: str = "interrupted",
) -> int:
    """Runs the work of a command, whose arguments have been read; returns its exit code.

    0, or what the work returns: done; 1: the input, the disk, the environment or the memory; 130 or
    143: stopped by SIGINT or SIGTERM.

    Args:
      work: imports what is slow when it is called, for JAX may not be importable before.
      needs_jax: JAX is loaded first.
      also: errors besides `InputError` and `OSError` whose message is all that a user needs.
      smaller: what to try where the memory is too small.
      interrupted: what is said after Ctrl-C.
    """
    speak()
    atexit.unregister(gc.freeze)  # once is enough
    atexit.register(
        gc.freeze
    )  # Python's last look for unreachable objects would take half a second
    try:
        if needs_jax:
            load_jax()
        return work() or 0
    except signals.Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, (InputError, OSError, also)):
            print(f"error: {describe(error)}", file=sys.stderr)
            return 1
        reason = about_memory(error)
        if reason is None:
            raise
        print(f"error: {reason}. Try {smaller}", file=sys.stderr)
        return 1


def describe(error: Exception) -> str:
    """An error's message; for one of the operating system the file and what was wrong with it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def about_memory(error: Exception) -> str | None:
    """What was too large for the memory, and how much there is; None if that is not the error."""
    if "jax" not in sys.modules:
        return None
    from idea_jax.runtime import compile_cache, memory

    if not memory.is_out_of_memory(error):
        return None
    needed = compile_cache.needs[-1] if compile_cache.needs else None
    return memory.describe_memory(error, needed)
