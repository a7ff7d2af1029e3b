"""The flags of a benchmark."""

import argparse
import re
import threading

from benchmarks.machine import installed
from benchmarks.settings import ABLATIONS, WORKLOADS

STACKS = ("jax", "published", "eager", "compiled")

PARTS = ("train", "sampling", "people", "ablations", "kernels", "convolutions")

# Of torch.compile. On a CPU max-autotune tries its kernels for hours.
MODES = {"cpu": "default", "gpu": "max-autotune"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    names = dict.fromkeys(name for name, _ in WORKLOADS)
    parser.add_argument("--workload", choices=names, default="mini")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--stacks", nargs="+", choices=STACKS, help="(default: all that the parts and jobs measure)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="what is measured (default: all that can be)"
    )
    parser.add_argument(
        "--people",
        nargs="+",
        type=positive,
        help="numbers of people in one step, for the part people (default: 1 2 4, on a GPU to 8)",
    )
    parser.add_argument(
        "--ablations",
        nargs="+",
        choices=tuple({name: None for own in ABLATIONS.values() for name in own}),
        help="measures that the part ablations takes back (default: all that there are)",
    )
    parser.add_argument(
        "--torch_compile",
        metavar="MODE",
        help="mode of the stack compiled (default: "
        + ", ".join(f"{mode} on {device}" for device, mode in MODES.items())
        + ")",
    )
    parser.add_argument(
        "--repeats", type=positive, help="measurements of each (default: by workload)"
    )
    parser.add_argument(
        "--jobs", type=positive, help="measure whole jobs, this many times each (default: not)"
    )
    parser.add_argument(
        "--patience",
        type=positive_seconds,
        nargs=2,
        metavar=("TRAIN", "SAMPLING"),
        help="seconds that each of PyTorch's stacks may take for its first calls of these parts; "
        "one that takes longer is left out (default: no limit)",
    )
    parser.add_argument(
        "--inputs",
        help="folder of checkpoint and inputs, which are written there if they are not there yet "
        "(default: a temporary one)",
    )
    parser.add_argument(
        "--compile_cache",
        help="folder in which programs are kept, so that first calls of another run compile little",
    )
    parser.add_argument(
        "--out",
        default="outputs/benchmarks",
        help="folder of the results (default: %(default)s; those of the documentation are in "
        "benchmarks/results)",
    )
    parser.add_argument(
        "--name",
        help="name of the report's files, for one that should not replace that of another run "
        "(default: WORKLOAD-DEVICE)",
    )
    args = parser.parse_args(argv)
    if args.name is not None and not re.fullmatch(r"\w[\w.-]*", args.name):
        parser.error(
            f"--name must be letters, digits, underscores, dots and dashes, got {args.name!r}"
        )
    refuse_unread(parser, args)
    if "jax" not in args.stacks:
        parser.error("--stacks must hold jax: the others are compared with it")
    if len(args.stacks) > 1 and len(installed(("torch", "diffusers"))) < 2:
        parser.error(
            "PyTorch's stacks need torch and diffusers, which are not installed: python -m pip "
            "install -e '.[test]', or take --stacks jax"
        )
    return args


def refuse_unread(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in parts, stacks and ablations, and refuses flags that nothing would read.

    Raises: SystemExit, from argparse.
    """
    measured = WORKLOADS[args.workload, args.device].ablations
    possible = {
        "parts": PARTS if measured else ("train", "sampling"),
        "ablations": list(ABLATIONS[args.device]),
    }
    for flag, values in possible.items():
        if unknown := [x for x in getattr(args, flag) or () if x not in values]:
            parser.error(
                f"--{flag} {' '.join(unknown)}: not measured with --workload {args.workload} "
                f"--device {args.device}; take some of {' '.join(values)}"
            )
    args.parts = args.parts or possible["parts"]
    compares = not {"train", "sampling"}.isdisjoint(args.parts)
    takes_turns = compares or not {"people", "ablations"}.isdisjoint(args.parts)
    # The published code draws no pictures and has no whole jobs.
    is_measured = {"jax": True, "published": "train" in args.parts}
    is_measured |= dict.fromkeys(("eager", "compiled"), compares or args.jobs is not None)
    if unread := [name for name in args.stacks or () if not is_measured[name]]:
        parser.error(
            f"--stacks {' '.join(unread)}: not measured with --parts {' '.join(args.parts)}; leave "
            "it out, or add --parts train"
        )
    args.stacks = args.stacks or [name for name in STACKS if is_measured[name]]
    is_patient = compares and len(args.stacks) > 1
    readers = {
        "people": ("--parts people", "people" in args.parts),
        "ablations": ("--parts ablations", "ablations" in args.parts),
        "repeats": ("--parts train, sampling, people and ablations", takes_turns),
        "torch_compile": ("--stacks compiled", "compiled" in args.stacks),
        "patience": ("PyTorch's --stacks in --parts train and sampling", is_patient),
    }
    for flag, (reader, is_there) in readers.items():
        if getattr(args, flag) is not None and not is_there:
            parser.error(f"--{flag} is for {reader}, which this run does not measure; leave it out")
    args.ablations = args.ablations or possible["ablations"]


def positive(text: str) -> int:
    """A number of times, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def positive_seconds(text: str) -> float:
    """A time to wait, for argparse; no longer than Python's timers can."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return value
