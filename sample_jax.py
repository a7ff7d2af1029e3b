"""Draws learned people: see `python sample_jax.py --help` and README.md."""

import sys


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        from idea_jax import cli
        from idea_jax.config.settings import SampleConfig
        from idea_jax.sampling import run as sample
    except ValueError as error:  # of JAX, which reads its settings when it is imported
        print(
            f"error: JAX cannot be loaded ({error}); correct or unset what begins with JAX_ in "
            "the environment",
            file=sys.stderr,
        )
        return 1

    return cli.main(
        SampleConfig,
        sample.run,
        argv,
        description="Draw learned people; writes one folder of pictures per prompt.",
    )


if __name__ == "__main__":
    sys.exit(main())
