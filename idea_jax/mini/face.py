"""Draws people: soft signed-distance shapes, painted back to front, without a branch.

A shape is a signed distance (float32[H, W], negative inside), a layer is a pair of an opacity
(float32[H, W] in [0, 1]) and a colour (float32[3] in [0, 1]). Coordinates are those of the head: x
to the right, y downwards, the face about 0.9 wide and 1.1 high around the origin. An edge is as
soft as one pixel is wide, so that a picture of any size is the same picture.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.mini.traits import Scene, Traits

Layer = tuple[jax.Array, jax.Array]

_SKIN = (
    (1.00, 0.88, 0.79),
    (0.98, 0.79, 0.66),
    (0.92, 0.70, 0.52),
    (0.78, 0.55, 0.39),
    (0.59, 0.38, 0.26),
    (0.41, 0.26, 0.18),
)
_HAIR = (
    (0.12, 0.11, 0.14),
    (0.27, 0.18, 0.13),
    (0.47, 0.28, 0.16),
    (0.51, 0.15, 0.13),
    (0.84, 0.42, 0.15),
    (0.95, 0.79, 0.45),
    (0.58, 0.59, 0.63),
    (0.93, 0.93, 0.94),
)
_EYES = (
    (0.36, 0.20, 0.11),
    (0.74, 0.46, 0.13),
    (0.28, 0.58, 0.30),
    (0.22, 0.50, 0.85),
    (0.50, 0.57, 0.64),
)
_RIMS = ((0.2, 0.2, 0.2), (0.80, 0.60, 0.22), (0.13, 0.13, 0.16), (0.66, 0.18, 0.24))
_CLOTH = (
    (0.86, 0.22, 0.22),
    (0.97, 0.55, 0.17),
    (0.99, 0.84, 0.28),
    (0.31, 0.66, 0.38),
    (0.24, 0.47, 0.84),
    (0.52, 0.33, 0.72),
    (0.97, 0.62, 0.76),
    (0.95, 0.95, 0.93),
    (0.15, 0.15, 0.18),
)

# One row per hair style (traits.HAIR_STYLES). The hairline is the curve
#   y = base + slope |x - part| + bend x^2 + wave zigzag(x), and lower by `drop` at the temples;
# behind the head the hair is `back` wider than the face and ends at `bottom`, wider by `flare`
# there; its outline stands `volume` off the head, with `bumps` (round ones, or spikes) all around.
_HAIR_SHAPES = {
    #          bald  short parted spiky curly  bob   long   bun
    "base": (-0.80, -0.36, -0.40, -0.30, -0.31, -0.21, -0.41, -0.42),
    "slope": (0.0, 0.0, 0.42, 0.0, 0.0, 0.0, 0.80, 0.0),
    "part": (0.0, 0.0, 0.20, 0.0, 0.0, 0.0, 0.02, 0.0),
    "bend": (0.2, 0.35, 0.10, 0.1, 0.45, 0.12, 0.1, 0.95),
    "wave": (0.0, 0.015, 0.0, 0.075, 0.03, 0.02, 0.0, 0.0),
    "drop": (1.05, 0.34, 0.30, 0.24, 0.28, 0.50, 0.45, 0.16),
    "volume": (0.025, 0.055, 0.085, 0.07, 0.17, 0.09, 0.075, 0.04),
    "back": (0.0, 0.02, 0.04, 0.03, 0.19, 0.13, 0.12, 0.0),
    "bottom": (-0.1, -0.05, -0.05, -0.1, 0.18, 0.38, 0.86, -0.1),
    "flare": (0.0, 0.0, 0.0, 0.0, 0.0, 0.10, 0.10, 0.0),
    "bumps": (0.0, 0.0, 0.0, 0.10, 0.05, 0.0, 0.0, 0.0),
    "spikes": (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    "knot": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
}
# One row per beard (traits.BEARDS): opacity on the cheeks, around the chin, above the mouth.
_BEARD_PARTS = (
    (0.0, 0.0, 0.0),
    (0.34, 0.34, 0.34),
    (0.0, 0.0, 1.0),
    (0.0, 1.0, 1.0),
    (1.0, 1.0, 1.0),
)
# One row per expression (traits.EXPRESSIONS).
_EXPRESSION = {
    #           neutral smiling sad surprised
    "curve": (0.012, 0.105, -0.105, -0.004),
    "wide": (1.0, 1.50, 1.10, 0.80),
    "open": (0.0, 0.100, 0.0, 0.170),
    "full": (1.0, 1.0, 1.5, 1.0),
    "teeth": (0.0, 1.0, 0.0, 0.0),
    "lids": (1.0, 0.86, 0.62, 1.32),
    "lower_lids": (0.82, 0.48, 0.82, 1.0),
    "brow": (0.0, 0.015, 0.010, 0.095),
    "inner_brow": (0.0, 0.0, 0.115, 0.0),
    "tears": (0.0, 0.0, 1.0, 0.0),
}


class Frame(NamedTuple):
    """Where and how a person is drawn: what all of the parts below have in common."""

    x: jax.Array  # float32[H, W]: coordinates of the head, turned and tilted with it
    y: jax.Array
    body_x: jax.Array  # float32[H, W]: the same of the body, which stays upright
    body_y: jax.Array
    pixel: jax.Array  # width of a pixel, in head coordinates
    turn: jax.Array  # how far the front of the face moves sideways when the head turns
    nod: jax.Array
    width: jax.Array  # of half the face, at the eyes
    height: jax.Array  # of half the face
    line: jax.Array  # opacity of drawn outlines
    shade: jax.Array  # strength of light and shadow


def fill(distance: jax.Array, softness: jax.Array) -> jax.Array:
    """Returns the opacity of a shape with an edge `softness` wide: its share of each pixel."""
    return jnp.clip(0.5 - distance / softness, 0.0, 1.0)


def soft(distance: jax.Array, softness: float) -> jax.Array:
    """Returns the opacity of a shape that fades out smoothly."""
    t = fill(distance, softness)
    return t * t * (3 - 2 * t)


def stroke(distance: jax.Array, width: jax.Array, pixel: jax.Array) -> jax.Array:
    """Returns the opacity of a line of this width along the edge of a shape."""
    return fill(distance - width / 2, pixel) - fill(distance + width / 2, pixel)


def ellipse(
    x: jax.Array, y: jax.Array, width: jax.Array, height: jax.Array, square: jax.Array = 0.0
) -> jax.Array:
    """Returns the distance to an ellipse, exact near its edge; `square` in [0, 1] fills corners.

    Source: first-order distance of an implicit curve, Inigo Quilez, "Ellipse - distance".
    """
    u2, v2 = jnp.square(x / width), jnp.square(y / height)
    round_norm = jnp.sqrt(u2 + v2 + 1e-9)
    square_norm = jnp.sqrt(jnp.sqrt(u2 * u2 + v2 * v2 + 1e-12))
    norm = round_norm + square * (square_norm - round_norm)
    slope = jnp.sqrt(u2 / jnp.square(width) + v2 / jnp.square(height) + 1e-9)
    return norm * (norm - 1) / slope


def smooth_max(a: jax.Array, b: jax.Array, radius: float) -> jax.Array:
    """Returns the intersection of two shapes, with a rounded corner."""
    t = jnp.maximum(radius - jnp.abs(a - b), 0.0) / radius
    return jnp.maximum(a, b) + t * t * radius / 4


def mix(a: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
    return a + (b - a) * t


def step(x: jax.Array, start: jax.Array, end: jax.Array) -> jax.Array:
    """Returns 0 before start, 1 after end, and a smooth curve between them."""
    t = jnp.clip((x - start) / (end - start), 0.0, 1.0)
    return t * t * (3 - 2 * t)


def rgb(*channels: float) -> jax.Array:
    return jnp.array(channels, jnp.float32)


def choose(table: tuple, kind: jax.Array) -> jax.Array:
    """Returns the row of a table that belongs to a kind."""
    return jnp.asarray(np.array(table, np.float32))[kind]


def cloth(colour: jax.Array) -> jax.Array:
    """Returns float32[3] in [0, 1]: one of traits.COLOURS as cloth and backgrounds have it."""
    return choose(_CLOTH, colour)


def darker(colour: jax.Array, amount: float) -> jax.Array:
    return colour * (1 - amount)


def lighter(colour: jax.Array, amount: float) -> jax.Array:
    return colour + (1 - colour) * amount


def head(frame: Frame, who: Traits) -> jax.Array:
    """Returns the distance to the face: an ellipse that narrows to the jaw, with a squarer chin."""
    below = jnp.clip(frame.y / frame.height, 0.0, 1.2)
    taper = 1 - (0.15 + 0.11 * who.jaw) * below * below
    square = 0.16 + jnp.minimum(below * 1.6, 1.0) * (0.24 + 0.26 * who.chin)
    return ellipse(frame.x / taper, frame.y, frame.width, frame.height, square)


def person(who: Traits, scene: Scene, frame: Frame) -> list[Layer]:
    """Returns the layers of a person, back to front."""
    skin = choose(_SKIN, who.skin)
    hair = choose(_HAIR, who.hair_colour)
    face = head(frame, who)
    inside = fill(face, frame.pixel)
    behind, front = _hair(frame, who, scene, hair, face)
    return [
        *behind,
        *_body(frame, who, scene, skin),
        *_ears(frame, who, skin),
        *_face(frame, who, skin, face, inside),
        *_nose(frame, who, skin),
        *_beard(frame, who, hair, face),
        *_mouth(frame, who, scene, skin, inside),
        *_eyes(frame, who, scene, skin, inside),
        *front,
        *_brows(frame, who, scene, hair, inside),
        *_glasses(frame, who),
        *_hat(frame, who, scene),
    ]


def landmarks(who: Traits, scene: Scene, frame: Frame) -> jax.Array:
    """Returns float32[5, 2], (x, y) in coordinates of the head: ArcFace's five points.

    Left eye, right eye, tip of the nose, left and right corner of the mouth, as seen. The eyes are
    the middles between their corners, wherever they look; the frame's places do not count.
    """
    # Of the middle between the eyes, which a slant turns about themselves.
    middle = frame._replace(x=frame.turn, y=frame.nod)
    x, y, _, _ = _eye_place(middle, who._replace(eye_tilt=jnp.zeros_like(who.eye_tilt)))
    eyes = [(frame.turn + x, frame.nod - y), (frame.turn - x, frame.nod - y)]
    nose = (1.7 * frame.turn, 1.3 * frame.nod + _nose_base(who) - 0.045)
    curve, wide = (choose(_EXPRESSION[name], scene.expression) for name in ("curve", "wide"))
    half = (0.150 + 0.032 * who.mouth_width) * wide
    corner = 1.15 * frame.nod + _mouth_height(who) - 0.45 * curve
    mouth = [(1.15 * frame.turn - half, corner), (1.15 * frame.turn + half, corner)]
    return jnp.stack([jnp.stack(point) for point in (*eyes, nose, *mouth)])


def _outline(frame: Frame, shape: jax.Array, strength: float = 1.0) -> Layer:
    return strength * frame.line * stroke(shape, 0.026, frame.pixel), rgb(0.13, 0.11, 0.13)


def _body(frame: Frame, who: Traits, scene: Scene, skin: jax.Array) -> list[Layer]:
    x, y, pixel = frame.body_x, frame.body_y, frame.pixel
    shirt = cloth(scene.shirt)
    neck_width = 0.185 + 0.035 * who.neck
    # Wider and wider, but never wider than the shoulders, far below the usual picture.
    slope = 0.6 * jnp.square(jnp.clip(y - 0.5, 0.0, 0.75))
    neck = jnp.maximum(jnp.abs(x) - neck_width - slope, -y)
    # Shoulders: a wide rounded hill that goes on below the picture.
    shoulders = ellipse(x, jnp.minimum(y - 1.06, 0.0), 0.86 + 0.05 * who.neck, 0.44, 0.55)
    collar = ellipse(x, y - 0.60, neck_width + 0.045, 0.17, 0.1)
    body = jnp.maximum(shoulders, -collar)
    covered = fill(body, pixel)
    chin_shadow = soft(ellipse(x - frame.turn, y - 0.58, 0.30, 0.15), 0.14)
    return [
        (fill(jnp.maximum(neck, shoulders - 0.2), pixel), darker(skin, 0.06)),
        (chin_shadow * fill(neck, pixel) * (0.15 + 0.4 * frame.shade), darker(skin, 0.45)),
        _outline(frame, neck),
        (covered, shirt),
        (covered * frame.shade * 0.30 * soft(0.12 - jnp.abs(x) + 0.5, 0.5), darker(shirt, 0.55)),
        (covered * frame.shade * 0.25 * soft(jnp.abs(x + 0.3) - 0.1, 0.3), lighter(shirt, 0.5)),
        (stroke(collar - 0.03, 0.05, pixel) * fill(shoulders, pixel), mix(shirt, 0.3 * shirt, 0.3)),
        _outline(frame, body),
    ]


def _ears(frame: Frame, who: Traits, skin: jax.Array) -> list[Layer]:
    size = 0.098 + 0.034 * who.ear_size
    x = jnp.abs(frame.x + 0.35 * frame.turn) - frame.width
    ear = ellipse(x - 0.25 * size, frame.y - 0.03, size, 1.35 * size)
    inner = ellipse(x - 0.40 * size, frame.y - 0.03, 0.42 * size, 0.72 * size)
    return [
        (fill(ear, frame.pixel), darker(skin, 0.05)),
        (0.8 * soft(inner, 0.04), skin * rgb(0.82, 0.66, 0.62)),
        _outline(frame, ear),
    ]


def _face(
    frame: Frame, who: Traits, skin: jax.Array, face: jax.Array, inside: jax.Array
) -> list[Layer]:
    u, v = frame.x / frame.width, frame.y / frame.height
    cheek = ellipse(jnp.abs(frame.x - frame.turn) - 0.27, frame.y - 0.165 - frame.nod, 0.12, 0.09)
    blush = (0.30 + 0.28 * who.cheeks) * soft(cheek, 0.16)
    return [
        (inside, skin),
        (inside * frame.shade * 0.30 * soft(-face - 0.02, 0.22), darker(skin, 0.42)),
        (
            inside * frame.shade * 0.35 * soft(ellipse(u, v + 0.30, 0.55, 0.42), 0.7),
            lighter(skin, 0.45),
        ),
        (inside * blush, skin * rgb(1.0, 0.62, 0.58)),
        _outline(frame, face),
    ]


def _nose(frame: Frame, who: Traits, skin: jax.Array) -> list[Layer]:
    x, y = frame.x - 1.7 * frame.turn, frame.y - 1.3 * frame.nod
    base = _nose_base(who)
    width = 0.085 + 0.032 * who.nose_width
    shadow = skin * rgb(0.70, 0.56, 0.52)
    # The under side is a shallow bowl; a soft shadow lies along one flank of the bridge.
    bowl = y - base + 0.050 * jnp.square(x / width)
    tip = soft(ellipse(x, y - base + 0.045, width, 0.062), 0.06)
    under = stroke(bowl / jnp.sqrt(1 + jnp.square(0.1 * x / (width * width))), 0.034, frame.pixel)
    bridge = ellipse(x - 0.045, y - base + 0.15, 0.028, 0.14)
    return [
        (0.30 * tip, skin * rgb(1.0, 0.70, 0.64)),
        ((0.1 + 0.20 * frame.shade) * soft(bridge, 0.07), shadow),
        (
            0.45 * frame.shade * soft(ellipse(x + 0.012, y - base + 0.07, 0.022, 0.035), 0.04),
            lighter(skin, 0.7),
        ),
        (0.85 * under * fill(jnp.abs(x) - width, 0.05), shadow),
    ]


def _nose_base(who: Traits) -> jax.Array:
    """Returns y of the underside of the nose."""
    return 0.165 + 0.055 * who.nose_length


def _beard(frame: Frame, who: Traits, hair: jax.Array, face: jax.Array) -> list[Layer]:
    x, y = frame.x - frame.turn, frame.y - frame.nod
    parts = choose(_BEARD_PARTS, who.beard)
    mouth = _mouth_height(who)
    colour = mix(hair, darker(hair, 0.25), 0.5)
    side = step(jnp.abs(frame.x) / frame.width, 0.45, 1.0)
    # Full beards stand a little off the chin.
    full = smooth_max(
        face - 0.035 * parts[0] * parts[0], mouth - 0.05 - 0.42 * side * side - y, 0.06
    )
    chin = smooth_max(ellipse(x, y - mouth - 0.10, 0.21, 0.20, 0.3), face - 0.02, 0.05)
    lip = ellipse(jnp.abs(x) - 0.085, y - mouth + 0.062 - 0.25 * jnp.square(x), 0.115, 0.042)
    mask = jnp.maximum(
        jnp.maximum(parts[0] * fill(full, frame.pixel), parts[1] * fill(chin, frame.pixel)),
        parts[2] * fill(lip, frame.pixel),
    )
    texture = 0.5 + 0.5 * jnp.sin(70 * x + 9 * jnp.sin(5 * y))
    return [
        (mask, colour),
        (mask * frame.shade * 0.25 * texture, lighter(colour, 0.25)),
        _outline(frame, full, parts[0] * parts[0]),
    ]


def _mouth_height(who: Traits) -> jax.Array:
    """Returns y of the middle of the mouth."""
    return 0.335 + 0.028 * who.mouth_height + 0.03 * who.nose_length


def _mouth(
    frame: Frame, who: Traits, scene: Scene, skin: jax.Array, inside: jax.Array
) -> list[Layer]:
    x, y = frame.x - 1.15 * frame.turn, frame.y - 1.15 * frame.nod - _mouth_height(who)
    look = {name: choose(row, scene.expression) for name, row in _EXPRESSION.items()}
    width = (0.150 + 0.032 * who.mouth_width) * look["wide"]
    u = x / width
    u2 = u * u
    lens = jnp.maximum(1 - u2, 0.0)
    lens = mix(lens, jnp.sqrt(lens + 1e-6), jnp.minimum(look["open"] * 9, 1.0))
    full = (0.030 + 0.013 * who.mouth_fullness) * look["full"]
    opening = look["open"] * lens
    # The line between the lips bends up at its ends in a smile; an open mouth opens downwards.
    middle = y - look["curve"] * (0.55 - u2)
    upper = -middle - (0.75 * full * lens * (1 - 0.28 * jnp.exp(-18 * u2))) - 0.35 * opening
    lower = middle - full * lens - opening
    steep = jnp.sqrt(1 + jnp.square(2 * look["curve"] * u / width))
    beyond = jnp.abs(x) - width
    lips = jnp.maximum(jnp.maximum(upper, lower) / steep, beyond)
    hole = jnp.maximum(jnp.maximum(-middle - 0.35 * opening, middle - opening) / steep, beyond)
    teeth = jnp.maximum(hole, middle - 0.45 * opening)
    closed = 1 - jnp.minimum(look["open"] * 30, 1.0)
    open_ = 1 - closed
    lip = mix(skin, rgb(0.80, 0.22, 0.26), 0.52 + 0.10 * who.mouth_fullness) * 0.94
    line = jnp.maximum(jnp.abs(middle / steep) - 0.011, beyond - 0.008)
    tongue = jnp.maximum(ellipse(x, y - 0.1 - look["curve"] * 0.55, 0.6 * width, 0.06), hole)
    return [
        (
            inside
            * 0.4
            * frame.shade
            * soft(ellipse(x, y - 0.085 - opening, 0.5 * width, 0.022), 0.05),
            darker(skin, 0.4),
        ),
        (inside * fill(lips, frame.pixel), lip),
        (inside * open_ * fill(hole, frame.pixel), rgb(0.36, 0.08, 0.11)),
        (inside * open_ * fill(tongue, frame.pixel), rgb(0.86, 0.42, 0.42)),
        (inside * look["teeth"] * fill(teeth, frame.pixel), rgb(0.98, 0.97, 0.95)),
        (inside * closed * fill(line, frame.pixel), lip * 0.45),
    ]


def _eye_place(frame: Frame, who: Traits) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns x and y from the centre of the nearer eye, x outwards; and half its width, height."""
    width = 0.122 + 0.020 * who.eye_size
    height = 0.088 + 0.020 * who.eye_size
    apart = (0.205 + 0.030 * who.eye_spacing) * (1 + 0.06 * who.face_width)
    x = jnp.abs(frame.x - frame.turn) - apart
    y = frame.y - frame.nod + 0.035 - 0.035 * who.eye_height
    slant = 0.20 * who.eye_tilt
    return x - slant * y, y + slant * x, width, height


