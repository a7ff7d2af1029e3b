"""What a picture of the drawn world shows: who, what a prompt can ask for, and what it cannot."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Where a trait is one of several kinds, these are their names, in the order of their numbers.
SKINS = ("porcelain", "light", "golden", "tan", "brown", "dark")
HAIR_COLOURS = ("black", "brown", "chestnut", "auburn", "ginger", "blond", "gray", "white")
HAIR_STYLES = ("bald", "short", "parted", "spiky", "curly", "bob", "long", "bun")
EYE_COLOURS = ("brown", "amber", "green", "blue", "gray")
BEARDS = ("none", "stubble", "moustache", "goatee", "full")
GLASSES = ("none", "round", "square", "oval")

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black")
HATS = ("none", "cap", "beanie", "hat")
EXPRESSIONS = ("neutral", "smiling", "sad", "surprised")
STYLES = ("photo", "painting", "sketch", "cartoon")
LIGHTS = ("plain", "dark", "bright")
FRAMINGS = ("plain", "close-up", "cropped")


class Traits(NamedTuple):
    """Who: float32 traits uniform in [-1, 1], and int32 numbers of kinds.

    The first half is what a first name says, the second half what a last name says: a family has
    the shape of its faces, its noses and its colours in common.
    """

    eye_size: jax.Array
    eye_spacing: jax.Array
    eye_height: jax.Array
    eye_tilt: jax.Array
    brow_thickness: jax.Array
    brow_height: jax.Array
    brow_angle: jax.Array
    mouth_width: jax.Array
    mouth_fullness: jax.Array
    hair_volume: jax.Array
    hair_style: jax.Array
    hair_colour: jax.Array
    glasses: jax.Array

    face_width: jax.Array
    face_height: jax.Array
    jaw: jax.Array
    chin: jax.Array
    cheeks: jax.Array
    nose_length: jax.Array
    nose_width: jax.Array
    mouth_height: jax.Array
    ear_size: jax.Array
    neck: jax.Array
    skin: jax.Array
    eye_colour: jax.Array
    beard: jax.Array


class Scene(NamedTuple):
    """What a prompt can ask for: int32 numbers of kinds.

    `hat_colour` shows only under a hat. `light` and `framing` are what "dark", "bright", "close-up"
    and "cropped" mean.
    """

    background: jax.Array
    shirt: jax.Array
    hat: jax.Array
    hat_colour: jax.Array
    expression: jax.Array
    style: jax.Array
    light: jax.Array
    framing: jax.Array


class Nuisance(NamedTuple):
    """What no prompt can ask for: float32, uniform in [-1, 1]."""

    rotation: jax.Array
    shift_x: jax.Array
    shift_y: jax.Array
    scale: jax.Array
    turn: jax.Array
    nod: jax.Array
    light_x: jax.Array
    light_y: jax.Array
    brightness: jax.Array
    warmth: jax.Array


# How often each kind occurs; even where nothing is said. Half of all people have no beard.
KINDS = {
    "hair_style": np.ones(len(HAIR_STYLES)),
    "hair_colour": np.ones(len(HAIR_COLOURS)),
    "glasses": np.array([3.0, 1.0, 1.0, 1.0]),
    "skin": np.ones(len(SKINS)),
    "eye_colour": np.ones(len(EYE_COLOURS)),
    "beard": np.array([4.0, 1.0, 1.0, 1.0, 1.0]),
}
SCENE_KINDS = {
    "background": np.ones(len(COLOURS)),
    "shirt": np.ones(len(COLOURS)),
    "hat": np.array([3.0, 1.0, 1.0, 1.0]),
    "hat_colour": np.ones(len(COLOURS)),
    "expression": np.ones(len(EXPRESSIONS)),
    "style": np.array([6.0, 1.0, 1.0, 1.0]),
    "light": np.array([8.0, 1.0, 1.0]),
    "framing": np.array([8.0, 1.0, 1.0]),
}
CODE_SIZE = len(Traits._fields) // 2


def identity_from_code(code: jax.Array) -> Traits:
    """Returns the person that a code describes: float32[2, CODE_SIZE] in [0, 1).

    Row 0 is the code of the first name, row 1 that of the last name. A trait follows its number in
    the code linearly, a kind in steps whose widths are its shares.
    """
    numbers = jnp.asarray(code, jnp.float32).reshape(-1)
    values = (
        _kind(number, KINDS[field]) if field in KINDS else 2 * number - 1
        for field, number in zip(Traits._fields, numbers, strict=True)
    )
    return Traits(*values)


def random_identity(key: jax.Array) -> Traits:
    """Returns a person drawn from the distribution of all people."""
    return identity_from_code(jax.random.uniform(key, (2, CODE_SIZE)))


def random_scene(key: jax.Array) -> Scene:
    """Returns a scene drawn from the distribution of all scenes: two of three are photos."""
    numbers = jax.random.uniform(key, (len(Scene._fields),))
    return Scene(*(_kind(n, SCENE_KINDS[f]) for f, n in zip(Scene._fields, numbers, strict=True)))


def random_nuisance(key: jax.Array) -> Nuisance:
    """Returns what no prompt can ask for."""
    return Nuisance(*jax.random.uniform(key, (len(Nuisance._fields),), minval=-1.0))


def make_scene(
    background: str = "blue",
    shirt: str = "white",
    hat: str = "none",
    hat_colour: str = "red",
    expression: str = "neutral",
    style: str = "photo",
    light: str = "plain",
    framing: str = "plain",
) -> Scene:
    """Returns the scene with these kinds, by name.

    Raises: ValueError for a name that is not among the kinds.
    """
    names = (background, shirt, hat, hat_colour, expression, style, light, framing)
    kinds = (COLOURS, COLOURS, HATS, COLOURS, EXPRESSIONS, STYLES, LIGHTS, FRAMINGS)
    for field, name, known in zip(Scene._fields, names, kinds, strict=True):
        if name not in known:
            raise ValueError(f"no {field} {name!r}: expected one of {', '.join(known)}")
    numbers = (known.index(name) for name, known in zip(names, kinds, strict=True))
    return Scene(*(np.int32(number) for number in numbers))


def distance(one: Traits, other: Traits) -> np.ndarray:
    """Returns float[...]: how different two people are, from 0 (the same) to 1, trait by trait.

    A trait counts half the difference of its values, a kind 1 where it differs; the result is the
    root of the mean of their squares. Leading axes of the two are broadcast against each other.
    """
    squares = (
        np.not_equal(a, b) if field in KINDS else np.square((np.asarray(a) - np.asarray(b)) / 2)
        for field, a, b in zip(Traits._fields, one, other, strict=True)
    )
    return np.sqrt(sum(squares) / len(Traits._fields))


def _kind(number: jax.Array, shares: np.ndarray) -> jax.Array:
    """Returns the kind into whose share of [0, 1) the number falls."""
    edges = np.cumsum(shares)[:-1] / np.sum(shares)
    return jnp.sum(number >= jnp.asarray(edges, jnp.float32)).astype(jnp.int32)
