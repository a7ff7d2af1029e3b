"""What other programs make of a person: K/V deltas on one half of guidance or both, no adapter.

    python -m idea_jax.mini.forms [--split test|validation] [--people N] [--pictures N] \\
        [--profile paper|paper_alone] [--steps N ...] [--json FILE]

This project's K/V deltas act on the prompt's half of guidance. A plain LoRA acts on both halves,
and no LoRA can say the ID-Adapter. Every person is learned once, and drawn in each of the forms
from the same noise. Similarities and what prompts asked for are those of `idea_jax.mini.lab`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from idea_jax.config.settings import TrainConfig, check_seed
from idea_jax.data import text
from idea_jax.data.images import to_uint8
from idea_jax.errors import InputError
from idea_jax.method import condition
from idea_jax.mini import captions, drawings, lab, quality
from idea_jax.models import hub, sd
from idea_jax.runtime import devices
from idea_jax.runtime.files import atomic_write, check_writable, say
from idea_jax.sampling import programs


class Form(NamedTuple):
    """How a person is drawn.

    Attributes:
      kv: halves of guidance that K/V deltas act on: "prompt", "both" or "none".
      adapter: whether the ID-Adapter acts on the prompt.
    """

    kv: str
    adapter: bool


FORMS = {
    "prompt half": Form("prompt", True),  # this project, diffusers with `load_identity`, ComfyUI
    "both halves": Form("both", True),
    "prompt half, no adapter": Form("prompt", False),  # ComfyUI's own nodes
    "both halves, no adapter": Form("both", False),  # a plain LoRA and tokens: AUTOMATIC1111
    "tokens alone": Form("none", False),
}


def keys_values(
    form: Form,
    model: sd.StableDiffusion,
    method: condition.Method,
    frozen: sd.Frozen,
    trainable: condition.Trainable,
    given: condition.Given,
    ids: jax.Array,
) -> dict:
    """What `programs.prompt_keys_values` returns, in a form.

    Args:
      ids: int32[2, T], of the prompt and of the negative prompt.
    """
    drawn = replace(method, adapter=form.adapter and method.adapter)
    strength = jnp.float32(form.kv != "none")
    kv = programs.prompt_keys_values(
        model, drawn, frozen, trainable, given, ids[0], ids[1], strength
    )
    if form.kv != "both":
        return kv
    plain = sd.encode_text(model, frozen, ids[1][None])
    unguided = condition.keys_values(model, method, frozen, trainable, plain)
    return jax.tree.map(lambda both, one: jnp.concatenate([one, both[1:]]), kv, unguided)


@partial(jax.jit, static_argnums=(0, 1, 2, 7))
def _draw(form, model, method, frozen, trainable, given, ids, count, seed):
    """float32[prompts, count, 64, 64, 3] of ids int32[prompts, 2, T]."""

    def one(ids):
        kv = keys_values(form, model, method, frozen, trainable, given, ids)
        return programs.draw(
            model,
            frozen._replace(shared={}),
            kv,
            seed,
            jnp.arange(count, dtype=jnp.int32),
            jnp.float32(quality.GUIDANCE),
            programs.Sampling((drawings.SIZE,) * 2, "ddim", quality.STEPS),
        )

    return jax.vmap(one)(ids)


def experiment(
    mini: quality.Mini,
    configs: dict[int, TrainConfig],
    protocol: lab.Protocol,
    progress: Callable = iter,
) -> dict[str, list[lab.Score]]:
    """Returns the scores of every person, by number of steps and form, and those of the lab's floor
    and ceiling.

    Args:
      configs: by their number of steps.

    Raises:
      FaceError: on some photos no face is found.
    """
    split, count, photos, pictures, _, seed = protocol
    met = lab.meet(mini, split, range(count), pictures, seed, photos=photos)
    lab.check_faces(mini, met)
    scoring = mini.scoring()
    scores: dict[str, list[lab.Score]] = {}
    for i, person in enumerate(met):
        for name, other in (("another person", met[i - 1]), ("true drawings", person)):
            result = lab.judge_pictures(mini, scoring, person, other.true)
            scores.setdefault(name, []).append(lab.Score(*result))
    texts = [prompt.text for prompt in captions.PROMPTS]
    for number, cfg in configs.items():
        learner = lab.Lab(mini, cfg)
        tokenizer = learner.base.tokenizer
        empty, *filled = tokenizer(
            ["", *(text.fill(prompt, tokenizer.placeholder) for prompt in texts)]
        )
        ids = jnp.asarray(np.stack([np.stack([own, empty]) for own in filled]))
        for person in progress(met):
            learn = learner.learn if number else learner.begin
            state, _ = learn(person.photos)
            for name, form in FORMS.items():
                drawn = _draw(
                    form,
                    mini.model,
                    learner.method,
                    learner.frozen,
                    state.trainable,
                    state.given,
                    ids,
                    pictures,
                    jnp.uint32(seed),
                )
                result = lab.judge_pictures(mini, scoring, person, to_uint8(np.asarray(drawn)))
                row = f"{number} steps, {name}"
                scores.setdefault(row, []).append(lab.Score(*result, steps=number))
    return scores


def main(argv: list[str] | None = None) -> int:
    """Prints the table, and what each form is ahead of the later ones; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.mini.forms",
        description="Measures what other programs make of a person, on the mini.",
    )
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=1, help="for each prompt (default: 1)")
    parser.add_argument(
        "--profile",
        choices=("paper", "paper_alone"),
        default="paper",
        help="paper_alone learns without the shared ID-Enhancer (default: paper)",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 25], help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    args = parser.parse_args(argv)
    for name, values, least in (
        ("people", [args.people], 2),
        ("pictures", [args.pictures], 1),
        ("steps", args.steps, 0),
    ):
        if min(values) < least:
            parser.error(f"--{name}: expected {least} or more, got {min(values)}")
    try:
        check_seed(args.seed)
        if args.json:
            check_writable(args.json.parent)
        devices.check_backend()
        protocol = lab.Protocol(args.split, args.people, pictures=args.pictures, seed=args.seed)
        configs = {n: lab.read_config(args.profile, {"max_train_steps": n}) for n in args.steps}
        mini = quality.load(hub.MINI)
        scores = experiment(mini, configs, protocol, lambda met: tqdm(met, unit="person"))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(lab.markdown(scores))
    for number in configs:
        bounds = ("another person", "true drawings", *(f"{number} steps, {n}" for n in FORMS))
        own = {name: scores[name] for name in bounds}
        say(f"\nDifferences of the same people, {number} steps:\n\n{lab.differences(own)}")
    if args.json:
        with atomic_write(args.json) as path:
            values = {n: [s._asdict() for s in each] for n, each in scores.items()}
            path.write_text(json.dumps(values) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
