"""Sets of drawings for training and measuring, kept on disk in parts so that a run can go on."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.data.images import to_uint8
from idea_jax.files import atomic_write
from idea_jax.mini import captions, people, world
from idea_jax.mini.traits import Identity, Scene, random_scene
from idea_jax.pytrees import stream

SIZE = 64
PART = 2048  # drawings a file
LISTED = 0.5  # share of the drawings of one person that show somebody of the names file
ALTERED = ("background", "shirt", "hat", "hat_colour", "expression", "style")  # by `say_both`


class Drawings(NamedTuple):
    """Drawings of named people. Where nobody stands on the right, their names are -1."""

    images: np.ndarray  # uint8[N, 64, 64, 3]
    names: np.ndarray  # int32[N, 2, 2]: (left, right), (first, last)
    scenes: Scene  # int32[N, 2] leaves: (left, right)


class Portraits(NamedTuple):
    """Drawings of one person each."""

    images: np.ndarray  # uint8[N, 64, 64, 3]
    who: np.ndarray  # int32[N]: number of the person
    scenes: Scene  # int32[N] leaves
    points: np.ndarray  # float32[N, 5, 2]: world.landmarks


@partial(jax.jit, static_argnames="size")
def draw_each(who: Identity, scenes: Scene, keys: jax.Array, size: int = SIZE) -> jax.Array:
    """Returns float32[B, size, size, 3]: one after the other, which is faster on a CPU."""
    return jax.lax.map(lambda args: world.draw(*args, size=size), (who, scenes, keys))


@jax.jit
def _draw_pairs(left, right, left_scenes, right_scenes, keys):
    args = (left, right, left_scenes, right_scenes, keys)
    return jax.lax.map(lambda each: world.draw_pair(*each, size=SIZE), args)


def draw(who: Identity, scenes: Scene, keys: jax.Array, size: int = SIZE) -> np.ndarray:
    """Returns uint8[B, size, size, 3] of leaves [B]; compiles for one batch size only."""
    count, batch = len(who.skin), 64
    images = []
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        args = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (who, scenes, keys))
        images.append(to_uint8(np.asarray(draw_each(*args, size=size))))
    return np.concatenate(images)[:count]


def random_scenes(key: jax.Array, shape: tuple[int, ...]) -> Scene:
    """Returns scenes drawn from the distribution of all scenes: int32 leaves of this shape."""
    keys = jax.random.split(key, int(np.prod(shape)))
    scenes = jax.jit(jax.vmap(random_scene))(keys)
    return Scene(*(np.array(leaf).reshape(shape) for leaf in scenes))


def portraits(
    who: Identity, each: int, key: jax.Array, folder: Path | None = None, progress: Callable = iter
) -> Portraits:
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
    # The same key on purpose, as it is the same pose.
    points = jax.jit(jax.vmap(world.landmarks))(everybody, scenes, jax.random.clone(keys))
    images = _parts(part, count, folder, progress)
    return Portraits(images, person, scenes, np.asarray(points))


def pairs(who: Identity, count: int, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
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
    images, batch = [], 64
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        args = (left, right, left_scenes, right_scenes, keys)
        drawn = _draw_pairs(*jax.tree.map(lambda leaf, rows=rows: leaf[rows], args))
        images.append(to_uint8(np.asarray(drawn)))
    points = jax.jit(jax.vmap(world.landmarks_of_pair))(
        left, right, left_scenes, right_scenes, jax.random.clone(keys)
    )
    return np.concatenate(images)[:count], np.asarray(points)


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
        for start in range(0, len(double), 64):
            full = double[np.minimum(np.arange(start, start + 64), len(double) - 1)]
            (left, left_scene), (right, right_scene) = of(0, full), of(1, full)
            both = _draw_pairs(left, right, left_scene, right_scene, keys[full])
            images.append(to_uint8(np.asarray(both))[: len(double) - start])
        return np.concatenate(images)

    return Drawings(_parts(part, count, folder, progress), names, scenes)


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
    return _said(rng, set_, row, lambda kinds: kinds)


def say_both(seed: Sequence[int], set_: Drawings, row: int) -> tuple[str, str]:
    """Returns a caption of one drawing, and the same words with one thing of the (left) scene
    replaced by another of its kind; twice the same if the caption mentions nothing."""
    true = say(np.random.default_rng(seed), set_, row)
    rng = np.random.default_rng([*seed, 1])
    for field in rng.permutation(ALTERED):

        def altered(kinds, field=field):
            if "hat" in field and kinds["hat"] == "none":
                return kinds  # there is no word to replace
            others = [k for k in captions.KINDS[field] if k not in (kinds[field], "none")]
            return kinds | {field: str(rng.choice(others))}

        if (wrong := _said(np.random.default_rng(seed), set_, row, altered)) != true:
            return true, wrong
    return true, true


def _said(rng, set_, row, alter):
    left, right = (
        captions.scene_words(Scene(*(leaf[row, side] for leaf in set_.scenes))) for side in (0, 1)
    )
    names = [people.full_name(*pair) for pair in set_.names[row] if pair[0] >= 0]
    if len(names) == 1:
        return captions.caption(rng, alter(left), names[0])
    return captions.pair_caption(rng, (alter(left), right), tuple(names))


def to_float(images: np.ndarray | jax.Array) -> jax.Array:
    """Returns float32 in [-1, 1] of uint8 pictures."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1
