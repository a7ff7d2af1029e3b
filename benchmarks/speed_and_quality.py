"""The table of `python -m benchmarks.quality`: settings of the sampler, drawn and judged."""

import argparse
import json
import time

import jax
import numpy as np

from idea_jax.mini import captions, drawings, measures, people
from idea_jax.pytrees import stream
from idea_jax.runtime import devices
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


def table(args: argparse.Namespace) -> None:
    """Prints a row for each setting; writes the numbers where --json says."""
    if args.json:
        check_writable(args.json.parent)
    devices.check_backend()
    mini = measures.load()
    scoring = mini.scoring()
    chosen = np.arange(args.people) * (people.NAMES // args.people)
    key = stream(jax.random.key(0), "benchmark of quality")
    true = drawings.portraits(people.named(chosen, chosen), 4, key)
    likeness_to = measures.embed(scoring, true.images).reshape(args.people, 4, -1).mean(axis=1)
    likeness_to /= np.linalg.norm(likeness_to, axis=1, keepdims=True)
    print("| setting | seconds a picture | against the first | likeness | prompt kept |")
    print("|---|---|---|---|---|")
    about = {"people": args.people, "each": args.each, "guidance_scale": measures.GUIDANCE}
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


def measure(mini, scoring, chosen, likeness_to, each, settings):
    """Means over people of likeness and of the share of what prompts ask for that is there, with
    their standard errors, and seconds a picture."""
    likeness, kept, times = [], [], []
    for number, person in enumerate(chosen):
        prompt = captions.PROMPTS[number % len(captions.PROMPTS)]
        name = people.full_name(person, person)
        kv = measures.plain_keys_values(mini, prompt.text.format(name))
        started = time.perf_counter()
        pictures = programs.draw_prompt(
            mini.model,
            mini.frozen,
            kv,
            programs.Sampling((drawings.SIZE,) * 2, **settings),
            seed=0,
            count=each,
            batch_size=each,
            guidance_scale=measures.GUIDANCE,
        )
        times.append(time.perf_counter() - started)
        likeness.append(np.mean(measures.embed(scoring, pictures) @ likeness_to[number]))
        seen = measures.read_scenes(mini.folder, pictures)
        kept.append(np.mean(list(measures.kept(prompt.asks, seen).values())))
    found = {"seconds": min(times[1:]) / each}
    for name, values in (("likeness", likeness), ("kept", kept)):
        found[name] = float(np.mean(values))
        found[f"{name}_error"] = float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return found
