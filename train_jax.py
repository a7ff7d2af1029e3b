"""Learns people from photos: see `python train_jax.py --help` and README.md."""

import sys


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    from idea_jax import cli
    from idea_jax.config.settings import TrainConfig

    def load():
        from idea_jax.training import run

        return run.run

    return cli.main(
        TrainConfig,
        load,
        argv,
        description="Learn people from photos; writes OUT/identity.safetensors, or one of each "
        "person in OUT/PERSON.",
    )


if __name__ == "__main__":
    sys.exit(main())
