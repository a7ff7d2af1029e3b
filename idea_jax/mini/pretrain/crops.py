"""What the networks that look at drawings are shown: disturbed pictures and aligned crops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

FACE_SIZE = 112  # of ArcFace's input


# How far the crops that a recogniser is trained on are off, at most: in shares of their side, in
# shares of their size, in radians. As far as a detector's points bring them, and a little further.
CROP_SHIFT, CROP_SCALE, CROP_ANGLE = 0.04, 0.06, np.radians(5)


def disturbed(
    images: jax.Array, key: jax.Array, size: int, points: jax.Array | None = None
) -> jax.Array:
    """Returns float32[B, size, size, 3]: shifted, scaled, mirrored, blurred, of other light.

    So that a network trained on drawings also knows the softer ones that a network makes.

    Args:
      images: float32[B, side, side, 3] in [-1, 1].
      points: float32[B, 5, 2], to cut ArcFace's crop by them, turned a little, too: as far off as
        a detector's points are. None for the whole picture.
    """
    side = images.shape[1]
    keys = jax.random.split(key, 7)
    B = len(images)
    if points is None:
        scale = (size / side) * (1 + 0.08 * jax.random.uniform(keys[0], (B, 1), minval=-1))
        shift = 0.05 * size * jax.random.uniform(keys[1], (B, 2), minval=-1)
        moved = jax.vmap(functools.partial(_moved, size=size))(images, scale, shift)
    else:
        by, angle = jnp.split(jax.random.uniform(keys[0], (B, 2), minval=-1), 2, axis=1)
        shift = CROP_SHIFT * jax.random.uniform(keys[1], (B, 2), minval=-1)
        off = (1 + CROP_SCALE * by[:, 0], CROP_ANGLE * angle[:, 0], shift)
        moved = jax.vmap(functools.partial(aligned_crop, size=size))(images, points, *off)
    flip = jax.random.bernoulli(keys[2], 0.5, (B, 1, 1, 1))
    moved = jnp.where(flip, moved[:, :, ::-1], moved)
    blurred = moved
    for axis in (1, 2):
        blurred = sum(jnp.roll(blurred, by, axis) for by in (-1, 0, 1)) / 3
    amount = jax.random.uniform(keys[3], (B, 1, 1, 1)) * jax.random.bernoulli(
        keys[4], 0.6, (B, 1, 1, 1)
    )
    moved = moved + amount * (blurred - moved)
    gain = 1 + 0.1 * jax.random.normal(keys[5], (B, 1, 1, 3))
    noise = 0.03 * jax.random.normal(keys[6], moved.shape)
    return jnp.clip((moved + 1) * gain - 1 + noise, -1, 1)


def _moved(image: jax.Array, scale: jax.Array, shift: jax.Array, size: int) -> jax.Array:
    both = jnp.broadcast_to(scale, (2,))
    centred = shift + (size - image.shape[0] * both) / 2
    return jax.image.scale_and_translate(
        image, (size, size, 3), (0, 1), both, centred, "linear", antialias=False
    )


def aligned_crop(
    image: jax.Array,
    points: jax.Array,
    scale: jax.Array = 1.0,
    angle: jax.Array = 0.0,
    shift: jax.Array | tuple[float, float] = (0.0, 0.0),
    *,
    size: int,
) -> jax.Array:
    """Returns ArcFace's crop float32[size, size, 3] of a picture in [-1, 1], black beyond its edge.

    As insightface cuts it at 112 pixels: bilinear, by the similarity that brings the five points
    float32[5, 2] to its template.

    Args:
      scale, angle, shift: of what is on the crop, about its middle: how much larger, how far
        turned (radians, clockwise) and moved (shares of the side, to the right and down).
    """
    from insightface.utils import face_align

    # Points as complex numbers: a similarity is then a product and a sum, and its least squares fit
    # a ratio of two scalar products.
    template = face_align.arcface_dst[:, 0] + 1j * face_align.arcface_dst[:, 1]
    p = points[:, 0] + 1j * points[:, 1]
    centred = p - p.mean()
    factor = jnp.vdot(centred, template - template.mean()) / jnp.vdot(centred, centred)
    pixels = (jnp.arange(size) + 0.5) * (FACE_SIZE / size) - 0.5
    middle = (FACE_SIZE - 1) / 2 * (1 + 1j)
    moved = FACE_SIZE * (shift[0] + 1j * shift[1])
    places = pixels[None] + 1j * pixels[:, None] - middle - moved
    places = places * jnp.exp(-1j * angle) / scale + middle
    places = (places - template.mean()) / factor + p.mean()
    at = [places.imag, places.real]
    sample = functools.partial(map_coordinates, order=1, mode="constant", cval=-1.0)
    return jnp.stack([sample(image[..., i], at) for i in range(3)], axis=-1)


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True) + 1e-12)
