"""Makes the mini: a whole Stable Diffusion of the drawn world, trained from nothing.

    python -m idea_jax.mini.pretrain FOLDER [--budget full|tiny] [--seed N] [--work FOLDER]
                                            [--stages NAME ...] [--jobs N]

FOLDER is a checkpoint in diffusers layout after every stage. Stages that its `pretraining.json`
lists are done; a stage that was interrupted goes on where it last saved its state, under --work.
"""

import argparse
import signal
import sys
from pathlib import Path

from idea_jax import launch
from idea_jax.config.settings import check_seed
from idea_jax.mini.pretrain.budget import BUDGETS, STAGE_NAMES
from idea_jax.runtime.signals import Interrupted


def main(argv: list[str] | None = None) -> int:
    """Trains the mini; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.mini.pretrain",
        description="Trains a miniature Stable Diffusion of the drawn world from nothing.",
    )
    parser.add_argument("folder", type=Path, help="checkpoint to write, or to go on with")
    parser.add_argument("--budget", choices=BUDGETS, default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="drawings and states (default: FOLDER-work)")
    parser.add_argument("--stages", nargs="+", choices=STAGE_NAMES, default=(), help="default: all")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="run up to N stages at a time that do not need each other, each in a process of its "
        "own (default: 1). Pays on a GPU whose host has several cores for each: one stage alone "
        "leaves it idle most of the time. On a CPU one stage uses all cores",
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    again = "interrupted; the same command goes on from here"
    return launch.run(lambda: train(args), also=(FloatingPointError,), interrupted=again)


def train(args: argparse.Namespace) -> int:
    """Runs the stages; returns the exit code.

    Raises:
      InputError, FloatingPointError, OSError: a stage cannot be run, or failed.
    """
    from idea_jax.mini.pretrain.order import pretrain, pretrain_at_once
    from idea_jax.mini.pretrain.run import Run
    from idea_jax.runtime import devices

    folder = args.folder.resolve()  # `.` has no name
    work = args.work or folder.with_name(folder.name + "-work")
    run = Run(args.folder, work, BUDGETS[args.budget], args.seed)
    check_seed(args.seed)
    try:
        if args.jobs == 1:
            devices.check_backend()
            pretrain(run, args.stages)
            return 0
        # Otherwise its stages would go on without it.
        for signum in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
        command = [sys.executable, "-m", "idea_jax.mini.pretrain", str(args.folder)]
        command += ["--work", str(work), "--budget", args.budget, "--seed", str(args.seed)]
        pretrain_at_once(run, args.stages, args.jobs, command)
    except Interrupted as stop:
        raise KeyboardInterrupt from stop
    return 0


if __name__ == "__main__":
    sys.exit(main())
