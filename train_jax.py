"""Learns people from photos: see `python train_jax.py --help` and README.md."""

import sys


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        from idea_jax import cli
        from idea_jax.config.settings import TrainConfig
        from idea_jax.training import run as train
    except ValueError as error:  # of JAX, which reads its settings when it is imported
        print(
            f"error: JAX cannot be loaded ({error}); correct or unset what begins with JAX_ in "
            "the environment",
            file=sys.stderr,
        )
        return 1

    return cli.main(
        TrainConfig,
        train.run,
        argv,
        description="Learn people from photos; writes OUT/identity.safetensors, or one of each "
        "person in OUT/PERSON.",
    )


if __name__ == "__main__":
    sys.exit(main())
