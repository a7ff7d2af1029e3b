"""What faster settings of the sampler cost in quality, on the mini's drawn world.

    python -m benchmarks.quality [--people N] [--each N]

Named people of the mini are drawn in the prompts of `captions.PROMPTS` with each setting, from the
same noise. Likeness is the cosine with true drawings of the person, by the recogniser that nothing
was trained with; what the prompt asked for is read by the judge. Prints a Markdown table; times are
of this machine, the ratios are what counts.
"""

import argparse
import time

import jax
import numpy as np

from idea_jax import sample
from idea_jax.mini import captions, drawings, people, quality
from idea_jax.pytrees import stream

SETTINGS = {
    "DDIM, 50 steps": {"scheduler": "ddim", "steps": 50},
    "DPM-Solver++, 20 steps": {"scheduler": "dpmpp_2m", "steps": 20},
    "the same, guided between 0.1 and 1": {
        "scheduler": "dpmpp_2m", "steps": 20, "interval": (0.1, 1.0),
    },
    "the same, guided between 0.2 and 0.9": {
        "scheduler": "dpmpp_2m", "steps": 20, "interval": (0.2, 0.9),
    },
    "the same, guided between 0.3 and 0.8": {
        "scheduler": "dpmpp_2m", "steps": 20, "interval": (0.3, 0.8),
    },
    "DPM-Solver++, 10 steps": {"scheduler": "dpmpp_2m", "steps": 10},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--each", type=int, default=8, help="pictures of each person")
    args = parser.parse_args()
    mini = quality.load()
    scoring = mini.scoring()
    chosen = np.arange(args.people) * (people.NAMES // args.people)
    key = stream(jax.random.key(0), "benchmark of quality")
    true = drawings.portraits(people.named(chosen, chosen), 4, key)
    likeness_to = quality.embed(scoring, true.images).reshape(args.people, 4, -1).mean(axis=1)
    likeness_to /= np.linalg.norm(likeness_to, axis=1, keepdims=True)
    print("| setting | seconds a picture | against the first | likeness | prompt kept |")
    print("|---|---|---|---|---|")
    first = None
    for name, settings in SETTINGS.items():
        likeness, kept, seconds = measure(mini, scoring, chosen, likeness_to, args.each, settings)
        first = first or seconds
        error = np.std(likeness) / np.sqrt(len(likeness))
        print(
            f"| {name} | {seconds:.3f} | {first / seconds:.2f} x | {np.mean(likeness):.3f} "
            f"± {error:.3f} | {np.mean(kept):.1%} of {len(kept)} |",
            flush=True,
        )


def measure(mini, scoring, chosen, likeness_to, each, settings):
    """Likeness of every picture, whether each thing asked for is there, seconds a picture."""
    likeness, kept, times = [], [], []
    for number, person in enumerate(chosen):
        prompt = captions.PROMPTS[number % len(captions.PROMPTS)]
        name = people.full_name(person, person)
        kv = quality.plain_keys_values(mini, prompt.text.format(name))
        started = time.perf_counter()
        pictures = sample.draw_prompt(
            mini.model,
            mini.frozen,
            kv,
            seed=0,
            count=each,
            batch_size=each,
            size=(drawings.SIZE,) * 2,
            guidance_scale=quality.GUIDANCE,
            **settings,
        )
        times.append(time.perf_counter() - started)
        likeness.extend(quality.embed(scoring, pictures) @ likeness_to[number])
        seen = quality.read_scenes(mini.folder, pictures)
        for hits in quality.kept(prompt.asks, seen).values():
            kept.extend(hits)
    return likeness, kept, min(times[1:]) / each


if __name__ == "__main__":
    main()