def _eyes(
    frame: Frame, who: Traits, scene: Scene, skin: jax.Array, inside: jax.Array
) -> list[Layer]:
    x, y, width, height = _eye_place(frame, who)
    pixel = frame.pixel
    lids = choose(_EXPRESSION["lids"], scene.expression)
    lower = choose(_EXPRESSION["lower_lids"], scene.expression)
    u2 = jnp.square(x / width)
    arch = jnp.sqrt(jnp.maximum(1 - u2, 0.0) + 1e-4) * 0.45 + 0.55 * (1 - u2)
    steep = jnp.sqrt(1 + jnp.square(2 * height * x / (width * width)))
    over = (-y - height * lids * arch) / steep
    under = (y - lower * height * arch) / steep
    white = jnp.maximum(over, under)
    open_ = fill(white, pixel) * inside
    # Both eyes look the same way, so the side of the face matters here.
    side = jnp.where(frame.x > frame.turn, 1.0, -1.0)
    gaze = x - 0.35 * frame.turn * side
    radius = 0.074 + 0.010 * who.eye_size
    iris = jnp.sqrt(gaze * gaze + y * y + 1e-9)
    colour = choose(_EYES, who.eye_colour)
    glint = jnp.sqrt(jnp.square(gaze - 0.026 * side) + jnp.square(y + 0.030) + 1e-9)
    spark = jnp.sqrt(jnp.square(gaze + 0.028 * side) + jnp.square(y - 0.028) + 1e-9)
    lid = jnp.maximum(
        jnp.abs(over) - 0.015 - 0.010 * jnp.clip(x / width, -0.6, 1.0), jnp.abs(x) - width * 1.06
    )
    crease = jnp.maximum(jnp.abs(over - 0.050) - 0.008, jnp.abs(x) - width * 0.85)
    lash = rgb(0.13, 0.09, 0.09)
    tears = choose(_EXPRESSION["tears"], scene.expression) * inside
    fallen = y - height - 0.075
    # A drop: a circle whose upper half is drawn out to a point.
    drop = ellipse(x - 0.3 * width, jnp.where(fallen < 0, 0.55 * fallen, fallen), 0.036, 0.040)
    return [
        (0.5 * inside * soft(white - 0.02, 0.09), skin * rgb(0.80, 0.70, 0.68)),
        (0.55 * inside * fill(crease, pixel), skin * rgb(0.62, 0.50, 0.46)),
        (open_, rgb(0.99, 0.99, 0.98)),
        (open_ * 0.30 * soft(-y - 0.2 * height, 0.07), rgb(0.45, 0.48, 0.56)),
        (open_ * fill(iris - radius, pixel), colour * 0.52),
        (open_ * fill(iris - radius + 0.016, pixel), colour),
        (
            open_ * 0.6 * soft(jnp.maximum(iris - radius + 0.016, 0.012 - y), 0.04),
            lighter(colour, 0.45),
        ),
        (open_ * fill(iris - 0.038, pixel), rgb(0.05, 0.04, 0.05)),
        (open_ * fill(glint - 0.020, pixel), rgb(1.0, 1.0, 1.0)),
        (open_ * 0.7 * fill(spark - 0.010, pixel), rgb(1.0, 1.0, 1.0)),
        (inside * fill(lid, pixel), lash),
        (0.35 * inside * stroke(under, 0.016, pixel) * fill(over, pixel), skin * 0.45),
        (tears * fill(drop, pixel), rgb(0.55, 0.80, 0.97)),
        (0.7 * tears * fill(drop + 0.022, pixel), rgb(0.90, 0.97, 1.0)),
    ]


