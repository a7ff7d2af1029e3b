"""Many pictures from a job file: `idea-batch JOBS.jsonl --out DIR`."""

import sys
from collections.abc import Sequence

from idea_jax import cli
from idea_jax.sampling import batch
from idea_jax.sampling.settings import BatchConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    A first argument that is no flag is the job file.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if given and not given[0].startswith("-"):
        given.insert(0, "--jobs")
    return cli.main(
        BatchConfig,
        batch.run,
        given,
        prog="idea-batch",
        description="Draw many pictures: a row of JOBS (.jsonl or .csv, the first argument) each.",
    )


if __name__ == "__main__":
    sys.exit(main())
