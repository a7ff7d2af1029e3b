"""Many pictures from a job file: `idea-batch JOBS.jsonl --out DIR`."""

import sys
from collections.abc import Callable, Sequence

from idea_jax import cli
from idea_jax.sampling.settings import BatchConfig


def drawing() -> Callable:
    """What draws."""
    from idea_jax.sampling import batch

    return batch.run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    A first argument that is no flag is the job file.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given and not given[0].startswith("-"):
        given.insert(0, "--jobs")
    return cli.main(
        BatchConfig,
        drawing,
        given,
        prog="idea-batch",
        usage="%(prog)s [JOBS] [--FLAG VALUE ...]    (--help tells all flags)",
        description="Draw many pictures: a row of JOBS (.jsonl or .csv, the first argument) each.",
    )


if __name__ == "__main__":
    sys.exit(main())
