"""`idea-doctor`: what of this machine a run would stumble over, before it does.

python -m idea_jax.doctor [--checkpoint MODEL] [--people_in_a_step] [--json]

One line a finding: `ok`, `note` for what a run can do without, `wrong` for what it would end at.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from idea_jax import launch
from idea_jax.config.settings import COMPUTE_DTYPES
from idea_jax.runtime.files import say


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings; returns 1 if something is wrong, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.doctor",
        description="Says what of this machine a run would stumble over. Sends nothing anywhere.",
    )
    parser.add_argument(
        "--checkpoint", help="Stable Diffusion to look at: a folder, a Hub id, mini"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub checkpoint")
    parser.add_argument("--variant", help="file variant of the weights, such as fp16")
    parser.add_argument(
        "--people_in_a_step",
        action="store_true",
        help="compile the training step, and say how many people fit into one (minutes)",
    )
    parser.add_argument("--profile", default="paper", help="of that step (default: paper)")
    parser.add_argument("--mixed_precision", choices=tuple(COMPUTE_DTYPES), default="no")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    if args.people_in_a_step and args.checkpoint is None:
        parser.error("--people_in_a_step needs --checkpoint")
    step = None
    if args.people_in_a_step:
        step = {"profile": args.profile, "mixed_precision": args.mixed_precision}

    def work() -> int:
        from idea_jax import findings

        is_wrong = False
        for found in findings.examine(args.checkpoint, args.revision, args.variant, step):
            is_wrong = is_wrong or found.level == findings.WRONG
            line = f"{found.level:5} {found.what}: {found.text}"
            say(json.dumps(found._asdict()) if args.json else line)
        return int(is_wrong)

    return launch.run(work)


if __name__ == "__main__":
    sys.exit(main())
