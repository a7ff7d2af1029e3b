"""`idea-serve`: people and pictures over HTTP."""

import sys
from collections.abc import Callable, Sequence

from idea_jax import cli
from idea_jax.serve.settings import ServeConfig


def serving() -> Callable:
    """What serves."""
    from idea_jax.serve import run

    return run.run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return cli.main(
        ServeConfig,
        serving,
        argv,
        prog="idea-serve",
        description="Learn and draw people over HTTP, and keep them in a folder.",
    )


if __name__ == "__main__":
    sys.exit(main())
