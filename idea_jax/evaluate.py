"""`idea-evaluate`: does it keep the face, and does it follow the prompt?

python -m idea_jax.evaluate --images DIR --photos DIR --score_model FILE
python -m idea_jax.evaluate --identity FILE --photos DIR --pretrained_model_name_or_path MODEL ...
python -m idea_jax.evaluate --compare paper,cross_init --photos DIR ...
python -m idea_jax.evaluate --card DIR --people DIR --pretrained_model_name_or_path MODEL ...
"""

import sys
from collections.abc import Sequence

from idea_jax import cli
from idea_jax.card.settings import CardConfig
from idea_jax.evaluation.settings import EvaluateConfig

PROGRAM = "idea-evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, as `cli.main` says."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--card" in [flag.partition("=")[0] for flag in argv]:
        about = "Compare the methods on a checkpoint, and write a card that can be passed on."

        def load_card():
            from idea_jax.card import run

            return run.run

        return cli.main(CardConfig, load_card, argv, prog=PROGRAM, description=about)
    about = (
        "Score pictures of people: likeness, prompts, intervals over people, one report. --card "
        "DIR --help tells how all methods are compared on a checkpoint."
    )

    def load():
        from idea_jax.evaluation import run

        return run.run

    return cli.main(EvaluateConfig, load, argv, prog=PROGRAM, description=about)


if __name__ == "__main__":
    sys.exit(main())