def _brows(
    frame: Frame, who: Traits, scene: Scene, hair: jax.Array, inside: jax.Array
) -> list[Layer]:
    x, y, width, height = _eye_place(frame, who)
    raised = choose(_EXPRESSION["brow"], scene.expression)
    inner = choose(_EXPRESSION["inner_brow"], scene.expression)
    length = 1.18 * width
    u = x / length
    # Inner end at u = -1: frowning brows are low there, worried ones high.
    line = 0.10 * who.brow_angle * u * 0.45 + 0.5 * inner * (1 - u) - 0.028 * (u * u)
    rest = height + 0.062 + 0.026 * who.brow_height + raised
    thick = (0.027 + 0.011 * who.brow_thickness) * (1.0 - 0.38 * u * u - 0.18 * u)
    brow = jnp.maximum(jnp.abs(y + rest + line) - thick, jnp.abs(x) - length)
    return [
        (inside * fill(brow, frame.pixel), mix(darker(hair, 0.30), rgb(0.25, 0.17, 0.13), 0.25))
    ]


def _glasses(frame: Frame, who: Traits) -> list[Layer]:
    x, y, _, _ = _eye_place(frame, who._replace(eye_tilt=0.0 * who.eye_tilt))
    worn = (who.glasses > 0).astype(jnp.float32)
    colour = choose(_RIMS, who.glasses)
    pixel = frame.pixel
    width = choose((0.17, 0.168, 0.178, 0.185), who.glasses)
    tall = choose((0.17, 0.168, 0.140, 0.118), who.glasses)
    thick = choose((0.03, 0.024, 0.040, 0.034), who.glasses)
    square = choose((0.0, 0.0, 0.95, 0.25), who.glasses)
    lens = ellipse(x, y - 0.01, width, tall, square)
    bridge = jnp.maximum(jnp.abs(y + 0.02) - thick / 2, jnp.maximum(x, -lens))
    temple = jnp.maximum(jnp.abs(y + 0.03) - thick / 2, jnp.maximum(-x, -lens))
    temple = jnp.maximum(temple, jnp.abs(frame.x) - frame.width - 0.01)
    arms = fill(jnp.minimum(bridge, temple), pixel)
    gleam = jnp.abs(x + 0.5 * (y - 0.01) + 0.02) - 0.022
    return [
        (worn * 0.13 * fill(lens, pixel), rgb(0.75, 0.88, 1.0)),
        (
            worn * 0.28 * frame.shade * fill(jnp.maximum(lens + 0.02, gleam), pixel),
            rgb(1.0, 1.0, 1.0),
        ),
        (worn * jnp.maximum(arms, stroke(lens, thick, pixel)), colour),
    ]


