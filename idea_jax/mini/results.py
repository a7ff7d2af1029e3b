"""`python -m idea_jax.mini.results FOLDER ...`: evaluations of the mini as a document.

Each FOLDER is what `idea-evaluate --prompts mini` wrote. To its tables comes the share of what
prompts asked for. CLIP's similarity says little of people whom it does not know; the judge of the
lab reads style, expression, hat, shirt and background off each picture instead.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from idea_jax import launch
from idea_jax.errors import InputError
from idea_jax.runtime.files import atomic_write, say

ROWS, TABLE = "rows.jsonl", "table.md"
MARK = "<!-- what follows is made by `make results` -->"


class AlbumError(InputError, ValueError):
    """A folder is no evaluation of the mini's prompts."""


def main(argv: list[str] | None = None) -> int:
    """Prints the tables, or writes them into a file; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.mini.results",
        description="Makes a document of evaluations of the mini.",
    )
    parser.add_argument("folders", type=Path, nargs="+", help="what idea-evaluate wrote")
    parser.add_argument(
        "--file", type=Path, help=f"replace what follows the line {MARK} of this file"
    )
    args = parser.parse_args(argv)

    def work() -> None:
        made = "\n".join(document(folder) for folder in args.folders)
        if args.file is None:
            say(made.rstrip())
            return
        head = args.file.read_text("utf-8").partition(MARK)[0] if args.file.is_file() else ""
        with atomic_write(args.file) as temporary:
            temporary.write_text(f"{head}{MARK}\n\n{made}", "utf-8")

    return launch.run(work)


def document(folder: Path) -> str:
    """The tables of an evaluation below a heading of its name, and those of its prompts.

    Raises:
      as `shares`.
    """
    found = shares(folder)
    said = (folder / TABLE).read_text("utf-8").replace("\n# ", "\n### ").replace("\n## ", "\n### ")
    _, _, rest = said.partition("\n")
    prompts = f"### What prompts asked for\n\n{markdown(found)}\n"
    return f"## {folder.name.capitalize()}\n{rest}\n{prompts}"


def shares(folder: Path) -> dict[str, dict[str, float]]:
    """The share of what prompts asked for that pictures show, by method and person.

    Raises:
      AlbumError: there is no evaluation, or it has other prompts than the mini's.
      ImageError, OSError: a picture cannot be read.
    """
    from idea_jax.data.images import read_image
    from idea_jax.mini import captions, measures
    from idea_jax.models.hub import MINI_FOLDER
    from idea_jax.sampling.plan import safe_name

    try:
        lines = (folder / ROWS).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        places = [folder / "pictures" / safe_name(row["method"]) / row["picture"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AlbumError(
            f"{folder} holds no readable {ROWS}: expected the --output_dir of idea-evaluate"
        ) from error
    asks = {row["prompt"]: captions.asked_for(row["prompt"]) for row in rows}
    if other := sorted(prompt for prompt, wanted in asks.items() if wanted is None):
        raise AlbumError(
            f"{folder} has the prompt {other[0]!r}, whose words the mini does not know: evaluate "
            "with --prompts mini"
        )
    pictures = np.stack([np.asarray(read_image(place)) for place in places])
    seen = measures.read_scenes(MINI_FOLDER, pictures)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for number, row in enumerate(rows):
        part = {field: values[number : number + 1] for field, values in seen.items()}
        hits = measures.kept(asks[row["prompt"]], part)
        own = found.setdefault(row["method"], {}).setdefault(row["person"], {})
        for field, hit in hits.items():
            own.setdefault(f"{row['prompt']}/{field}", []).append(float(hit.mean()))
    return {
        method: {
            person: float(np.mean([np.mean(each) for each in own.values()]))
            for person, own in people.items()
        }
        for method, people in found.items()
    }


def markdown(found: dict[str, dict[str, float]]) -> str:
    """A table of means with 95% bootstrap intervals over people, and the differences to the first
    method on the same people."""
    from idea_jax.mini.trials import interval

    def told(values: Sequence[float], sign: str = "") -> str:
        low, high = interval(values)
        return f"{np.mean(values):{sign}.1%} ({low:{sign}.1%} to {high:{sign}.1%})"

    first, *_ = found
    lines = [f"| method | prompts kept | ahead of {first} |", "|---|---|---|"]
    for method, people in found.items():
        both = [who for who in people if who in found[first]]
        apart = [people[who] - found[first][who] for who in both]
        ahead = told(apart, "+") if method != first and apart else ""
        lines.append(f"| {method} | {told(list(people.values()))} | {ahead} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
