"""What a benchmark measures in turns, and the results that must agree before."""

import argparse
from collections.abc import Iterator

from benchmarks.settings import ABLATIONS, Workload, drawing
from benchmarks.worker import Worker

# The profile that each stack trains; the published step is compared with the same arithmetic here.
PROFILES = {"jax": ("paper", "official"), "published": ("official",)}


def comparisons(stacks: dict[str, Worker], workload: Workload) -> dict[str, dict[str, list]]:
    """The calls of each stack whose results must agree, by part."""
    sizes = {"batch": workload.batch, "room": workload.room}
    steps = {
        name: [
            ["train_outputs", {"profile": profile, **(sizes if name == "jax" else {})}]
            for profile in profiles(stacks, name)
        ]
        for name in stacks
    }
    pictures = {name: [["sample_outputs", {}]] for name in stacks if name != "published"}
    return {"train": steps, "sampling": pictures}


def profiles(stacks: dict[str, Worker], name: str) -> list[str]:
    """The profiles that a stack trains in this run."""
    all_of_them = PROFILES.get(name, ("paper",))
    return [one for one in all_of_them if one == "paper" or "published" in stacks]


# What is measured in turns: {what: {variant: (stack, call, arguments)}}.
Plan = dict[str, dict[str, tuple[str, str, dict]]]


def milliseconds(seconds: float, call: str, arguments: dict) -> float:
    """Of a call, or of one step of one person where the call takes training steps."""
    steps = 1 if call == "sample_time" else arguments["steps"] * arguments.get("people", 1)
    return 1e3 * seconds / steps


def calls_of(stack: str, plan: Plan) -> Iterator[tuple[str, str, str, dict]]:
    """(what, variant, call, arguments) of all that is measured of a stack."""
    for what, calls in plan.items():
        for variant, (own, call, arguments) in calls.items():
            if own == stack:
                yield what, variant, call, arguments


def train_steps(stacks: dict[str, Worker], workload: Workload) -> Plan:
    """Blocks of training steps, milliseconds a step."""
    calls: dict = {}
    for name in stacks:
        # A step of the published code is many times longer than those of the others.
        block = min(workload.block, 2) if name == "published" else workload.block
        sizes = {"batch": workload.batch, "steps": block}
        sizes |= {"room": workload.room} if name == "jax" else {}
        for profile in profiles(stacks, name):
            what = f"train step, {profile}"
            calls.setdefault(what, {})[name] = (name, "train_time", {"profile": profile, **sizes})
    return calls


def sampling(stacks: dict[str, Worker], workload: Workload) -> Plan:
    """Calls of the sampler, milliseconds a call; the published code's is that of `eager`."""
    calls: dict = {}
    for pictures in dict.fromkeys([workload.pictures, *([1] if workload.single else [])]):
        sizes = {"pictures": pictures, "steps": workload.steps}
        calls[drawing(pictures, workload.steps)] = {
            name: (name, "sample_time", sizes) for name in stacks if name != "published"
        }
    return calls


def people(workload: Workload, args: argparse.Namespace) -> Plan:
    """Blocks of steps of several people at once, milliseconds a step for each of them."""
    sizes = {"profile": "paper", "batch": workload.batch, "steps": workload.block}
    calls = {}
    for count in args.people or ((1, 2, 4) if args.device == "cpu" else (1, 2, 4, 8)):
        what, together = f"people in one step: {count}", {"room": workload.room, "people": count}
        calls[what] = {"jax": ("jax", "train_time", sizes | together)}
    return calls


def ablations(workload: Workload, args: argparse.Namespace) -> Plan:
    """Blocks of steps with one of the measures taken back, milliseconds a step.

    Beside those that are asked for stands what each is compared with, see `settings.ABLATIONS`.
    """
    sizes = {"batch": workload.batch, "steps": workload.block}
    plain = sizes | {"profile": "paper", "room": workload.room}
    variants = {
        "best": ("train_time", plain),
        **{
            name: ("ablated_time", sizes | {"without": name})
            for name in ("calls", "cores", "moments", "trainables")
        },
    }
    exact = {"attention": "xla", "compute_dtype": "float32"}
    variants["flash"] = ("train_time", plain | {"changes": {"attention": "xla"}})
    variants["bfloat16"] = ("train_time", plain | {"changes": exact})
    compared_with = ABLATIONS[args.device]
    needed = {"best", *args.ablations, *(compared_with[name] for name in args.ablations)}
    what = "a step without one of the measures"
    return {what: {name: ("jax", *v) for name, v in variants.items() if name in needed}}
