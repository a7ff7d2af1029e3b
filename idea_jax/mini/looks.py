"""`python -m idea_jax.mini.looks`: what the second look at small and turned faces is worth.

python -m idea_jax.mini.looks [--checkpoint mini|FOLDER] [--people N] [--split validation|test]
    [--turn 0|90|180|270]
"""

import argparse
import sys
from pathlib import Path

from idea_jax import launch
from idea_jax.config.settings import check_seed
from idea_jax.runtime.files import say


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.mini.looks",
        description="Measures what the second look at small and turned faces is worth.",
    )
    parser.add_argument("--checkpoint", default="mini", help="default: the shipped one")
    parser.add_argument(
        "--people", type=int, default=24, help="one picture of each at every angle and size"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument(
        "--turn",
        type=int,
        choices=(0, 90, 180, 270),
        default=0,
        help="degrees by which whole pictures are turned, as photos without EXIF are",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.people < 1:
        parser.error(f"--people: expected at least 1, got {args.people}")
    return launch.run(lambda: measure(args))


def measure(args: argparse.Namespace) -> None:
    """Prints the table.

    Raises:
      InputError, OSError: the mini cannot be used.
    """
    from idea_jax.faces import finding
    from idea_jax.mini import second_look
    from idea_jax.models import hub
    from idea_jax.runtime import devices

    check_seed(args.seed)
    devices.check_backend()
    folder = hub.resolve(args.checkpoint).folder
    finder = finding.open_finder(Path(folder) / "face" / "recogniser.onnx")
    seen = second_look.look(finder, args.split, args.people, args.seed, args.turn)
    say(second_look.markdown(second_look.table(seen)))


if __name__ == "__main__":
    sys.exit(main())
