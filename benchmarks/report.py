"""Measurements to minimum, median and spread, and those to JSON, a Markdown table and a plot."""

import html
import json
import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks.settings import ABLATIONS, COMPARED_STEPS, drawing

WIDTH, ROW, LEFT = 640, 22, 260  # of the plot, in pixels
BUSY = 0.1  # share of the cores' time that others take, from which a run does not count
FIRST = (
    "First call: from request to answer, compiling included; of training, that of {} steps; of "
    "drawing without what the comparison has compiled, such as the text encoder."
)
COLOURS = {"jax": "#3366bb", "published": "#999999", "eager": "#cc7733", "compiled": "#bb3333"}


class Measurements:
    """Values by what was measured and which stack it was; the first of each is kept apart."""

    def __init__(self):
        self._values = defaultdict(list)
        self._first, self._units = {}, {}

    def add(self, what: str, name: str, value: float, unit: str, *, is_first: bool) -> None:
        self._units[what] = unit
        if is_first:
            self._first[what, name] = value
        else:
            self._values[what, name].append(value)

    def leave_out(self, name: str, what: str) -> None:
        """Forgets what was measured of a stack that has failed since."""
        self._values.pop((what, name), None)

    def summary(self) -> dict:
        """`{what: {stack: {"min": ..., "median": ..., "spread": ..., "first": ...}}}`."""
        found: dict = {}
        for (what, name), values in self._values.items():
            middle = statistics.median(values)
            found.setdefault(what, {"unit": self._units[what], "stacks": {}})
            found[what]["stacks"][name] = {
                "min": min(values),
                "median": middle,
                "spread": (max(values) - min(values)) / middle,
                "first": self._first[what, name],
                "count": len(values),
            }
        return found


def compared(stacks: dict, name: str) -> str:
    """`verdict` of this project against another stack, if both are there."""
    is_other = name != "jax" and "jax" in stacks
    return verdict(stacks["jax"], stacks[name]) if is_other else ""


def verdict(mine: dict, theirs: dict) -> str:
    """`ratio` as text; a single measurement has no spread that could tell what is equal."""
    times, is_clear = ratio(mine, theirs)
    if min(mine["count"], theirs["count"]) < 2:
        return f"{times:.2f} x (of one measurement)"
    return f"{times:.2f} x" + ("" if is_clear else " (equal: within the spread)")


def ratio(mine: dict, theirs: dict) -> tuple[float, bool]:
    """How many times faster, by the minima, and whether that is more than the spread."""
    times = theirs["min"] / mine["min"]
    return times, abs(times - 1) > max(mine["spread"], theirs["spread"])


def markdown(result: dict) -> str:
    """All results as readable text."""
    title = f"# {result['workload']} on {result['device']}"
    if result.get("name", "") not in ("", f"{result['workload']}-{result['device']}"):
        title += f": {result['name']}"
    lines = [title, "", *about(result), ""]
    if "times" in result:
        lines += [FIRST.format(COMPARED_STEPS), ""]
        lines += ["| what | stack | min | median | spread | first call | this project is |"]
        lines += ["|---|---|---|---|---|---|---|"]
    for what, row in result.get("times", {}).items():
        stacks = row["stacks"]
        for name, values in stacks.items():
            told = compared(stacks, name)
            lines.append(f"| {what} | {name} | {cells(values, row['unit'])} | {told} |")
    if "times" in result:
        lines.append("")
    lines += further(result)
    return "\n".join(lines).rstrip() + "\n"


def cells(values: dict, unit: str, *, has_first: bool = True) -> str:
    shown = {key: f"{values[key]:.4g} {unit}" for key in ("min", "median", "first")}
    first = [shown["first"]] if has_first else []
    return " | ".join([shown["min"], shown["median"], f"{values['spread']:.0%}", *first])


