"""The command `idea-plan`: what a program will need and take on devices that need not be there."""

import json
import logging
import sys
from collections.abc import Sequence

from idea_jax import launch
from idea_jax.config import reading
from idea_jax.config.settings import ConfigError
from idea_jax.plan.settings import PlanConfig
from idea_jax.runtime.files import say

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the plan; returns the exit code, 1 also where it does not fit."""
    about = {
        "prog": "idea-plan",
        "description": "Says from shapes alone whether a training, an enhancer's training or "
        "drawing fits devices that need not be there, how to spread it over them, and how long it "
        "takes.",
    }
    try:
        cfg = reading.parse(PlanConfig, sys.argv[1:] if argv is None else argv, **about)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def work() -> int:
        from idea_jax.plan import report

        known = plan(cfg)
        say(json.dumps(known, indent=2) if cfg.json else report.table(known))
        return int(known["fits"] is False)

    return launch.run(work)


def plan(cfg: PlanConfig) -> dict:
    """What `report.facts` says of the job that a config asks for.

    Raises:
      ChipError, PlanError, ConfigError, CheckpointNotFound, WeightsError, UnsupportedConfig: bad
      input.
    """
    from idea_jax.plan import compiled, report
    from idea_jax.plan.work import JOBS
    from idea_jax.runtime import chips

    chip, count = chips.find(cfg.device)
    job = JOBS[cfg.what](cfg, chip, count)
    found = None
    if chip.platform == "tpu" and not cfg.no_compile and compiled.is_there():
        log.info(
            "compiling for %s; at full size that takes many minutes, and --no_compile leaves it "
            "out",
            cfg.device,
        )
        own = count if cfg.what == "enhancer" else count // chips.hosts_of(chip, count)
        found = compiled.compile_for(chip, cfg.device, own, job.lower)
    return report.facts(cfg, chip, count, job, found)


if __name__ == "__main__":
    sys.exit(main())
