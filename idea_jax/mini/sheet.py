"""`python -m idea_jax.mini.sheet SHEET.png [--seed N]`: draws some of the drawn world."""

import argparse
import sys

from idea_jax import launch


def main(argv: list[str] | None = None) -> int:
    """Draws a contact sheet to the file that is named; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.mini.sheet", description="Draw a contact sheet of the drawn world."
    )
    parser.add_argument("sheet", help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the people and scenes (default: 0)")
    args = parser.parse_args(argv)

    def work() -> None:
        from idea_jax.data.images import save_png
        from idea_jax.mini import world
        from idea_jax.runtime import devices

        devices.check_backend()
        save_png(args.sheet, world.contact_sheet(args.seed), {})

    return launch.run(work)


if __name__ == "__main__":
    sys.exit(main())