def _hair(
    frame: Frame, who: Traits, scene: Scene, colour: jax.Array, face: jax.Array
) -> tuple[list[Layer], list[Layer]]:
    """Returns the layers of the hair behind the head, and of that in front of it."""
    x, y, pixel = frame.x, frame.y, frame.pixel
    shape = {name: choose(row, who.hair_style) for name, row in _HAIR_SHAPES.items()}
    volume = shape["volume"] * (1 + 0.35 * who.hair_volume)
    angle = jnp.arctan2(x, -y)
    saw = jnp.abs(jnp.mod(angle * 2.9 + 0.5, 1.0) * 2 - 1)
    scallop = jnp.abs(jnp.sin(angle * 8.5))
    above = step(-y, -0.12, 0.2)
    bumps = shape["bumps"] * mix(scallop, saw * above, shape["spikes"])
    # A hat presses the hair down: nothing of it stands out above the brim.
    hat = (scene.hat > 0).astype(jnp.float32)
    under_hat = 1 - hat * fill(y + 0.36, 0.05) * fill(-face + 0.05, 0.02)
    bumps = bumps * (1 - hat * above)

    # Behind: the top of an ellipse going straight down, rounded off at the bottom.
    wide = frame.width + shape["back"] * (1 + 0.25 * who.hair_volume)
    fall = jnp.maximum(y, 0.0)
    back = (
        ellipse(x, jnp.minimum(y, 0.0), wide + shape["flare"] * fall, frame.height + volume) - bumps
    )
    bottom = shape["bottom"] + 0.05 * who.hair_volume - 0.10 * jnp.square(x)
    back = smooth_max(back, (y - bottom) * 0.95, 0.16)
    knot = jnp.sqrt(x * x + jnp.square(y + frame.height + 0.13) + 1e-9) - 0.165
    knot = knot + (1 - shape["knot"]) * 9
    tail = fill(jnp.minimum(back, knot), pixel) * under_hat
    strands = 0.5 + 0.5 * jnp.sin(26 * x + 3 * jnp.sin(4 * y))
    behind = [
        (tail, darker(colour, 0.24)),
        (tail * frame.shade * 0.22 * strands, darker(colour, 0.55)),
        (fill(knot, pixel) * under_hat, colour),
        (
            frame.shade
            * 0.45
            * under_hat
            * fill(knot, pixel)
            * soft(ellipse(x + 0.04, y + frame.height + 0.19, 0.07, 0.04), 0.06),
            lighter(colour, 0.35),
        ),
        _outline(frame, jnp.minimum(back, knot)),
    ]

    # In front: what of the hair's outline lies above the hairline.
    def hairline(at):
        zigzag = jnp.abs(jnp.mod(at * 4.6 + 0.25, 1.0) * 2 - 1)
        part = jnp.sqrt(jnp.square(at - shape["part"]) + 4e-4)
        temple = step(jnp.abs(at) / frame.width, 0.70, 0.99)
        return (
            shape["base"]
            + shape["slope"] * part
            + shape["bend"] * at * at
            + shape["wave"] * zigzag
            + shape["drop"] * temple
        ) * (frame.height / 0.55)

    at = x - 0.7 * frame.turn
    line = hairline(at)
    slope = (hairline(at + 0.01) - line) / 0.01
    edge = (y - line) / jnp.sqrt(1 + jnp.square(slope))
    outline = ellipse(x, jnp.minimum(y, 0.0), frame.width + 0.6 * volume, frame.height + volume)
    front = jnp.maximum(outline - bumps, edge)
    cover = fill(front, pixel) * under_hat
    # A band of gloss follows the curve of the head.
    gloss = jnp.abs(ellipse(x - 0.05, y - 0.02, frame.width * 0.80, frame.height * 0.80)) - 0.022
    combed = 0.55 + 0.45 * jnp.sin(30 * angle + 4 * jnp.sin(6 * x))
    shadow = soft(edge - 0.035, 0.09) * fill(face, pixel) * under_hat
    present = step(shape["base"], -0.75, -0.55)
    return behind, [
        (0.34 * frame.shade * shadow * present, rgb(0.20, 0.10, 0.07)),
        (cover, colour),
        (cover * frame.shade * 0.22 * soft(-edge - 0.05, 0.14), lighter(colour, 0.3)),
        (cover * frame.shade * (0.25 + 0.30 * combed) * soft(gloss, 0.09), lighter(colour, 0.42)),
        _outline(frame, front),
    ]


