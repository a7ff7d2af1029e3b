"""One ID-Enhancer for everybody: prepares its inputs, and trains it.

python -m idea_jax.train_enhancer --prepare FOLDER --people PEOPLE ...
python -m idea_jax.train_enhancer --data FOLDER ... --output_dir OUT
python -m idea_jax.train_enhancer --purge FOLDER
"""

import sys
from collections.abc import Callable, Sequence

from idea_jax import cli, launch
from idea_jax.enhancer.settings import EnhancerTrainConfig, PrepareConfig

PROGRAM = "idea-train-enhancer"


def preparing() -> Callable:
    """What prepares a folder."""
    from idea_jax.enhancer import preparing

    return preparing.run


def training() -> Callable:
    """What trains."""
    from idea_jax.enhancer import fit

    return fit.run


def purge(argv: Sequence[str]) -> int:
    """Deletes a prepared folder; returns the exit code."""
    if len(argv) != 2 or argv[0] != "--purge":
        print(f"error: expected --purge FOLDER alone, got {' '.join(argv)}", file=sys.stderr)
        return 2

    def work() -> None:
        from idea_jax.enhancer import shards

        print(f"{shards.purge(argv[1])} files deleted")

    return launch.run(work, needs_jax=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, as `cli.main` says."""
    argv = sys.argv[1:] if argv is None else list(argv)
    given = [flag.partition("=")[0] for flag in argv]
    if "--purge" in given:
        return purge(argv)
    if "--prepare" in given:
        about = "Prepare the inputs of the shared ID-Enhancer's training, once."
        return cli.main(PrepareConfig, preparing, argv, prog=PROGRAM, description=about)
    about = (
        "Train one ID-Enhancer for everybody. --prepare FOLDER --help tells how its inputs are "
        "made, and --purge FOLDER deletes them."
    )
    return cli.main(EnhancerTrainConfig, training, argv, prog=PROGRAM, description=about)


if __name__ == "__main__":
    sys.exit(main())
