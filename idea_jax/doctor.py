"""`idea-doctor`: what of this machine a run would stumble over, before it does.

idea-doctor [--checkpoint MODEL] [--people_in_a_step] [--json]

One line a finding: `ok`, `note` for what a run can do without, `wrong` for what it would end at.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields

from idea_jax import launch
from idea_jax.config.reading import OneOfItsNames, flags_of
from idea_jax.config.settings import COMPUTE_DTYPES, TrainConfig
from idea_jax.runtime.files import say

# Settings of a training that say how a checkpoint is read.
OF_CHECKPOINT = ("revision", "variant", "tokenizer_name", "prediction_type", "original_config")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings; returns 1 if something is wrong, else 0."""
    parser = argparse.ArgumentParser(
        prog="idea-doctor",
        description="Says what of this machine a run would stumble over. Sends nothing anywhere.",
    )
    parser.add_argument(
        *flags_of("checkpoint"),
        dest="checkpoint",
        action=OneOfItsNames,
        metavar="MODEL",
        help="Stable Diffusion to look at: a folder, a .safetensors file, a Hub id, mini",
    )
    of_training = {spec.name: spec for spec in fields(TrainConfig)}
    for name in OF_CHECKPOINT:
        about = of_training[name].metadata
        parser.add_argument(f"--{name}", choices=about.get("choices"), help=about["help"])
    parser.add_argument(
        "--people_in_a_step",
        action="store_true",
        help="compile the training step, and say how many people fit into one (minutes)",
    )
    profiles = of_training["profile"].metadata["choices"]
    parser.add_argument(
        "--profile", choices=profiles, default="paper", help="of that step (default: paper)"
    )
    parser.add_argument(
        "--mixed_precision",
        choices=tuple(COMPUTE_DTYPES),
        default="no",
        help="of that step (default: no)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    given = [name for name in OF_CHECKPOINT if getattr(args, name) is not None]
    needing = [*given, *(["people_in_a_step"] if args.people_in_a_step else [])]
    if needing and args.checkpoint is None:
        parser.error(f"--{needing[0]} needs --checkpoint")
    of_model = None
    if args.checkpoint is not None:
        of_model = {"pretrained_model_name_or_path": args.checkpoint}
        of_model |= {name: getattr(args, name) for name in given}
    step = None
    if args.people_in_a_step:
        step = {"profile": args.profile, "mixed_precision": args.mixed_precision}

    def work() -> int:
        from idea_jax import findings

        is_wrong = False
        for found in findings.examine(of_model, step):
            is_wrong = is_wrong or found.level == findings.WRONG
            line = f"{found.level:5} {found.what}: {found.text}"
            say(json.dumps(found._asdict()) if args.json else line)
        return int(is_wrong)

    return launch.run(work)


if __name__ == "__main__":
    sys.exit(main())