def _hat(frame: Frame, who: Traits, scene: Scene) -> list[Layer]:
    x, y, pixel = frame.x, frame.y, frame.pixel
    colour = cloth(scene.hat_colour)
    cap, beanie, brimmed = ((scene.hat == kind).astype(jnp.float32) for kind in (1, 2, 3))
    wide = frame.width + 0.055
    top = frame.height
    brow = -0.30 * frame.height / 0.55 - 0.03  # where a hat ends, above the eyes

    dome = smooth_max(ellipse(x, y - brow, wide, top - 0.11, 0.12), y - brow - 0.015, 0.03)
    visor = ellipse(x - 2.2 * frame.turn, y - brow - 0.01, wide * 0.92, 0.085, 0.2)
    button = jnp.sqrt(x * x + jnp.square(y - brow + top - 0.12) + 1e-9) - 0.035
    wool = smooth_max(ellipse(x, y - brow + 0.04, wide + 0.015, top - 0.10, 0.22), y - brow, 0.03)
    fold = ellipse(x, y - brow - 0.02, wide + 0.04, 0.085, 0.85)
    pompom = jnp.sqrt(x * x + jnp.square(y - brow + top - 0.03) + 1e-9) - 0.115
    brim = ellipse(x, y - brow - 0.01 + 0.12 * x * x, wide + 0.235, 0.072, 0.1)
    crown = jnp.maximum(ellipse(x, y - brow + 0.12, wide - 0.055, 0.36, 0.75), y - brow)
    band = jnp.maximum(crown, jnp.abs(y - brow + 0.085) - 0.045)

    ribs = 0.5 + 0.5 * jnp.sin(34 * x)
    body = jnp.minimum(
        jnp.minimum(dome + (1 - cap) * 9, wool + (1 - beanie) * 9), crown + (1 - brimmed) * 9
    )
    covered = fill(body, pixel)
    edge = jnp.minimum(
        jnp.minimum(visor + (1 - cap) * 9, fold + (1 - beanie) * 9), brim + (1 - brimmed) * 9
    )
    edged = fill(edge, pixel)
    bobble = fill(pompom + (1 - beanie) * 9, pixel)
    worn = cap + beanie + brimmed
    shadow = worn * soft(edge - 0.05, 0.10) * fill(head(frame, who), pixel)
    light = soft(ellipse(x + 0.17, y - brow + 0.24, 0.10, 0.14), 0.2)
    return [
        (0.40 * frame.shade * shadow, rgb(0.20, 0.10, 0.07)),
        (bobble, lighter(colour, 0.35)),
        _outline(frame, pompom + (1 - beanie) * 9),
        (covered, colour),
        (covered * frame.shade * 0.40 * light, lighter(colour, 0.5)),
        (covered * frame.shade * 0.30 * soft(0.42 * wide - jnp.abs(x), 0.5), darker(colour, 0.5)),
        (covered * beanie * 0.22 * ribs, darker(colour, 0.4)),
        (cap * 0.5 * covered * stroke(jnp.abs(x) - 0.002, 0.02, pixel), darker(colour, 0.4)),
        (cap * fill(button, pixel), darker(colour, 0.25)),
        (brimmed * fill(band, pixel), darker(colour, 0.42)),
        _outline(frame, body),
        (edged, mix(darker(colour, 0.14), lighter(colour, 0.10), beanie)),
        (edged * beanie * 0.25 * ribs, darker(colour, 0.4)),
        (
            edged * frame.shade * 0.45 * (1 - beanie) * soft(brow - y, 0.08),
            lighter(colour, 0.12),
        ),
        _outline(frame, edge),
    ]
