"""What the commands share: settings in, exit code out."""

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from idea_jax.config import reading
from idea_jax.config.settings import ConfigError, SampleConfig, TrainConfig
from idea_jax.errors import InputError
from idea_jax.models import hub
from idea_jax.runtime import compile_cache, devices, files, signals

# What to try where the memory is too small.
SMALLER: dict[type | None, str] = {
    TrainConfig: "fewer --identities_per_step, a smaller --train_batch_size, "
    "--mixed_precision bf16, --shard_frozen with --mesh data=N, or a smaller --resolution",
    None: "a smaller batch, --mixed_precision bf16, or --shard_frozen on several devices",
    SampleConfig: "a smaller --batch_size, --mixed_precision bf16, or a smaller --height "
    "and --width",
}

# New objects between two looks of Python's garbage collector, and generations: tracing makes
# millions that live on, which it looks through hundreds of times by default.
COLLECT_AFTER = (50_000, 20, 100)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Has Python look for unreachable objects rarely: see `COLLECT_AFTER`."""
    before = gc.get_threshold()
    gc.set_threshold(*COLLECT_AFTER)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@rare_collections()
def main(cls: type, run: Callable, argv: Sequence[str] | None, **about: str) -> int:
    """Parses the arguments, runs, prints the paths that `run` returns, and returns the exit code.

    0: done; 1: the input or the disk; 2: the arguments; 130 or 143: stopped by SIGINT or SIGTERM.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    # Libraries speak up only when something is wrong; the run's own messages are the program's.
    for name in ("jax", "httpx", "httpx2", "httpcore", "huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Orbax logs a traceback for each error that it raises as well.
    for name in ("absl", "orbax"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        settings = reading.parse(cls, sys.argv[1:] if argv is None else argv, **about)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        devices.pin_settings()
        compile_cache.use(settings.compile_cache)
        compile_cache.needs.clear()  # of another run in this process
        devices.use_cores(hub.local_folder(settings.pretrained_model_name_or_path))
        if not getattr(settings, "distributed", False):  # those find each other first
            devices.check_backend()
        for path in run(settings):
            files.say(str(path))
    except (InputError, OSError) as error:
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    except signals.Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not devices.is_out_of_memory(error):
            raise
        needed = compile_cache.needs[-1] if compile_cache.needs else None
        reason = devices.describe_memory(error, needed)
        print(f"error: {reason}. Try {SMALLER.get(cls, SMALLER[None])}", file=sys.stderr)
        return 1
    return 0


def describe(error: Exception) -> str:
    """An error's message; for one of the operating system the file and what was wrong with it."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
