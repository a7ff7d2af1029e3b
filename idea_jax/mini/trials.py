"""Personalisation measured: people whom no network has seen, one drawing each, every profile.

The library of `python -m idea_jax.mini.lab`.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from idea_jax.config import reading
from idea_jax.config.settings import TrainConfig
from idea_jax.data import text
from idea_jax.data.images import to_uint8
from idea_jax.enhancer.sources import DrawnPicture
from idea_jax.faces import embedding
from idea_jax.faces import models as face_models
from idea_jax.faces.portraits import Portraits
from idea_jax.method import shared
from idea_jax.mini import captions, drawings, measures, strangers
from idea_jax.models import hub, sd
from idea_jax.runtime.files import atomic_write
from idea_jax.sampling import programs
from idea_jax.training import group, results
from idea_jax.training.photos import encode_pixels, training_pixels
from idea_jax.training.program import Program, draw_and_step
from idea_jax.training.start import (
    first_values,
    known_names,
    method_of,
    optimizer_of,
    placeholder_of,
    settle,
    starting_ids,
    starting_tokens,
)
from idea_jax.training.step import IdentityState, Photos, check_plateau, init_state

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DRAWS = 2000  # of the bootstrap

# One program for everybody who is learned with the same method and optimiser object.
_step = jax.jit(draw_and_step, static_argnums=0, donate_argnums=2)
_check_plateau = jax.jit(check_plateau, static_argnums=(0, 1), donate_argnums=3)


class Acquaintance(NamedTuple):
    """One person of the drawn world, and what is known about them."""

    photos: np.ndarray  # uint8[photos, 64, 64, 3], all that training sees
    references: np.ndarray  # float32[strangers.REFERENCES, 512], embeddings of other true drawings
    true: np.ndarray  # uint8[prompts, pictures, 64, 64, 3], the person as each prompt asks


class Score(NamedTuple):
    """Of one person: similarity to the references, share of what prompts asked for, training."""

    similarity: float
    prompt: float
    seconds: float = 0.0
    steps: int = 0  # early stopping may end before those of the config


def meet(
    mini: measures.Mini,
    split: str,
    numbers: Sequence[int],
    pictures: int,
    seed: int = 0,
    prompts: Sequence[captions.Prompt] = captions.PROMPTS,
    photos: int = 1,
) -> list[Acquaintance]:
    """Returns people of a split by their numbers; a photo is a plain one, without a hat.

    A person's drawings depend on the seed and their number, not on who else is asked for, and the
    first photo not on how many there are.
    """
    scoring = mini.scoring()
    drawn = strangers.draw_people(split, numbers, pictures, seed, prompts, photos)
    return [
        Acquaintance(first, measures.embed(scoring, references), true)
        for first, references, true in drawn
    ]


class Lab:
    """Trains people one after the other with one config; compiles once for all of them."""

    def __init__(self, mini: measures.Mini, cfg: TrainConfig):
        cfg, self.enhancer = settle(cfg, mini.folder)
        self.mini, self.cfg = mini, cfg
        self.method = method_of(cfg, self.enhancer)
        placeholder = placeholder_of(cfg)
        tokenizer = mini.tokenizer.with_placeholder(placeholder.token, placeholder.n)
        self.frozen, self.start = mini.frozen, None
        self.base = results.Base(mini.model, mini.frozen, tokenizer, hub.MINI, None)
        if self.enhancer is None:
            names = known_names(mini.folder)
            ids = starting_ids(cfg, self.method, tokenizer, names)
            self.start = starting_tokens(cfg, self.method, self.base, ids)
        else:
            self.frozen = mini.frozen._replace(shared=shared.frozen_part(self.enhancer.shared))
        self.optimizer = optimizer_of(cfg, self.method) if cfg.max_train_steps else None
        needs_finder = self.method.uses_face or cfg.crop == "face"
        self.finder = mini.finder() if needs_finder else None

    def begin(self, photos: np.ndarray) -> tuple[IdentityState, Photos | None]:
        """Returns the state before the first step, and what is trained on, if there are steps.

        Args:
          photos: uint8[P, 64, 64, 3] of one person.
        """
        cfg, model, key = self.cfg, self.mini.model, jax.random.key(self.cfg.seed)
        pictures = [
            DrawnPicture(f"photo {number}", Image.fromarray(photo))
            for number, photo in enumerate(photos)
        ]
        sights = [self.finder.look_at(p.image, p.name) for p in pictures] if self.finder else []
        uses_face = self.method.uses_face
        face = embedding.mean_embedding(np.stack([s.embed for s in sights])) if uses_face else None
        trainable, given = first_values(model, self.method, key, self.enhancer, self.start, face)
        if not cfg.max_train_steps:
            return IdentityState(trainable, given, (), jnp.int32(0), None), None
        seen = Portraits(pictures, sights, face)
        moments = encode_pixels(self.base, training_pixels(cfg, seen, drawings.SIZE))
        return init_state(self.optimizer, trainable, given), moments

    def learn(
        self, photos: np.ndarray, steps: int | None = None
    ) -> tuple[IdentityState, list[float]]:
        """Returns the state after the config's steps, and the loss of every one.

        Args:
          photos: uint8[P, 64, 64, 3] of one person.
          steps: fewer than the config's.
        """
        state, moments = self.begin(photos)
        mini, cfg, key = self.mini, self.cfg, jax.random.key(self.cfg.seed)
        program = Program(mini.model, self.method, self.optimizer, cfg.train_batch_size)
        losses = []
        for number in range(1, 1 + (cfg.max_train_steps if steps is None else steps)):
            state, metrics = _step(program, self.frozen, state, moments, key)
            losses.append(metrics.loss)
            if group.is_evaluated(cfg, number):
                state = _check_plateau(mini.model, self.method, self.frozen, state, moments, key)
                if group.has_plateau(cfg, state):
                    break
        return jax.block_until_ready(state), [float(loss) for loss in losses]

    def draw(
        self,
        state: IdentityState,
        prompts: Sequence[str],
        count: int,
        strength: float = 1.0,
        seed: int = 0,
        sampling: programs.Sampling | None = None,
    ) -> np.ndarray:
        """Draws prompts with `{}` for the person, all of them in one call: uint8[prompts, count,
        64, 64, 3].

        Args:
          strength: of adapter and K/V delta; 0 draws with the tokens alone, as other programs do.
          sampling: as of `draw_together`.
        """
        mini, tokenizer = self.mini, self.base.tokenizer
        filled = [text.fill(prompt, tokenizer.placeholder) for prompt in prompts]
        empty, *ids = tokenizer(["", *filled])
        kv = _keys_values(
            mini.model,
            self.method,
            self.frozen,
            state.trainable,
            state.given,
            jnp.asarray(np.stack(ids)),
            jnp.asarray(empty),
            jnp.float32(strength),
        )
        drawn = draw_together(mini.model, mini.frozen, kv, jnp.uint32(seed), count, sampling)
        return to_uint8(np.asarray(drawn))


# Of several prompts, leaf by leaf as of one.
_keys_values = jax.jit(
    jax.vmap(programs.prompt_keys_values, in_axes=(None,) * 5 + (0, None, None)),
    static_argnums=(0, 1),
)


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def draw_together(
    model: sd.StableDiffusion,
    frozen: sd.Frozen,
    kv: dict,
    seed: jax.Array,
    count: int,
    sampling: programs.Sampling | None = None,
) -> jax.Array:
    """Pictures of several prompts, float32[prompts, count, 64, 64, 3]; together the rows cost a CPU
    a third of one by one.

    Args:
      kv: leaves [prompts, 2, T, inner]; row 0 is unguided.
      sampling: how; None for DDIM and `measures.STEPS` steps.
    """
    how = sampling or programs.Sampling((drawings.SIZE,) * 2, "ddim", measures.STEPS)

    def one(kv):
        return programs.draw(
            model,
            frozen,
            kv,
            seed,
            jnp.arange(count, dtype=jnp.int32),
            jnp.float32(measures.GUIDANCE),
            how,
        )

    return jax.vmap(one)(kv)


def judge_pictures(
    mini: measures.Mini,
    scoring: face_models.Recogniser,
    person: Acquaintance,
    pictures: np.ndarray,
    prompts: Sequence[captions.Prompt] = captions.PROMPTS,
) -> tuple[float, float]:
    """Returns similarity to a person, and the share of what the prompts asked for.

    Args:
      pictures: uint8[prompts, pictures, 64, 64, 3], in the order of `prompts`.
    """
    flat = pictures.reshape(-1, *pictures.shape[2:])
    similarity = measures.embed(scoring, flat) @ person.references.T
    seen = measures.read_scenes(mini.folder, flat)
    each, kept = pictures.shape[1], []
    for number, prompt in enumerate(prompts):
        part = {
            field: values[number * each : (number + 1) * each] for field, values in seen.items()
        }
        kept += [hits.mean() for hits in measures.kept(prompt.asks, part).values()]
    return float(similarity.mean()), float(np.mean(kept))


class Protocol(NamedTuple):
    """How people are measured.

    Attributes:
      split, people: who; photos: of each, to learn from.
      pictures: drawn for each prompt.
      strength: of adapter and K/V delta; 0 draws with the tokens alone.
      seed: of people's drawings and of the pictures.
    """

    split: str = "test"
    people: int = 20
    photos: int = 1
    pictures: int = 2
    strength: float = 1.0
    seed: int = 0


def experiment(
    mini: measures.Mini,
    configs: dict[str, TrainConfig],
    protocol: Protocol,
    progress: Callable = iter,
) -> dict[str, list[Score]]:
    """Returns the scores of every person: of each config, of the floor and of the ceiling.

    The floor are true drawings of the one before, the ceiling those of the person: both as the
    prompts ask.

    Raises:
      FaceError: a config needs faces, and on some photos none is found; nothing is trained then.
    """
    split, count, photos, pictures, strength, seed = protocol
    met = meet(mini, split, range(count), pictures, seed, photos=photos)
    if any(method_of(cfg).uses_face for cfg in configs.values()):
        check_faces(mini, met)
    scoring = mini.scoring()
    scores: dict[str, list[Score]] = {}
    for i, person in enumerate(met):
        for name, other in (("another person", met[i - 1]), ("true drawings", person)):
            result = judge_pictures(mini, scoring, person, other.true)
            scores.setdefault(name, []).append(Score(*result))
    for name, cfg in configs.items():
        learner = Lab(mini, cfg)
        learner.learn(met[0].photos, min(1, learner.cfg.max_train_steps))  # compiles
        for person in progress(met):
            started = time.perf_counter()
            state, losses = learner.learn(person.photos)
            seconds = time.perf_counter() - started
            texts = [prompt.text for prompt in captions.PROMPTS]
            drawn = learner.draw(state, texts, pictures, strength, seed)
            result = judge_pictures(mini, scoring, person, drawn)
            scores.setdefault(name, []).append(Score(*result, seconds, len(losses)))
    return scores


def check_faces(mini: measures.Mini, met: Sequence[Acquaintance]) -> None:
    """Raises FaceError, with people's numbers, unless a face is found on each of their photos."""
    finder = mini.finder()
    found = np.array([measures.look(finder, person.photos)[0].all() for person in met])
    if not found.all():
        numbers = ", ".join(map(str, np.flatnonzero(~found)))
        raise face_models.FaceError(
            f"no face is found on the photos of {(~found).sum()} of {len(met)} people (counted "
            f"from 0: {numbers}); take another --seed, fewer --people, or --profiles cross_init "
            "textual_inversion, which need no face"
        )


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Returns the 95% bootstrap interval of the mean of values, one per person."""
    values = np.asarray(values)
    rng = np.random.default_rng([seed, *b"bootstrap"])
    means = values[rng.integers(0, len(values), (DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def write_scores(path: Path, scores: Mapping[str, Sequence[Score]]) -> None:
    """Writes the scores of every person as JSON.

    Raises:
      OSError: it cannot be written.
    """
    values = {name: [score._asdict() for score in each] for name, each in scores.items()}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values) + "\n")


def markdown(scores: dict[str, list[Score]]) -> str:
    """Returns a table of means with 95% intervals; `closed` is the way from floor to ceiling."""
    lines = [
        "| | ID similarity | worst | closed | prompt kept | seconds | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    floor, ceiling = (
        np.mean([s.similarity for s in scores[name]])
        for name in ("another person", "true drawings")
    )
    for name, each in scores.items():
        similarity, prompt = [s.similarity for s in each], [s.prompt for s in each]
        (low, high), (least, most) = interval(similarity), interval(prompt)
        closed = (np.mean(similarity) - floor) / (ceiling - floor)
        seconds, steps = np.median([s.seconds for s in each]), np.mean([s.steps for s in each])
        lines.append(
            f"| {name} | {np.mean(similarity):.3f} ({low:.3f} to {high:.3f}) | "
            f"{min(similarity):.3f} | {closed:.0%} | "
            f"{np.mean(prompt):.1%} ({least:.1%} to {most:.1%}) | "
            f"{f'{seconds:.1f}' if seconds else ''} | {f'{steps:.0f}' if steps else ''} |"
        )
    return "\n".join(lines)


def differences(scores: dict[str, list[Score]]) -> str:
    """Returns what each config is ahead of the later ones on the same people, with 95% intervals:
    a table, or nothing where there is one config."""
    names = [name for name in scores if name not in ("another person", "true drawings")]
    lines = ["| | ID similarity | prompt kept |", "|---|---|---|"]
    for place, name in enumerate(names):
        for other in names[place + 1 :]:
            cells = []
            for field, form in (("similarity", "+.3f"), ("prompt", "+.1%")):
                apart = [
                    getattr(a, field) - getattr(b, field)
                    for a, b in zip(scores[name], scores[other], strict=True)
                ]
                low, high = interval(apart)
                cells.append(f"{np.mean(apart):{form}} ({low:{form}} to {high:{form}})")
            lines.append(f"| {name} - {other} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(names) > 1 else ""


def swept(
    profiles: Sequence[str], overrides: dict, sweep: tuple[str, list] | None
) -> dict[str, TrainConfig]:
    """Returns the configs of an experiment by what the table calls them.

    Args:
      sweep: a setting and the values that it takes, one after the other.
    """
    if sweep is None:
        return {profile: read_config(profile, overrides) for profile in profiles}
    key, values = sweep
    return {
        f"{profile}, {key} {value}": read_config(profile, overrides | {key: value})
        for profile in profiles
        for value in values
    }


def read_config(profile: str, overrides: dict) -> TrainConfig:
    """Reads configs/mini_PROFILE.yaml with some settings replaced."""
    path, photos = CONFIGS / f"mini_{profile}.yaml", {"train_data_dir": "."}
    values = reading.read_yaml(str(path))
    # Names and types are looked at in what a file says, so once as if the file said them.
    reading.build(TrainConfig, values | overrides, photos, source=f"{path} or --set")
    return reading.build(TrainConfig, values, photos | overrides)
