"""The drawn world: a picture is a pure function of who, what a prompt asks for, and a random key.

`python -m idea_jax.mini.sheet` draws some of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.data.images import image_grid, to_uint8
from idea_jax.mini import face
from idea_jax.mini.traits import (
    Nuisance,
    Scene,
    Traits,
    random_identity,
    random_nuisance,
    random_scene,
)
from idea_jax.pytrees import stream


class View(NamedTuple):
    """Where the usual picture lies in a larger one, whose sides are 2 and whose middle is 0."""

    zoom: float = 1.0  # its size in that of the larger one
    angle: float = 0.0  # radians, clockwise
    x: float = 0.0  # of its middle
    y: float = 0.0


def draw(
    who: Traits, scene: Scene, key: jax.Array, size: int = 64, view: View | None = None
) -> jax.Array:
    """Returns a picture of one person: float32[size, size, 3] in [-1, 1].

    The key decides what no prompt can ask for: pose, place and light. `size` is static under jit.
    """
    return paint((who,), (scene,), (random_nuisance(key),), size, view)


def draw_pair(
    left: Traits,
    right: Traits,
    left_scene: Scene,
    right_scene: Scene,
    key: jax.Array,
    size: int = 64,
) -> jax.Array:
    """Returns a picture of two people side by side: float32[size, size, 3] in [-1, 1].

    Each wears what their scene says; background, style and light are those of the left scene, and
    neither framing counts.
    """
    nuisances = tuple(random_nuisance(jax.random.fold_in(key, i)) for i in range(2))
    return paint((left, right), (left_scene, right_scene), nuisances, size)


def landmarks(
    who: Traits, scene: Scene, key: jax.Array, size: int = 64, view: View | None = None
) -> jax.Array:
    """Returns ArcFace's five points of the person whom `draw` draws: float32[5, 2], (x, y).

    In pixels of the picture, whose middles have whole numbers, as in OpenCV; order and meaning as
    in `face.landmarks`. The brush strokes of a painting, up to 0.6% of the picture's side, are left
    out.
    """
    return locate((who,), (scene,), (random_nuisance(key),), size, view)[0]


def landmarks_of_pair(
    left: Traits,
    right: Traits,
    left_scene: Scene,
    right_scene: Scene,
    key: jax.Array,
    size: int = 64,
) -> jax.Array:
    """Returns float32[2, 5, 2], as `landmarks`, of the people whom `draw_pair` draws."""
    nuisances = tuple(random_nuisance(jax.random.fold_in(key, i)) for i in range(2))
    return locate((left, right), (left_scene, right_scene), nuisances, size)


@functools.partial(jax.jit, static_argnames="size")
def draw_many(who: Traits, scenes: Scene, keys: jax.Array, size: int = 64) -> jax.Array:
    """Returns float32[B, size, size, 3]: `draw` for leaves and keys with a leading axis B."""
    return jax.vmap(functools.partial(draw, size=size))(who, scenes, keys)


def paint(
    people: tuple[Traits, ...],
    scenes: tuple[Scene, ...],
    nuisances: tuple[Nuisance, ...],
    size: int,
    view: View | None = None,
) -> jax.Array:
    """Returns a picture of one person, or two side by side: float32[size, size, 3] in [-1, 1]."""
    scene, nuisance = scenes[0], nuisances[0]
    view = view or View()
    pixel = 2 / size
    places = (jnp.arange(size, dtype=jnp.float32) + 0.5) * pixel - 1
    x, y = jnp.meshgrid(places - view.x, places - view.y)
    cos, sin = jnp.cos(view.angle) / view.zoom, jnp.sin(view.angle) / view.zoom
    x, y, pixel = cos * x + sin * y, cos * y - sin * x, pixel / view.zoom
    warped_x, warped_y = _brushed(scene, x, y)
    layers = _background(scene, nuisance, x, y)
    for who, their_scene, theirs, place in zip(
        people, scenes, nuisances, _PLACES[len(people)], strict=True
    ):
        their_scene = their_scene._replace(style=scene.style)
        frame = _frame(who, their_scene, theirs, warped_x, warped_y, pixel, place)
        layers += face.person(who, their_scene, frame)
    channels = [jnp.zeros((size, size), jnp.float32)] * 3
    for opacity, colour in layers:
        channels = [c + opacity * (colour[i] - c) for i, c in enumerate(channels)]
    return 2 * _finish(jnp.stack(channels, -1), scene, nuisance, x, y, pixel) - 1


def locate(
    people: tuple[Traits, ...],
    scenes: tuple[Scene, ...],
    nuisances: tuple[Nuisance, ...],
    size: int,
    view: View | None = None,
) -> jax.Array:
    """Returns float32[people, 5, 2]: the landmarks of those whom `paint` paints."""
    view, each = view or View(), []
    for who, scene, nuisance, place in zip(
        people, scenes, nuisances, _PLACES[len(people)], strict=True
    ):
        # The head's coordinates are an affine map of the picture's, which three places show.
        x, y = jnp.array([0.0, 1.0, 0.0]), jnp.array([0.0, 0.0, 1.0])
        frame = _frame(who, scene, nuisance, x, y, 2 / size, place)
        origin, right, down = jnp.stack([frame.x, frame.y], axis=-1)
        matrix = jnp.stack([right - origin, down - origin], axis=-1)
        points = face.landmarks(who, scene, frame) - origin[None]
        each.append(jnp.linalg.solve(matrix, points.T).T)
    cos, sin = view.zoom * jnp.cos(view.angle), view.zoom * jnp.sin(view.angle)
    x, y = jnp.moveaxis(jnp.stack(each), -1, 0)
    there = jnp.stack([cos * x - sin * y + view.x, sin * x + cos * y + view.y], axis=-1)
    return (there + 1) * (size / 2) - 0.5


# Where the head is (x, y, scale) when one person or two are in the picture.
_PLACES = {1: ((0.0, 0.10, 0.96),), 2: ((-0.45, 0.26, 0.60), (0.45, 0.26, 0.60))}


def _frame(who, scene, nuisance, x, y, pixel, place) -> face.Frame:
    close, cropped = scene.framing == 1, scene.framing == 2
    alone = place[0] == 0
    zoom = jnp.where(close, 1.24, jnp.where(cropped, 1.10, 1.0)) if alone else 1.0
    aside = jnp.where(cropped, 0.15 * jnp.sign(nuisance.shift_x), 0.0) if alone else 0.0
    scale = place[2] * zoom * (1 + 0.06 * nuisance.scale)
    centre_x = place[0] + place[2] * (aside + 0.055 * nuisance.shift_x)
    centre_y = place[1] + place[2] * 0.045 * nuisance.shift_y
    body_x, body_y = (x - centre_x) / scale, (y - centre_y) / scale
    # The head tilts about the top of the neck.
    cos, sin = jnp.cos(0.10 * nuisance.rotation), jnp.sin(0.10 * nuisance.rotation)
    from_neck = body_y - 0.45
    softness = face.choose((1.0, 2.4, 1.0, 1.0), scene.style)
    return face.Frame(
        x=cos * body_x + sin * from_neck,
        y=cos * from_neck - sin * body_x + 0.45,
        body_x=body_x,
        body_y=body_y,
        pixel=softness * pixel / scale,
        turn=0.055 * nuisance.turn,
        nod=0.022 * nuisance.nod,
        width=0.455 * (1 + 0.095 * who.face_width),
        height=0.555 * (1 + 0.065 * who.face_height),
        line=face.choose((0.0, 0.0, 0.85, 1.0), scene.style),
        shade=face.choose((1.0, 0.9, 0.55, 0.0), scene.style),
    )


def _brushed(scene, x, y):
    amount = 0.008 * (scene.style == 1)
    return (
        x + amount * (jnp.sin(9 * y + 2 * jnp.sin(4 * x)) + 0.4 * jnp.sin(17 * y - 6 * x)),
        y + amount * (jnp.sin(10 * x + 2 * jnp.sin(5 * y)) + 0.4 * jnp.sin(16 * x + 7 * y)),
    )


def _background(scene, nuisance, x, y):
    colour = face.cloth(scene.background)
    flat = (scene.style == 3).astype(jnp.float32)
    glow = jnp.exp(-(x * x + (y + 0.1) * (y + 0.1)))
    return [
        (jnp.ones_like(x), colour),
        ((1 - flat) * 0.22 * glow, face.lighter(colour, 0.6)),
        ((1 - flat) * 0.20 * face.step(y, -0.2, 1.3), face.darker(colour, 0.5)),
    ]


def _finish(image, scene, nuisance, x, y, pixel):
    style = scene.style
    light = face.choose((1.0, 0.55, 1.28), scene.light)[None, None, None]
    flat = (style == 3).astype(jnp.float32)
    side = 1 + (1 - flat) * 0.10 * (nuisance.light_x * x - 0.5 * nuisance.light_y * y)
    warm = 1 + 0.035 * nuisance.warmth * jnp.array([1.0, 0.0, -1.0])
    image = image * side[..., None] * (1 + 0.06 * nuisance.brightness) * warm[None, None, :]
    gray = (image @ jnp.array([0.3, 0.59, 0.11]))[..., None]
    sketch = (style == 2).astype(jnp.float32)
    painting = (style == 1).astype(jnp.float32)
    stroke = (
        jnp.sin(40 * x + 13 * y + 4 * jnp.sin(9 * y - 5 * x))
        + jnp.sin(17 * x - 47 * y + 5 * jnp.sin(7 * x))
    )[..., None]
    painted = (gray + 1.18 * (image - gray)) * (1 + 0.03 * stroke) + 0.006 * stroke
    hatch = 0.5 + 0.5 * jnp.sin(38 * (x + y) + 1.2 * jnp.sin(9 * x - 7 * y))[..., None]
    pale = 0.30 + 0.74 * (gray + 0.45 * (image - gray))
    ink = jnp.clip((0.22 - gray) / 0.22, 0, 1)
    drawn = pale * (1 - 0.8 * ink) + 0.10 * ink
    drawn = 1 - (1 - drawn) * (0.78 + 0.44 * hatch)
    cartoon = gray + 1.15 * (image - gray)
    image = (
        image + painting * (painted - image) + sketch * (drawn - image) + flat * (cartoon - image)
    )
    image = jnp.where(light > 1, 1 - (1 - jnp.clip(image, 0, 1)) ** light, image * light)
    return jnp.clip(image, 0, 1)


def contact_sheet(seed: int, size: int = 96) -> np.ndarray:
    """Returns uint8[H, W, 3]: people, one person in many scenes, and pairs.

    Two rows of different people; then one person in other poses, expressions, hats, styles and
    colours; then people side by side.
    """
    key = stream(jax.random.key(seed), "contact sheet")
    columns = 10
    who = jax.vmap(random_identity)(jax.random.split(stream(key, "people"), 2 * columns))
    scenes = jax.vmap(random_scene)(jax.random.split(stream(key, "scenes"), 4 * columns))
    keys = jax.random.split(stream(key, "pictures"), 4 * columns)

    def rows(tree, first, last):
        return jax.tree.map(lambda leaf: leaf[first:last], tree)

    plain = rows(scenes, 0, 2 * columns)
    zeros = jnp.zeros_like(plain.hat)
    plain = plain._replace(hat=zeros, expression=zeros, style=zeros, light=zeros, framing=zeros)
    people = draw_many(who, plain, keys[: 2 * columns], size)
    one = jax.tree.map(lambda leaf: jnp.repeat(leaf[:1], columns, axis=0), who)
    same = draw_many(one, rows(scenes, 2 * columns, 3 * columns), keys[20:30], size)
    left, right = rows(who, 0, columns), rows(who, columns, 2 * columns)
    pair = functools.partial(draw_pair, size=size)
    beside = rows(scenes, 3 * columns, 4 * columns)
    pairs = jax.jit(jax.vmap(pair))(left, right, beside, rows(plain, 0, columns), keys[30:])
    return image_grid(list(to_uint8(np.concatenate([people, same, pairs]))), columns)
