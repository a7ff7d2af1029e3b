"""People of the drawn world as folders of pictures, as an evaluation takes them.

python -m idea_jax.mini.album FOLDER [--people N] [--photos N] [--split test|validation]
"""

import argparse
import sys
from pathlib import Path

from idea_jax import launch
from idea_jax.config.settings import check_seed
from idea_jax.runtime.files import check_writable, say


def main(argv: list[str] | None = None) -> int:
    """Writes people to a folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.mini.album",
        description="Writes people of the drawn world as folders of pictures.",
    )
    parser.add_argument("folder", type=Path, help="to write to")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--photos", type=int, default=1, help="to learn from (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("people", "photos"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(args, name)}")

    def work() -> None:
        check_seed(args.seed)
        check_writable(args.folder)
        from idea_jax.mini import strangers
        from idea_jax.runtime import devices

        devices.check_backend()
        for path in strangers.write(args.folder, args.split, args.people, args.photos, args.seed):
            say(str(path))

    return launch.run(work)


if __name__ == "__main__":
    sys.exit(main())
