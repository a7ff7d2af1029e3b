"""What faster settings of the sampler cost in quality, on the mini's drawn world.

    python -m benchmarks.quality [--people N] [--each N] [--json FILE]

Named people of the mini are drawn in the prompts of `captions.PROMPTS` with each setting, from the
same noise. Likeness is the cosine with true drawings of the person, by the recogniser that nothing
was trained with; what the prompt asked for is read by the judge. Errors are standard errors over
people, whose pictures are alike. Prints a Markdown table; times are of this machine, the ratios are
what counts.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.options import positive
from idea_jax.mini import captions, drawings, people, quality
from idea_jax.pytrees import stream
from idea_jax.runtime.files import atomic_write, check_writable
from idea_jax.runtime.versions import versions
from idea_jax.sampling import programs

FAST = {"scheduler": "dpmpp_2m", "steps": 20}
SETTINGS = {
    "DDIM, 50 steps": {"scheduler": "ddim", "steps": 50},
    "DPM-Solver++, 20 steps": FAST,
    "the same, guided between 0.1 and 1": {**FAST, "interval": (0.1, 1.0)},
    "the same, guided between 0.2 and 0.9": {**FAST, "interval": (0.2, 0.9)},
    "the same, guided between 0.3 and 0.8": {**FAST, "interval": (0.3, 0.8)},
    "DPM-Solver++, 10 steps": {"scheduler": "dpmpp_2m", "steps": 10},
}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.json:
        check_writable(args.json.parent)
    mini = quality.load()
    scoring = mini.scoring()
    chosen = np.arange(args.people) * (people.NAMES // args.people)
    key = stream(jax.random.key(0), "benchmark of quality")
    true = drawings.portraits(people.named(chosen, chosen), 4, key)
    likeness_to = quality.embed(scoring, true.images).reshape(args.people, 4, -1).mean(axis=1)
    likeness_to /= np.linalg.norm(likeness_to, axis=1, keepdims=True)
    print("| setting | seconds a picture | against the first | likeness | prompt kept |")
    print("|---|---|---|---|---|")
    about = {"people": args.people, "each": args.each, "guidance_scale": quality.GUIDANCE}
    result = {**about, "versions": versions(), "settings": {}}
    for name, settings in SETTINGS.items():
        found = measure(mini, scoring, chosen, likeness_to, args.each, settings)
        result["settings"][name] = found
        (first, *_) = result["settings"].values()
        print(
            f"| {name} | {found['seconds']:.3f} | {first['seconds'] / found['seconds']:.2f} x | "
            f"{found['likeness']:.3f} ± {found['likeness_error']:.3f} | "
            f"{found['kept']:.1%} ± {found['kept_error']:.1%} |",
            flush=True,
        )
    if args.json:
        with atomic_write(args.json) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--people", type=positive, default=24, help=f"2 to {people.NAMES} (default: %(default)s)"
    )
    parser.add_argument(
        "--each", type=positive, default=8, help="pictures of each (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    args = parser.parse_args(argv)
    if not 2 <= args.people <= people.NAMES:
        # The first drawing of a setting compiles, and does not count.
        parser.error(f"--people must lie between 2 and {people.NAMES}, got {args.people}")
    return args


def measure(mini, scoring, chosen, likeness_to, each, settings):
    """Means over people of likeness and of the share of what prompts ask for that is there, with
    their standard errors, and seconds a picture."""
    likeness, kept, times = [], [], []
    for number, person in enumerate(chosen):
        prompt = captions.PROMPTS[number % len(captions.PROMPTS)]
        name = people.full_name(person, person)
        kv = quality.plain_keys_values(mini, prompt.text.format(name))
        started = time.perf_counter()
        pictures = programs.draw_prompt(
            mini.model,
            mini.frozen,
            kv,
            programs.Sampling((drawings.SIZE,) * 2, **settings),
            seed=0,
            count=each,
            batch_size=each,
            guidance_scale=quality.GUIDANCE,
        )
        times.append(time.perf_counter() - started)
        likeness.append(np.mean(quality.embed(scoring, pictures) @ likeness_to[number]))
        seen = quality.read_scenes(mini.folder, pictures)
        kept.append(np.mean(list(quality.kept(prompt.asks, seen).values())))
    found = {"seconds": min(times[1:]) / each}
    for name, values in (("likeness", likeness), ("kept", kept)):
        found[name] = float(np.mean(values))
        found[f"{name}_error"] = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return found


if __name__ == "__main__":
    main()
