"""The table of `python -m benchmarks.quality`: settings of the sampler, drawn and judged."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence

import numpy as np

from idea_jax.mini import captions, drawings, measures, trials
from idea_jax.runtime import devices
from idea_jax.runtime.files import atomic_write, check_writable, say
from idea_jax.runtime.versions import versions
from idea_jax.sampling import programs

SIZE = (drawings.SIZE,) * 2
SETTINGS = {
    "DDIM, 50 steps": programs.Sampling(SIZE, "ddim", 50),
    "DPM-Solver++, 20 steps": programs.Sampling(SIZE, "dpmpp_2m", 20),
    "the same, guided between 0.2 and 0.9": programs.Sampling(
        SIZE, "dpmpp_2m", 20, interval=(0.2, 0.9)
    ),
    "DPM-Solver++, 10 steps": programs.Sampling(SIZE, "dpmpp_2m", 10),
    "these, guided between 0.2 and 0.9": programs.Sampling(
        SIZE, "dpmpp_2m", 10, interval=(0.2, 0.9)
    ),
    "DPM-Solver++, 5 steps": programs.Sampling(SIZE, "dpmpp_2m", 5),
    "Euler, 10 steps": programs.Sampling(SIZE, "euler", 10),
    "Euler, 5 steps": programs.Sampling(SIZE, "euler", 5),
    "Euler ancestral, 10 steps": programs.Sampling(SIZE, "euler_ancestral", 10),
    "LCM, 4 steps": programs.Sampling(SIZE, "lcm", 4),
}


def table(args: argparse.Namespace) -> None:
    """Prints a row for each setting; writes the numbers where --json says."""
    if args.json:
        check_writable(args.json.parent)
    devices.check_backend()
    found = measure(measures.load(), args.people, args.each)
    say("| setting | CPU seconds a picture | against the first | likeness | prompt kept |")
    say("|---|---|---|---|---|")
    (first, *_) = found.values()
    for name, own in found.items():
        cells = [f"{np.median(own['seconds']):.3f}"]
        # People are drawn with each setting in turn, so that ratios are of the same minute.
        cells.append(f"{np.median(np.divide(first['seconds'], own['seconds'])):.2f} x")
        for field, form in (("likeness", ".3f"), ("kept", ".1%")):
            apart = np.subtract(own[field], first[field])
            low, high = trials.interval(apart)
            change = f" ({np.mean(apart):+{form}}: {low:+{form}} to {high:+{form}})"
            cells.append(f"{np.mean(own[field]):{form}}{change if own is not first else ''}")
        say(f"| {name} | {' | '.join(cells)} |")
    if args.json:
        about = {"people": args.people, "each": args.each, "guidance_scale": measures.GUIDANCE}
        result = {**about, "versions": versions(), "settings": found}
        with atomic_write(args.json) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    mini: measures.Mini,
    people: int,
    each: int,
    settings: Mapping[str, programs.Sampling] = SETTINGS,
) -> dict[str, dict[str, Sequence[float]]]:
    """Of each setting and person: likeness to other drawings of the person, the share of what
    prompts ask for that is there, and CPU seconds a picture."""
    learner = trials.Lab(mini, trials.read_config("paper", {"max_train_steps": 0}))
    scoring, texts = mini.scoring(), [prompt.text for prompt in captions.PROMPTS]
    met = trials.meet(mini, "validation", range(people), 1)
    found: dict[str, dict] = {
        name: {"likeness": [], "kept": [], "seconds": []} for name in settings
    }
    for place, person in enumerate(met):
        state, _ = learner.learn(person.photos)
        for name, sampling in settings.items():
            if place == 0:
                learner.draw(state, texts, each, sampling=sampling)  # compiles
            started = time.process_time()
            drawn = learner.draw(state, texts, each, sampling=sampling)
            seconds = time.process_time() - started
            likeness, kept = trials.judge_pictures(mini, scoring, person, drawn)
            found[name]["likeness"].append(likeness)
            found[name]["kept"].append(kept)
            found[name]["seconds"].append(seconds / (len(texts) * each))
    return found
