"""`python -m idea_jax.mini.quality`: how good a mini is, by drawings and people it has not seen.

python -m idea_jax.mini.quality [--checkpoint mini|FOLDER] [--people N] [--seed N]
"""

import argparse
import json
import sys
from pathlib import Path

from idea_jax import launch
from idea_jax.config.settings import check_seed
from idea_jax.runtime.files import atomic_write, check_writable, say


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns 1 if a line misses what it must reach."""
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.mini.quality", description="Measures how good a mini is."
    )
    parser.add_argument("--checkpoint", default="mini", help="default: the shipped one")
    parser.add_argument(
        "--people",
        type=int,
        default=400,
        help="named people to draw (default: 400; with 96, seeds differed by 7 of 100 found)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    return launch.run(lambda: measure(args, parser))


def measure(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Prints the table; returns the exit code.

    Raises:
      InputError, OSError: the mini or the file cannot be used.
    """
    from idea_jax.mini import captions, measures, people
    from idea_jax.runtime import devices

    if not len(captions.PROMPTS) <= args.people <= people.NAMES:
        parser.error(
            f"--people: expected {len(captions.PROMPTS)} (one for each prompt) to {people.NAMES}, "
            f"got {args.people}"
        )
    check_seed(args.seed)
    if args.json:
        check_writable(args.json.parent)
    devices.check_backend()
    rows = measures.table(measures.load(args.checkpoint), args.seed, args.people)
    say(measures.markdown(rows))
    if args.json:
        with atomic_write(args.json) as path:
            path.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    missed = [row.name for row in rows if row.missed()]
    if missed:
        print(f"below what it must reach: {', '.join(missed)}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