def about(result: dict) -> list[str]:
    """Machine, versions, what was run and how far the results of the stacks agree."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    on = f"; on one {machine['device']['kind']}" if "device" in machine else ""
    tunables = machine.get("tunables")
    pages = f"; all stacks with GLIBC_TUNABLES={tunables}" if tunables else ""
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, others took {machine['busy']:.0%} of them "
        f"before the run{on}{pages}; Python {machine['python']}, {versions}.",
        f"Sizes: {json.dumps(result['sizes'])}.",
    ]
    if machine["busy"] > BUSY:
        lines.append("**The machine was busy with something else: no number here is a result.**")
    for name, found in result.get("compared", {}).items():
        parts = []
        if "loss" in found:
            parts += [f"losses differ by at most {found['loss']:.1e}"]
            parts += [f"cosine of the token updates {found['tokens']:.5f}"]
        if "pictures" in found:
            parts += [f"pictures differ by {found['pictures']:.1e} on average"]
        lines.append(f"Compared before timing, {name}: {', '.join(parts)}.")
    for name, reason in result.get("failed", {}).items():
        lines.append(f"**Left out, {name}: {reason.strip().splitlines()[-1]}**")
    return lines


def further(result: dict) -> list[str]:
    """Floors, memory, ablations, kernels and whole jobs, as far as they were measured."""
    lines = []
    if "flops" in result:
        lines += ["## Against the floor", "", *floors(result)]
    if "memory" in result:
        peaks = (f"{name} {peak / 2**30:.2f} GiB" for name, peak in result["memory"].items())
        lines += ["## Memory of training", "", ", ".join(peaks) + ".", ""]
    if "inside" in result:
        lines += ["## This project alone", ""]
        lines += ["| what | variant | min | median | spread | takes |"]
        lines += ["|---|---|---|---|---|---|"]
        for what, row in result["inside"].items():
            for name, values in row["stacks"].items():
                base = ABLATIONS[result["device"]].get(name)
                plain = row["stacks"].get(base)
                told = f"against {base}: {verdict(plain, values)}" if plain else ""
                # The first is a block's of compiled steps in one row, of compiling in another.
                shown = cells(values, row["unit"], has_first=False)
                lines.append(f"| {what} | {name} | {shown} | {told} |")
        lines.append("")
    if "kernels" in result:
        lines += ["## Operations that take most of a step", ""]
        lines += [f"* `{name}` {share:.1%}" for name, share in result["kernels"]] + [""]
    if "convolutions" in result:
        lines += ["## Convolutions of the UNet alone, those that take most first", ""]
        lines += ["| image | kernel | times | NHWC | NCHW |", "|---|---|---|---|---|"]
        for one in result["convolutions"][:10]:
            shapes = " | ".join("x".join(map(str, one[key])) for key in ("image", "kernel"))
            spent = " | ".join(f"{1e3 * one[layout]:.3g} ms" for layout in ("NHWC", "NCHW"))
            lines.append(f"| {shapes} | {one['times']} | {spent} |")
        lines.append("")
    if "jobs" in result:
        header = "| job | stack | min | median | spread | first | this project is |"
        lines += ["## Whole jobs", "", header, "|---|---|---|---|---|---|---|"]
        for what, row in result["jobs"].items():
            for name, values in row["stacks"].items():
                told = compared(row["stacks"], name)
                lines.append(f"| {what} | {name} | {cells(values, row['unit'])} | {told} |")
    return lines


def floors(result: dict) -> list[str]:
    """What a step and a drawing would take if all of their products ran like a large one."""
    ceiling = max(result["ceilings"].values())  # of the libraries that were tried
    pictures, steps = (result["sizes"].get(key, 0) for key in ("pictures", "steps"))
    kinds = {
        "train_step": ("step", "train step, paper"),
        "sampling": (f"drawing of {pictures}", drawing(pictures, steps)),
    }
    lines = []
    for call, needs in result["flops"].items():
        name, what = kinds[call]
        lines += [
            f"A {name} needs {needs / 1e9:.1f} GF; a large product reaches {ceiling / 1e9:.0f} "
            f"GF/s here, which makes {1e3 * needs / ceiling:.3g} ms the floor.",
            "",
        ]
        stacks = result.get("times", {}).get(what, {"stacks": {}})["stacks"]
        if "jax" in stacks:
            best = stacks["jax"]["min"]
            share = 1e3 * needs / ceiling / best
            lines += [f"The {name} takes {best:.4g} ms, of which the floor is {share:.0%}.", ""]
    return lines


def plot(result: dict) -> str:
    """The minima as bars, each kind on a scale of its own, as SVG."""
    rows, y = [], 20
    kinds = {**result.get("times", {}), **result.get("jobs", {})}
    for what, row in kinds.items():
        longest = max(values["min"] for values in row["stacks"].values())
        rows.append(f'<text x="8" y="{y}" font-weight="bold">{html.escape(what)}</text>')
        y += ROW
        for name, values in row["stacks"].items():
            length = (WIDTH - LEFT) * values["min"] / longest
            colour = COLOURS.get(name, "#777777")
            rows.append(
                f'<text x="24" y="{y}">{html.escape(name)}</text>'
                f'<rect x="{LEFT - 100}" y="{y - 13}" width="{length:.1f}" height="16" '
                f'fill="{colour}"/>'
                f'<text x="{LEFT - 92 + length:.1f}" y="{y}">{values["min"]:.4g} {row["unit"]}'
                "</text>"
            )
            y += ROW
        y += ROW // 2
    title = f"{result['workload']} on {result['device']}: shorter is faster"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" '
        f'font-family="sans-serif" font-size="13"><title>{html.escape(title)}</title>'
        f'<rect width="{WIDTH}" height="{y}" fill="white"/>{"".join(rows)}</svg>\n'
    )


def holds_something(result: dict) -> bool:
    """Whether anything was measured."""
    kinds = ("times", "inside", "kernels", "flops", "convolutions", "jobs")
    return any(result.get(kind) for kind in kinds)


def write(folder: Path, name: str, result: dict) -> None:
    """Writes NAME.json, NAME.md and NAME.svg; nothing if nothing was measured, so that the report
    of an earlier run stays."""
    if not holds_something(result):
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / f"{name}.md").write_text(markdown(result))
    (folder / f"{name}.svg").write_text(plot(result))
