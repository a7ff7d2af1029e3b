"""The mini's shared ID-Enhancer: the drawn world as a source of people, and its training.

The world knows where the eyes are, so faces are not looked for: a detector would take an hour for
what the recogniser does in minutes, and its points, at the second look, are hardly worse.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.enhancer import fit, sources
from idea_jax.enhancer.prepare import Studio, prepare
from idea_jax.enhancer.settings import EnhancerTrainConfig
from idea_jax.faces import embedding
from idea_jax.faces import models as face_models
from idea_jax.faces.crops import align
from idea_jax.faces.table import Sight
from idea_jax.formats import enhancer as files
from idea_jax.mini import captions, composites, drawings, measures, people, traits
from idea_jax.models import sd
from idea_jax.pytrees import stream
from idea_jax.runtime.files import atomic_write
from idea_jax.training.results import Base

SPLIT = "enhancer"
TEXTS = 3  # of a picture
BLOCK = 64  # people who are drawn together
# Deviation of a point from the true one, in sides of ArcFace's crop: that of the mini's detector on
# drawings of new people (root mean square).
POINTS_OFF = 0.02
SMALL = (36.0, 160.0)  # sides of the crop on the small and turned version, in pixels
LICENCE = "MIT: drawn by a program, all people are made up"


# What else than the defaults decides the training: of both stages, of the first, of the second.
SETTINGS: dict = {
    "ema_decay": 0.99,
    "small_faces": 0.2,
    "mean_faces": 0.2,
    "random_flip": False,  # a parting, the light and a turned head have a side
    "drop_adapter": 0.2,
}
FIRST: dict = {"start": "names", "learning_rate": 1.5e-3}
SECOND: dict = {
    "learning_rate": 5e-4,
    "warmup_steps": 10,
    "id_loss_weight": 1.0,
    "validation_guidance": measures.GUIDANCE,
}


class World(NamedTuple):
    """How many people of the drawn world there are, with how many pictures each."""

    people: int
    each: int
    seed: int = 0


def source(recogniser: face_models.Recogniser, world: World) -> sources.Source:
    """People of the drawn world as numbers, with their pictures, captions and faces.

    None of them is in another split of `mini.people`.

    Args:
      recogniser: the mini's own.
    """
    count, each, seed = world
    everybody = people.unnamed(SPLIT, count)
    key = stream(jax.random.key(seed), "drawings for the enhancer")
    total = count * each
    scenes = drawings.random_scenes(stream(key, "scenes"), (total,))
    keys = jax.random.split(stream(key, "drawings"), total)

    def of_block(first: int, last: int) -> Iterator[sources.NumberedPerson]:
        rows = np.arange(first * each, last * each)
        who = jax.tree.map(lambda leaf: leaf[rows // each], everybody)
        some = jax.tree.map(lambda leaf: leaf[rows], scenes)
        images = drawings.draw(who, some, keys[rows])
        points = drawings.points(who, some, keys[rows])
        for number in range(first, last):
            portraits, rejected = [], []
            for place in range(each):
                row = (number - first) * each + place
                rng = np.random.default_rng([seed, number, place, *b"enhancer"])
                words = captions.scene_words(traits.Scene(*(leaf[row] for leaf in some)))
                texts = tuple(captions.caption(rng, words, "{}") for _ in range(TEXTS))
                picture = sources.DrawnPicture(
                    f"person {number}, picture {place}", Image.fromarray(images[row])
                )
                try:
                    sight, turned = look(recogniser, rng, images[row], points[row])
                except face_models.FaceError as error:  # far to the side, and points that are off
                    rejected.append((picture, str(error)))
                    continue
                portraits.append(sources.Portrait(picture, texts, sight, turned))
            yield sources.NumberedPerson(number, portraits, rejected=rejected)

    def from_place(first: int) -> Iterator[sources.NumberedPerson]:
        for start in range(first, count, BLOCK):
            yield from of_block(start, min(start + BLOCK, count))

    facts = {"people": count, "each": each, "seed": seed, "texts": TEXTS}
    return sources.Source(
        "drawn world", LICENCE, count, from_place, facts, face_model=recogniser.sha256
    )


def look(
    recogniser: face_models.Recogniser,
    rng: np.random.Generator,
    image: np.ndarray,
    points: np.ndarray,
) -> tuple[Sight, np.ndarray]:
    """What is seen of the face on a drawing, and the embedding of a small or turned version of it.

    Args:
      image: uint8[64, 64, 3]; points: float32[5, 2].

    Raises:
      FaceError: the points no longer lie as on a face.
    """
    picture = Image.fromarray(image)
    _, side = composites.crop_square(points.astype(float))
    seen = (points + rng.normal(0, POINTS_OFF * side, points.shape)).astype(np.float32)
    crop = align(picture, seen)
    size = float(np.exp(rng.uniform(*np.log(SMALL))))
    angle = np.radians(rng.uniform(-composites.TURNED, composites.TURNED))
    larger, five = composites.turned(picture, points, size, angle)
    five = (five + rng.normal(0, POINTS_OFF * size, five.shape)).astype(np.float32)
    embed, turned = embedding.embed_faces(recogniser, [crop, align(larger, five)])
    box = np.concatenate([points.min(axis=0), points.max(axis=0)]).astype(np.float32)
    return Sight(box, seen, 1.0, "", embed), turned


class Schooling(NamedTuple):
    """Steps and samples of each, of the first stage and of the second: that of likeness."""

    steps: int
    size: int
    likeness_steps: int
    likeness_size: int


def train(folder: Path, work: Path, world: World, course: Schooling) -> dict:
    """Trains the shared ID-Enhancer of a mini and puts it into its folder; returns what its runs
    say of it. The same call goes on where it was interrupted.

    Args:
      folder: of the mini.
      work: where inputs and checkpoints are kept.
    """
    model, frozen = sd.load(folder)
    text = model.text
    tokenizer = load_tokenizer(folder / "tokenizer", text.vocab_size, text.max_position_embeddings)
    base = Base(model, frozen, tokenizer.with_placeholder(fit.PLACEHOLDER, 2), folder.name, None)
    recogniser = face_models.load_recogniser(folder / "face" / "recogniser.onnx")
    data = work / "enhancer-data"
    prepare(source(recogniser, world), data, Studio(base, None, drawings.SIZE, crop="none"))
    common = {"pretrained_model_name_or_path": str(folder), "data": [str(data)]}
    common |= {"seed": world.seed} | SETTINGS
    first, second = work / "enhancer", work / "enhancer-likeness"
    warmup = {"warmup_steps": min(100, course.steps // 4)}
    fitted = stage(common | FIRST | warmup, first, course.steps, course.size)
    further = {"init_enhancer": str(fitted), "save_dtype": "float16"}
    made = stage(common | SECOND | further, second, course.likeness_steps, course.likeness_size)
    target = folder / files.FILE
    target.parent.mkdir(exist_ok=True)
    with atomic_write(target) as path:
        shutil.copyfile(made, path)
    runs = [json.loads((out / "run.json").read_text(encoding="utf-8")) for out in (first, second)]
    return {"first": runs[0], "likeness": runs[1]}


def stage(settings: dict, out: Path, steps: int, size: int) -> Path:
    """Trains, or goes on with, one stage; returns the file."""
    cfg = EnhancerTrainConfig(
        output_dir=str(out),
        max_train_steps=steps,
        train_batch_size=size,
        validation_steps=0,
        checkpointing_steps=100,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        report_to="none",
        **settings,
    )
    (made,) = fit.run(cfg)
    return made
