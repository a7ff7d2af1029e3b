"""What faster settings of the sampler cost in quality, on the mini's drawn world.

    python -m benchmarks.quality [--people N] [--each N] [--json FILE]

People of the validation split, whom no network has seen, are drawn straight from one photo in the
prompts of `captions.PROMPTS` with each setting, from the same noise. Likeness is the cosine with
other drawings of the person, by the recogniser that nothing was trained with; what the prompt asked
for is read by the judge. In brackets: what it is more than with the first setting on the same
people, with 95% bootstrap intervals. Prints a Markdown table; CPU seconds are of this machine, the
ratios are what counts.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.options import positive
from idea_jax import launch


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--people", type=positive, default=12, help="2 or more (default: %(default)s)"
    )
    parser.add_argument(
        "--each", type=positive, default=1, help="pictures of each prompt (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    args = parser.parse_args(argv)

    def work() -> None:
        from benchmarks import speed_and_quality
        from idea_jax.mini import people

        if not 2 <= args.people <= people.NAMES:
            # The first drawing of a setting compiles, and does not count.
            parser.error(f"--people must lie between 2 and {people.NAMES}, got {args.people}")
        speed_and_quality.table(args)

    return launch.run(work)


if __name__ == "__main__":
    sys.exit(main())
