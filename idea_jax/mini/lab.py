"""`python -m idea_jax.mini.lab`: people whom no network has seen, learned with every profile.

    python -m idea_jax.mini.lab [--split test|validation] [--people N] [--profiles P ...] \\
        [--set KEY=VALUE ...] [--sweep KEY=VALUE,VALUE ...] [--json FILE]

For each profile the config is configs/mini_PROFILE.yaml; `paper_alone` is `paper` without a shared
ID-Enhancer. Similarities are those of the scoring recogniser, which training never sees; what a
prompt asks for is read by the judge.
"""

import argparse
import sys
from pathlib import Path

from idea_jax import launch
from idea_jax.config.settings import check_seed
from idea_jax.runtime.files import check_writable, say

PROFILES = ("paper", "paper_alone", "official", "cross_init", "textual_inversion")


def main(argv: list[str] | None = None) -> int:
    """Prints the table of an experiment; returns the exit code."""
    args = parse(argv)
    return launch.run(lambda: measure(args))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; `overrides` and `sweep` are filled in from --set and --sweep."""
    import yaml

    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.mini.lab", description="Measures personalisation on the mini."
    )
    parser.add_argument("--checkpoint", default="mini", help="default: the shipped one")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=2, help="for each prompt (default: 2)")
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=PROFILES)
    parser.add_argument("--photos", type=int, default=1, help="of each person (default: 1)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the configs")
    parser.add_argument(
        "--sweep", metavar="KEY=VALUE,VALUE", help="a row of the table for each value of a setting"
    )
    parser.add_argument(
        "--id_strength", type=float, default=1.0, help="0 draws with the tokens alone"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    args = parser.parse_args(argv)
    given = [*args.set, args.sweep] if args.sweep else args.set
    if bad := [s for s in given if "=" not in s]:
        parser.error(f"--set and --sweep: expected KEY=VALUE, got {bad[0]!r}")
    args.overrides = yaml.safe_load("\n".join(s.replace("=", ": ", 1) for s in args.set)) or {}
    if args.sweep:
        key, values = args.sweep.split("=", 1)
        args.sweep = key, [yaml.safe_load(value) for value in values.split(",")]
    for name, least in (("pictures", 1), ("photos", 1), ("id_strength", 0)):
        if not getattr(args, name) >= least:
            parser.error(f"--{name}: expected {least} or more, got {getattr(args, name)}")
    if args.people < 2:
        parser.error(
            f"--people: expected 2 or more, as each is compared with another, got {args.people}"
        )
    return args


def measure(args: argparse.Namespace) -> None:
    """Runs the experiment and prints its table.

    Raises:
      InputError, OSError: the mini, a setting or the file cannot be used.
    """
    from tqdm import tqdm

    from idea_jax.mini import measures, trials
    from idea_jax.runtime import devices

    protocol = trials.Protocol(
        args.split, args.people, args.photos, args.pictures, args.id_strength, args.seed
    )
    check_seed(args.seed)
    if args.json:
        check_writable(args.json.parent)
    devices.check_backend()
    mini = measures.load(args.checkpoint)
    configs = trials.swept(args.profiles, args.overrides, args.sweep)
    scores = trials.experiment(mini, configs, protocol, lambda met: tqdm(met, unit="person"))
    say(trials.markdown(scores))
    if apart := trials.differences(scores):
        say(f"\nDifferences of the same people:\n\n{apart}")
    if args.json:
        trials.write_scores(args.json, scores)


if __name__ == "__main__":
    sys.exit(main())
