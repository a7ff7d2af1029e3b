"""What a user would want to know of the reports in a folder, in five lines.

    python -m benchmarks.summary [FOLDER]

`make bench` ends with it. A number that no report there holds is said to be not measured.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.report import BUSY, ratio
from benchmarks.settings import WORKLOADS, drawing

NOT = "not measured"


def main(argv: list[str] | None = None) -> int:
    """Prints the lines; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.summary", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", nargs="?", default="outputs/benchmarks", type=Path)
    folder = parser.parse_args(argv).folder
    reports = {}
    for name in ("mini-cpu", "mini-cpu-jobs", "mid-cpu"):
        try:
            reports[name] = json.loads((folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            continue
    if not reports:
        print(
            f"error: {folder} holds no report of `make bench`: run it, or name its BENCH_OUT",
            file=sys.stderr,
        )
        return 1
    print("\n".join(lines(reports)))
    return 0


def lines(reports: dict[str, dict]) -> list[str]:
    """The five lines.

    Args:
      reports: what `benchmarks.report.write` writes, by name.
    """
    host = max((report["machine"] for report in reports.values()), key=lambda one: one["busy"])
    versions = ", ".join(f"{k} {v}" for k, v in host["versions"].items() if k in ("jax", "torch"))
    busy = "; BUSY WITH SOMETHING ELSE, so that no number here counts" * (host["busy"] > BUSY)
    tunables = f", GLIBC_TUNABLES={host['tunables']}" if host.get("tunables") else ""
    mini, mid = reports.get("mini-cpu", {}), reports.get("mid-cpu", {})
    jobs = reports.get("mini-cpu-jobs", {}).get("jobs", {})
    sizes = WORKLOADS["mini", "cpu"]
    many = drawing(sizes.pictures, sizes.steps)
    took = _best(mini.get("times", {}), many)
    rate = f"{1e3 * sizes.pictures / took:.1f}/s" if took else NOT
    return [
        f"{host['cpu']}, {host['cores']} cores, {versions}{tunables}{busy}",
        "The mini, from the shell, programs kept: photo to person "
        + ", ".join(f"{_seconds(jobs, person(n))} with {n} steps" for n in (0, 25)),
        f"person to a first picture {_seconds(jobs, 'a first picture')}; {sizes.pictures} at once, "
        f"{sizes.steps} steps: {rate}",
        "The mini against PyTorch: " + _against(mini.get("times", {}), many),
        "A fifth of SD 2.1's width against PyTorch: "
        + _against(mid.get("times", {}), drawing(4, 5)),
    ]


def person(steps: int) -> str:
    """What the job is called that learns a person with the shared ID-Enhancer."""
    return f"a person, {steps} steps"


def _best(times: dict, what: str) -> float | None:
    return times.get(what, {"stacks": {}})["stacks"].get("jax", {}).get("min")


def _seconds(jobs: dict, what: str) -> str:
    took = _best(jobs, what)
    return f"{took:.1f} s" if took is not None else NOT


def _against(times: dict, draws: str) -> str:
    """How many times faster a step and a drawing are than each of PyTorch's stacks."""
    said = []
    for kind, what in (("a step", "train step, paper"), ("drawing", draws)):
        stacks = times.get(what, {"stacks": {}})["stacks"]
        told = []
        for other in ("eager", "compiled"):
            if "jax" in stacks and other in stacks:
                factor, is_clear = ratio(stacks["jax"], stacks[other])
                told.append(f"{factor:.2f} x {other}" + " (equal)" * (not is_clear))
        said.append(f"{kind} {', '.join(told) or NOT}")
    return "; ".join(said)


if __name__ == "__main__":
    sys.exit(main())
