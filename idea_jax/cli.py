"""What the commands with settings share: settings in, exit code out."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from idea_jax import launch
from idea_jax.config import reading
from idea_jax.config.settings import ConfigError, SampleConfig, TrainConfig

# What to try where the memory is too small; settings of other packages say it themselves.
SMALLER: dict[type, str] = {
    TrainConfig: "fewer --identities_per_step, a smaller --train_batch_size, "
    "--mixed_precision bf16, --shard_frozen with --mesh data=N, or a smaller --resolution",
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
def main(cls: type, load: Callable, argv: Sequence[str] | None, **about: str) -> int:
    """Parses the arguments, runs, prints the paths that the run returns, and returns the exit code.

    0: done; 1: the input or the disk; 2: the arguments; 130 or 143: stopped by SIGINT or SIGTERM.

    Args:
      load: imports and returns the function that runs, which takes the settings.
    """
    launch.speak()  # what is ignored among the arguments is said, too
    try:
        settings = reading.parse(cls, sys.argv[1:] if argv is None else argv, **about)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def work() -> None:
        from idea_jax.models import hub
        from idea_jax.runtime import compile_cache, devices, files

        compile_cache.use(settings.compile_cache)
        compile_cache.needs.clear()  # of another run in this process
        if settings.pretrained_model_name_or_path is not None:
            devices.use_cores(hub.local_folder(settings.pretrained_model_name_or_path))
        if not getattr(settings, "distributed", False):  # those find each other first
            devices.check_backend()
        for path in load()(settings):
            files.say(str(path))

    smaller = getattr(cls, "SMALLER", None) or SMALLER.get(cls, launch.SMALLER)
    return launch.run(work, smaller=smaller)
