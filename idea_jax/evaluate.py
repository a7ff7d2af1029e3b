"""`idea-evaluate`: does it keep the face, and does it follow the prompt?

python -m idea_jax.evaluate --images DIR --photos DIR --score_model FILE
python -m idea_jax.evaluate --identity FILE --photos DIR --pretrained_model_name_or_path MODEL ...
python -m idea_jax.evaluate --compare paper,cross_init --photos DIR ...
"""

import sys
from collections.abc import Sequence

from idea_jax import cli
from idea_jax.evaluation.settings import EvaluateConfig

PROGRAM = "idea-evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, as `cli.main` says."""
    about = "Score pictures of people: likeness, prompts, intervals over people, one report."

    def load():
        from idea_jax.evaluation import run

        return run.run

    return cli.main(EvaluateConfig, load, argv, prog=PROGRAM, description=about)


if __name__ == "__main__":
    sys.exit(main())
