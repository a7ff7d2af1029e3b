"""Sets of drawings for training and measuring, kept on disk in parts so that a run can go on."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.data.images import to_uint8
from idea_jax.mini import captions, people, world
from idea_jax.mini.traits import Scene, Traits, random_scene
from idea_jax.pytrees import stream
from idea_jax.runtime.files import atomic_write

SIZE = 64
PART = 2048  # drawings a file
# How many are drawn by one call of the device: one after the other, or all at once.
BATCH, BATCH_AT_ONCE = 64, 512
LISTED = 0.25  # share of the drawings of one person that show somebody of the names file
ALTERED = ("background", "shirt", "hat", "hat_colour", "expression", "style")  # by `say_both`


class Drawings(NamedTuple):
    """Drawings of named people. Where nobody stands on the right, their names are -1."""

    images: np.ndarray  # uint8[N, 64, 64, 3]
    names: np.ndarray  # int32[N, 2, 2]: (left, right), (first, last)
    scenes: Scene  # int32[N, 2] leaves: (left, right)


class DrawnPortraits(NamedTuple):
    """Drawings of one person each."""

    images: np.ndarray  # uint8[N, 64, 64, 3]
    who: np.ndarray  # int32[N]: number of the person
    scenes: Scene  # int32[N] leaves
    points: np.ndarray  # float32[N, 5, 2]: world.landmarks


def at_once() -> bool:
    """Whether pictures of a batch are drawn together: one by one is faster on a CPU, where all that
    a picture is made of stays in the cache, and leaves any other device idle."""
    return jax.default_backend() != "cpu"


def _mapped(draw_one: Callable, args: tuple, together: bool) -> jax.Array:
    if together:
        return jax.vmap(draw_one)(*args)
    return jax.lax.map(lambda each: draw_one(*each), args)


@partial(jax.jit, static_argnames=("size", "together"))
def _draw_each(who, scenes, keys, size, together):
    return _mapped(partial(world.draw, size=size), (who, scenes, keys), together)


@partial(jax.jit, static_argnames="together")
def _draw_pairs(left, right, left_scenes, right_scenes, keys, together):
    args = (left, right, left_scenes, right_scenes, keys)
    return _mapped(partial(world.draw_pair, size=SIZE), args, together)


def _in_batches(draw_batch: Callable, args: tuple) -> np.ndarray:
    """Returns uint8[B, size, size, 3] of leaves [B]; compiles for one batch size only."""
    together = at_once()
    count, batch = len(args[-1]), BATCH_AT_ONCE if together else BATCH
    images = []
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        some = jax.tree.map(lambda leaf, rows=rows: leaf[rows], args)
        images.append(to_uint8(np.asarray(draw_batch(*some, together=together))))
    return np.concatenate(images)[:count]


def draw(who: Traits, scenes: Scene, keys: jax.Array, size: int = SIZE) -> np.ndarray:
    """Returns uint8[B, size, size, 3] of leaves [B]: `world.draw` of each."""
    return _in_batches(partial(_draw_each, size=size), (who, scenes, keys))


def draw_pairs(
    left: Traits, right: Traits, left_scenes: Scene, right_scenes: Scene, keys: jax.Array
) -> np.ndarray:
    """Returns uint8[B, 64, 64, 3] of leaves [B]: `world.draw_pair` of each."""
    return _in_batches(_draw_pairs, (left, right, left_scenes, right_scenes, keys))


def random_scenes(key: jax.Array, shape: tuple[int, ...]) -> Scene:
    """Returns scenes drawn from the distribution of all scenes: int32 leaves of this shape."""
    keys = jax.random.split(key, int(np.prod(shape)))
    scenes = jax.jit(jax.vmap(random_scene))(keys)
    return Scene(*(np.array(leaf).reshape(shape) for leaf in scenes))


def portraits(
    who: Traits, each: int, key: jax.Array, folder: Path | None = None, progress: Callable = iter
) -> DrawnPortraits:
    """Returns `each` drawings of every person, in random scenes, ordered by person.

    Args:
      who: leaves [P].
      folder: where parts are kept; None keeps nothing.
      progress: wraps the iteration over parts.
    """
    count = each * len(who.skin)
    person = np.repeat(np.arange(len(who.skin), dtype=np.int32), each)
    scenes = random_scenes(stream(key, "scenes"), (count,))
    keys = jax.random.split(stream(key, "drawings"), count)

    def part(rows):
        them = jax.tree.map(lambda leaf: leaf[person[rows]], who)
        return draw(them, jax.tree.map(lambda leaf: leaf[rows], scenes), keys[rows])

    everybody = jax.tree.map(lambda leaf: leaf[person], who)
    images = _parts(part, count, folder, progress)
    return DrawnPortraits(images, person, scenes, points(everybody, scenes, keys))


def points(who: Traits, scenes: Scene, keys: jax.Array) -> np.ndarray:
    """Returns where the faces are on the drawings of these keys: float32[B, 5, 2], as
    `world.landmarks`, of leaves [B]."""
    # The same keys on purpose, as they are the same poses.
    return np.asarray(_landmarks(who, scenes, jax.random.clone(keys)))


_landmarks = jax.jit(jax.vmap(world.landmarks))


def pairs(who: Traits, count: int, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns `count` drawings of two people each, and where their faces are.

    Args:
      who: leaves [P].

    Returns: uint8[count, 64, 64, 3], float32[count, 2, 5, 2] as `world.landmarks_of_pair`.
    """
    numbers = np.array(jax.random.randint(stream(key, "who"), (count, 2), 0, len(who.skin)))
    scenes = random_scenes(stream(key, "scenes"), (count, 2))
    keys = jax.random.split(stream(key, "drawings"), count)

    def of(side):
        return (
            jax.tree.map(lambda leaf: leaf[numbers[:, side]], who),
            jax.tree.map(lambda leaf: leaf[:, side], scenes),
        )

    (left, left_scenes), (right, right_scenes) = of(0), of(1)
    images = draw_pairs(left, right, left_scenes, right_scenes, keys)
    points = jax.jit(jax.vmap(world.landmarks_of_pair))(
        left, right, left_scenes, right_scenes, jax.random.clone(keys)
    )
    return images, np.asarray(points)


