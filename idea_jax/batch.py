"""Many pictures from a job file: `idea-batch JOBS.jsonl --out DIR`."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from idea_jax import cli
from idea_jax.config.reading import flags_of, plain_type
from idea_jax.config.settings import settings_of
from idea_jax.sampling.settings import JOB_FILES, BatchConfig


def drawing() -> Callable:
    """What draws."""
    from idea_jax.sampling import batch

    return batch.run


def with_named_jobs(words: Sequence[str]) -> list[str]:
    """Arguments in which `--jobs` stands before a job file that stands by itself, wherever that is.

    A flag takes the word that follows; one for several words takes all that follow, up to the next
    flag or what is called like a job file.
    """
    takes = {"--config": False}
    for spec in settings_of(BatchConfig):
        kind, is_list = plain_type(spec.type)
        if kind is not bool:
            takes |= dict.fromkeys(flags_of(spec.name), is_list)
    found: list[str] = []
    wants_one = takes_more = False
    for word in words:
        if word.startswith("--") or word == "-h":
            flag, _, value = word.partition("=")
            wants_one, takes_more = flag in takes and not value, takes.get(flag, False)
        elif wants_one:
            wants_one = False
        elif not takes_more or Path(word).suffix.lower() in JOB_FILES:
            found.append("--jobs")
        found.append(word)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = with_named_jobs(sys.argv[1:] if argv is None else argv)
    pairs = zip(["", *words], words, strict=False)
    files = [word for before, word in pairs if before == "--jobs" or word.startswith("--jobs=")]
    if len(files) > 1:
        named = " and ".join(file.removeprefix("--jobs=") for file in files)
        print(f"error: expected one job file, got {named}", file=sys.stderr)
        return 2
    return cli.main(
        BatchConfig,
        drawing,
        words,
        prog="idea-batch",
        usage="%(prog)s [JOBS] [--FLAG VALUE ...]    (--help tells all flags)",
        description="Draw many pictures: a row of the file JOBS (.jsonl or .csv) each.",
    )


if __name__ == "__main__":
    sys.exit(main())
