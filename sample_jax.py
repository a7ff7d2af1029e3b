"""Draws learned people: see `python sample_jax.py --help` and README.md."""

import sys


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    from idea_jax import cli
    from idea_jax.config.settings import SampleConfig

    def load():
        from idea_jax.sampling import run

        return run.run

    return cli.main(
        SampleConfig,
        load,
        argv,
        description="Draw learned people; writes one folder of pictures per prompt.",
    )


if __name__ == "__main__":
    sys.exit(main())
