"""How good a mini is: a table of measurements on drawings and people that it was not trained on.

The library of `python -m idea_jax.mini.quality`, and what other measurements share with it.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from idea_jax.data.images import to_uint8
from idea_jax.data.tokenizer import Tokenizer, load_tokenizer
from idea_jax.faces import embedding, finding
from idea_jax.faces import models as face_models
from idea_jax.faces.crops import face_crop
from idea_jax.mini import captions, composites, drawings, networks, people, traits
from idea_jax.models import hub, sd
from idea_jax.models.unet import project_kv
from idea_jax.pytrees import stream
from idea_jax.sampling import programs

STEPS, GUIDANCE = 50, 3.0
REPORTED = ("shirt", "background", "hat", "hat_colour", "expression", "style")


class Row(NamedTuple):
    """One line of the table; `value`, `ceiling` and `must` are as the unit says."""

    name: str
    value: float
    ceiling: float | None
    must: float
    unit: str
    at_most: bool = False

    def missed(self) -> bool:
        # What is not a number has missed.
        return not (self.value <= self.must if self.at_most else self.value >= self.must)


@dataclass(frozen=True)
class Mini:
    """A checkpoint with everything that is needed to judge what it draws."""

    model: sd.StableDiffusion
    frozen: sd.Frozen
    tokenizer: Tokenizer
    folder: Path

    def scoring(self) -> face_models.Recogniser:
        """The recogniser that scores whole pictures, and that personalisation never sees."""
        return face_models.load_recogniser(self.folder / "face" / "scoring.onnx")

    def finder(self) -> finding.Finder:
        """What personalisation sees of a picture: a face is found, aligned and embedded."""
        return finding.open_finder(self.folder / "face" / "recogniser.onnx")


def load(name_or_path: str = hub.MINI) -> Mini:
    """Loads the shipped mini, or one from a folder that `pretrain` wrote."""
    folder = hub.resolve(name_or_path).folder
    model, frozen = sd.load(folder)
    tokenizer = load_tokenizer(
        folder / "tokenizer", model.text.vocab_size, model.text.max_position_embeddings
    )
    return Mini(model, frozen, tokenizer, folder)


# Reading pictures


def embed(recogniser: face_models.Recogniser, images: np.ndarray) -> np.ndarray:
    """Returns float32[N, 512] of unit norm for pictures uint8[N, H, W, 3] with one face each."""
    crops = [face_crop(Image.fromarray(image), pre_aligned=False) for image in images]
    return embedding.embed_faces(recogniser, crops)


def look(finder: finding.Finder, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns on which pictures uint8[N, H, W, 3] a face is found, bool[N], and float32[M, 512]:
    the embeddings of these, of unit norm."""
    found, embeds = np.zeros(len(images), bool), [np.zeros((0, face_models.WIDTH), np.float32)]
    for number, image in enumerate(images):
        with contextlib.suppress(face_models.FaceError):
            embeds.append(finder.look_at(Image.fromarray(image), f"picture {number}").embed[None])
            found[number] = True
    return found, np.concatenate(embeds)


