"""`python -m idea_jax.mini.forms`: what other programs make of a person.

    python -m idea_jax.mini.forms [--split test|validation] [--people N] [--pictures N] \\
        [--profile paper|paper_alone] [--steps N ...] [--json FILE]

Each person is drawn with K/V deltas on both halves of guidance, as this project and a LoRA do, and
on the prompt's half, with the ID-Adapter and without, and with the tokens alone.
"""

import argparse
import sys
from pathlib import Path

from idea_jax import launch
from idea_jax.config.settings import check_seed
from idea_jax.runtime.files import check_writable, say


def main(argv: list[str] | None = None) -> int:
    """Prints the table, and what each form is ahead of the later ones; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.mini.forms",
        description="Measures what other programs make of a person, on the mini.",
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=1, help="for each prompt (default: 1)")
    parser.add_argument(
        "--profile",
        choices=("paper", "paper_alone"),
        default="paper",
        help="paper_alone learns without the shared ID-Enhancer (default: paper)",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 25], help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    args = parser.parse_args(argv)
    for name, values, least in (
        ("people", [args.people], 2),
        ("pictures", [args.pictures], 1),
        ("steps", args.steps, 0),
    ):
        if min(values) < least:
            parser.error(f"--{name}: expected {least} or more, got {min(values)}")
    return launch.run(lambda: measure(args))


def measure(args: argparse.Namespace) -> None:
    """Runs the experiment and prints its tables.

    Raises:
      InputError, OSError: the mini, a setting or the file cannot be used.
    """
    from tqdm import tqdm

    from idea_jax.mini import halves, measures, trials
    from idea_jax.runtime import devices

    check_seed(args.seed)
    if args.json:
        check_writable(args.json.parent)
    devices.check_backend()
    protocol = trials.Protocol(args.split, args.people, pictures=args.pictures, seed=args.seed)
    configs = {n: trials.read_config(args.profile, {"max_train_steps": n}) for n in args.steps}
    mini = measures.load()
    scores = halves.experiment(mini, configs, protocol, lambda met: tqdm(met, unit="person"))
    say(trials.markdown(scores))
    for number in configs:
        names = ("another person", "true drawings", *(f"{number} steps, {n}" for n in halves.FORMS))
        apart = trials.differences({name: scores[name] for name in names})
        say(f"\nDifferences of the same people, {number} steps:\n\n{apart}")
    if args.json:
        trials.write_scores(args.json, scores)


if __name__ == "__main__":
    sys.exit(main())