def drawings(
    count: int, pairs: float, key: jax.Array, folder: Path | None = None, progress: Callable = iter
) -> Drawings:
    """Returns `count` drawings of named people, the last of them (a share `pairs`) of two people.

    The first ones (a share LISTED of those of one person) show people of the names file, who are
    as a real model's celebrities: seen again and again. For the others, and for two people, any
    first name goes with any last name, so that what is learned is a space of people.
    """
    names = np.array(jax.random.randint(stream(key, "names"), (count, 2, 2), 0, people.NAMES))
    alone = count - round(count * pairs)
    names[:alone, 1] = -1
    listed = round(alone * LISTED)
    names[:listed, 0, 1] = names[:listed, 0, 0]
    scenes = random_scenes(stream(key, "scenes"), (count, 2))
    keys = jax.random.split(stream(key, "drawings"), count)

    def part(rows):
        def of(side, rows):
            who = people.named(names[rows, side, 0], names[rows, side, 1])
            return who, jax.tree.map(lambda leaf: leaf[rows, side], scenes)

        single, double = rows[rows < alone], rows[rows >= alone]
        images = [draw(*of(0, single), keys[single])] if len(single) else []
        if len(double):
            (left, left_scenes), (right, right_scenes) = of(0, double), of(1, double)
            images.append(draw_pairs(left, right, left_scenes, right_scenes, keys[double]))
        return np.concatenate(images)

    return Drawings(_parts(part, count, folder, progress), names, scenes)


def listed(set_: Drawings) -> np.ndarray:
    """Returns bool[N]: which drawings show one person, and somebody of the names file."""
    return (set_.names[:, 0, 0] == set_.names[:, 0, 1]) & (set_.names[:, 1, 0] < 0)


def _parts(draw_rows: Callable, count: int, folder: Path | None, progress: Callable) -> np.ndarray:
    """Returns uint8[count, ...], part by part from `folder` where a part is there already."""
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for start in progress(range(0, count, PART)):
        rows = np.arange(start, min(start + PART, count))
        path = folder / f"{start:08d}.npy" if folder else None
        if path is not None and path.is_file():
            images[rows] = np.load(path)
            continue
        images[rows] = draw_rows(rows)
        if path is not None:
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                np.save(file, images[rows])
    return images


def say(rng: np.random.Generator, set_: Drawings, row: int) -> str:
    """Returns one caption of one drawing."""
    return _said(rng, *_described(set_, row))


def say_both(seed: Sequence[int], set_: Drawings, row: int) -> tuple[str, str]:
    """Returns a caption of one drawing, and the same words with one thing of the (left) scene
    replaced by another of its kind; twice the same if the caption mentions nothing."""
    (left, right), names = _described(set_, row)
    true = _said(np.random.default_rng(seed), (left, right), names)
    rng = np.random.default_rng([*seed, 1])
    for field in rng.permutation(ALTERED):
        if "hat" in field and left["hat"] == "none":
            continue  # there is no word to replace
        others = [k for k in captions.KINDS[field] if k not in (left[field], "none")]
        altered = left | {field: captions.one_of(rng, others)}
        if (wrong := _said(np.random.default_rng(seed), (altered, right), names)) != true:
            return true, wrong
    return true, true


def _described(set_, row):
    """Returns the words of both scenes, and the one name or two."""
    scenes = [
        captions.scene_words(Scene(*(leaf[row, side] for leaf in set_.scenes))) for side in (0, 1)
    ]
    return scenes, tuple(people.full_name(*pair) for pair in set_.names[row] if pair[0] >= 0)


def _said(rng, scenes, names):
    if len(names) == 1:
        return captions.caption(rng, scenes[0], *names)
    return captions.pair_caption(rng, tuple(scenes), names)


def to_float(images: np.ndarray | jax.Array) -> jax.Array:
    """Returns float32 in [-1, 1] of uint8 pictures."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1