def read_scenes(folder: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what the judge sees in pictures uint8[N, 64, 64, 3]: int[N] for each field."""
    net, params = networks.load(folder / "judge" / "model.safetensors")
    edges = np.cumsum([len(kinds) for kinds in captions.KINDS.values()])[:-1]
    found = []
    for start in range(0, len(images), 64):
        rows = np.minimum(np.arange(start, start + 64), len(images) - 1)
        logits = np.asarray(_judge(net, params, drawings.to_float(images[rows])))
        found.append(np.stack([p.argmax(-1) for p in np.split(logits, edges, axis=-1)]))
    columns = np.concatenate(found, axis=1)[:, : len(images)]
    return dict(zip(captions.KINDS, columns, strict=True))


# One program for all calls: a judge is looked through for each person.
_judge = jax.jit(lambda net, params, x: net.apply({"params": params}, x), static_argnums=0)


def kept(asks: Mapping[str, str], seen: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns bool[N] for each thing that a prompt asks for: whether the pictures show it."""
    return {field: seen[field] == captions.KINDS[field].index(kind) for field, kind in asks.items()}


# Drawing


def draw(
    mini: Mini,
    prompt: str,
    count: int,
    *,
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = 16,
) -> np.ndarray:
    """Draws a prompt without a person of the user's: uint8[count, 64, 64, 3]."""
    side = drawings.SIZE
    return programs.draw_prompt(
        mini.model,
        mini.frozen,
        plain_keys_values(mini, prompt),
        programs.Sampling((side, side), "ddim", steps),
        seed=seed,
        count=count,
        batch_size=batch_size,
        guidance_scale=guidance,
    )


def plain_keys_values(mini: Mini, prompt: str) -> dict:
    """Keys and values of the empty prompt and of this one: leaves [2, T, inner]."""
    ids = mini.tokenizer(["", prompt])
    encoded = _encode(mini.model, mini.frozen, ids)
    return project_kv(mini.frozen.cross_kv, encoded, mini.model.dtype)


_encode = jax.jit(sd.encode_text, static_argnums=0)


# Measuring


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns float[N] in dB of pictures uint8[N, ...], for the full range of 255."""
    error = np.square(images.astype(np.float64) - others).mean(axis=(1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1e-9))


def reconstruct(mini: Mini, images: np.ndarray) -> np.ndarray:
    """Returns the autoencoder's version of pictures uint8[N, 64, 64, 3], from the mean latents."""
    batches = []
    for start in range(0, len(images), 32):
        rows = np.minimum(np.arange(start, start + 32), len(images) - 1)
        drawn = _reconstruct(mini.model, mini.frozen, drawings.to_float(images[rows]))
        batches.append(to_uint8(np.asarray(drawn)))
    return np.concatenate(batches)[: len(images)]


def _both(model, frozen, images):
    return sd.decode(model, frozen, sd.encode_image(model, frozen, images)[0])


_reconstruct = jax.jit(_both, static_argnums=0)


def auc(same: np.ndarray, different: np.ndarray) -> float:
    """Returns the chance that a same-person similarity is above a different-person one."""
    values = np.concatenate([same, different])
    order = values.argsort(kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(1, len(values) + 1)
    # Equal values share the mean of their ranks.
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.bincount(inverse, ranks) / counts)[inverse]
    wins = ranks[: len(same)].sum() - len(same) * (len(same) + 1) / 2
    return float(wins / (len(same) * len(different)))


def verification(
    embeds: np.ndarray, who: np.ndarray, pairs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the similarities of `pairs` // 2 random pairs of the same person, and of others."""
    half, count = pairs // 2, len(who)
    same: list[tuple] = []
    different: list[tuple] = []
    while min(len(same), len(different)) < half:
        one, other = rng.integers(0, count, 2)
        if who[one] != who[other]:
            different.append((one, other))
        partner = rng.choice(np.flatnonzero(who == who[one]))
        if partner != one:
            same.append((one, partner))

    def similarity(rows):
        left, right = np.array(rows[:half]).T
        return np.sum(embeds[left] * embeds[right], axis=1)

    return similarity(same), similarity(different)


class Detection(NamedTuple):
    """What a detector did on pictures, face by face."""

    faces: int  # that are there to be found
    right: int  # that were found
    wrong: int  # findings that are none
    points: list[float]  # of each right one: mean distance of the points, in distances of the eyes


def detect(detector: face_models.Detector, pictures: Sequence[composites.Composite]) -> Detection:
    """Runs a detector as training does at first.

    A finding belongs to the face whose crop's middle is nearest, if that is less than half the
    crop's side away. What stands for a face that may be found or not is left out.
    """
    count = wrong = 0
    off = []
    for picture in pictures:
        there = picture.points[picture.state != composites.NONE]
        sure = picture.state[picture.state != composites.NONE] == composites.WHOLE
        centre, side = composites.crop_square(there.astype(float))
        taken = np.zeros(len(there), bool)
        count += int(sure.sum())
        for face in finding.detect(detector, Image.fromarray(picture.image)):
            middle, _ = composites.crop_square(face.points.astype(float))
            apart = np.linalg.norm(centre - middle, axis=-1) / side
            if not len(there) or apart.min() > 0.5 or taken[apart.argmin()]:
                wrong += 1
                continue
            nearest = int(apart.argmin())
            taken[nearest] = True
            if sure[nearest]:
                five = there[nearest].astype(float)
                across = np.linalg.norm(five[1] - five[0])
                off.append(float(np.linalg.norm(face.points - five, axis=-1).mean() / across))
    return Detection(count, len(off), wrong, off)


def composed_pictures(
    set_: drawings.DrawnPortraits, who: traits.Traits, count: int, key: jax.Array
) -> list[composites.Composite]:
    """Returns pictures as the detector learned from them, of these people and their drawings."""
    alone = composites.Drawn(set_.images, set_.points[:, None])
    pairs = composites.Drawn(*drawings.pairs(who, max(1, count // 8), key))
    rng = np.random.default_rng(np.asarray(jax.random.key_data(jax.random.fold_in(key, 1))))
    return [composites.compose(rng, alone, pairs) for _ in range(count)]


def gallery(
    recogniser: face_models.Recogniser, count: int, each: int, key: jax.Array
) -> np.ndarray:
    """Returns float32[count, 512]: the mean embedding of true drawings of the named people."""
    who = people.named(np.arange(count), np.arange(count))
    set_ = drawings.portraits(who, each, key)
    embeds = embed(recogniser, set_.images).reshape(count, each, -1)
    return np.stack([embedding.mean_embedding(them) for them in embeds])


def detection(
    detector: face_models.Detector, pictures: Sequence[composites.Composite]
) -> list[Row]:
    """Returns how well the faces on larger pictures are found."""
    done = detect(detector, pictures)
    found, wrong = done.right / done.faces, done.wrong / (done.right + done.wrong)
    off, what = float(np.mean(done.points)), "points of a face, off by (eyes' distance)"
    return [
        Row("faces on larger pictures, found", 100 * found, None, 97.0, "%"),
        Row("findings that are none", 100 * wrong, None, 3.0, "%", True),
        Row(what, 100 * off, None, 15.0, "%", True),
    ]


def found_by_name(
    mini: Mini,
    scoring: face_models.Recogniser,
    known: np.ndarray,
    chosen: np.ndarray,
    starts: Sequence[int],
    each: int,
) -> float:
    """Returns the share of pictures of named people that are most like the person of that name.

    Args:
      known: as of `gallery`.
      chosen: int[P], numbers of people, with a seed for each in `starts`.
      each: pictures of a person.
    """
    drawn = np.concatenate(
        [
            draw(mini, f"a photo of {people.full_name(i, i)}", each, seed=start, batch_size=each)
            for i, start in zip(chosen, starts, strict=True)
        ]
    )
    found = (embed(scoring, drawn) @ known.T).argmax(axis=1)
    return float(np.mean(found == np.repeat(chosen, each)))


def as_prompted(
    mini: Mini,
    held_out: drawings.DrawnPortraits,
    chosen: np.ndarray,
    starts: Sequence[int],
    each: int,
) -> list[Row]:
    """Returns how often the pictures show what their prompts ask for, a row for each thing.

    The ceiling is how often the judge reads it off true drawings. Arguments as in `found_by_name`.
    """
    hits: dict[str, list] = {}
    for number, person in enumerate(chosen):
        prompt = captions.PROMPTS[number % len(captions.PROMPTS)]
        name = people.full_name(person, person)
        pictures = draw(mini, prompt.text.format(name), each, seed=starts[number], batch_size=each)
        for field, is_kept in kept(prompt.asks, read_scenes(mini.folder, pictures)).items():
            hits.setdefault(field, []).extend(is_kept)
    seen, rows = read_scenes(mini.folder, held_out.images), []
    for field in REPORTED:
        right = seen[field] == getattr(held_out.scenes, field)
        if field == "hat_colour":
            right = right[held_out.scenes.hat > 0]
        value, ceiling = 100 * float(np.mean(hits[field])), 100 * float(right.mean())
        rows.append(Row(f"{field.replace('_', ' ')} as prompted", value, ceiling, 85.0, "%"))
    return rows


def table(
    mini: Mini,
    seed: int = 0,
    named: int = 400,
    *,
    unnamed: int = 500,
    pairs: int = 10_000,
    each: int = 4,
    composed: int = 1000,
) -> list[Row]:
    """Measures everything.

    Args:
      named: how many people the model draws, as a photo and in one of the prompts.
      unnamed: how many people are drawn for the autoencoder, the recognisers and the judge.
      pairs: of unnamed people, half of them the same person twice.
      each: drawings of a person: of the unnamed ones, of all names for the gallery, of the model.
      composed: larger pictures with people somewhere on them.
    """
    key = stream(jax.random.key(seed), "quality")
    rng = np.random.default_rng([seed, *b"quality"])
    rows = []

    # The autoencoder, on people whom nothing was trained on
    test = people.unnamed("test", unnamed)
    held_out = drawings.portraits(test, each, stream(key, "held out"))
    some = held_out.images[:: max(1, len(held_out.images) // 512)][:512]
    values = psnr(some, reconstruct(mini, some))
    rows.append(Row("autoencoder, PSNR", float(values.mean()), None, 27.0, "dB"))

    # The detector, and both recognisers, on the same people
    scoring, finder = mini.scoring(), mini.finder()
    larger = composed_pictures(held_out, test, composed, stream(key, "larger pictures"))
    rows += detection(finder.detector, larger)
    found, seen = look(finder, held_out.images)
    rows.append(Row("drawings with a face found", 100 * float(found.mean()), None, 99.0, "%"))
    each_one = {
        "recogniser": (seen, held_out.who[found]),
        "scoring": (embed(scoring, held_out.images), held_out.who),
    }
    for name, (embeds, who) in each_one.items():
        value = auc(*verification(embeds, who, pairs, rng))
        rows.append(Row(f"face/{name}.onnx, AUC of {pairs:,} pairs", value, None, 0.99, ""))

    # Named people, found again among all names, and what prompts ask for, on the same people
    known = gallery(scoring, people.NAMES, each, stream(key, "gallery"))
    chosen = np.sort(rng.choice(people.NAMES, named, replace=False))
    true = drawings.portraits(people.named(chosen, chosen), each, stream(key, "true drawings"))
    photos = true.scenes.style == traits.STYLES.index("photo")
    found = (embed(scoring, true.images[photos]) @ known.T).argmax(axis=1)
    ceiling = 100 * float(np.mean(found == chosen[true.who[photos]]))
    # Noise of their own for everybody: few starts that all share say little about the others.
    starts = [(seed * people.NAMES + int(person)) % 2**32 for person in chosen]
    value = 100 * found_by_name(mini, scoring, known, chosen, starts, each)
    what = f"named people found first of {people.NAMES:,}"
    rows.append(Row(what, value, ceiling, 0.7 * ceiling, "%"))
    rows += as_prompted(mini, held_out, chosen, starts, each)

    draw(mini, "a photo", 16)
    started = time.perf_counter()
    draw(mini, "a photo", 16)
    rows.append(
        Row(f"16 pictures, {STEPS} DDIM steps", time.perf_counter() - started, None, 20, "s", True)
    )
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Returns the table as Markdown."""
    lines = ["| what | measured | true drawings | must |", "|---|---|---|---|"]
    for row in rows:
        sign = "≤" if row.at_most else "≥"
        digits = 4 if not row.unit else 1
        unit = f" {row.unit}" if row.unit else ""
        ceiling = "" if row.ceiling is None else f"{row.ceiling:.{digits}f}{unit}"
        must = f"{sign} {row.must:.{digits}f}{unit}"
        lines.append(f"| {row.name} | {row.value:.{digits}f}{unit} | {ceiling} | {must} |")
    return "\n".join(lines)
