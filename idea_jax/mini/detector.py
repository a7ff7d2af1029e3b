"""A small face detector of SCRFD's shape, which insightface's own class runs.

Source: SCRFD, arXiv 2105.04714: boxes and points at strides 8, 16, 32, two anchors at each place.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from idea_jax.mini import composites, networks
from idea_jax.mini.networks import SLOPE

STRIDES = (8, 16, 32)
# Sides of a face's crop, in pixels of the input, that each stride's two anchors are there for; the
# smallest and the largest take what is smaller and larger as well.
ANCHORS = ((42.0, 57.0), (77.0, 104.0), (140.0, 190.0))
STEP = np.log(190 / 42) / 5  # from one anchor to the next
BOX = 0.85  # side of the upright box around a face, in sides of its crop
POINTS_WEIGHT, BOX_WEIGHT = 20.0, 2.0  # of mean absolute errors, in sides of the anchor
FOCUS = 2.0  # exponent of the focal loss, arXiv 1708.02002
PIXEL_MEAN, PIXEL_STD = 127.5, 128.0  # as SCRFD takes its pixels

Found = list[tuple[jax.Array, jax.Array, jax.Array]]


class DetectorNet(nn.Module):
    """Pictures float[B, S, S, 3], scaled as SCRFD does, to (scores, boxes, points) of each stride.

    Scores are logits float32[B, H, W, 2]; boxes float32[B, H, W, 2, 4] how far left, top, right and
    bottom are from the place; points float32[B, H, W, 2, 5, 2] how to come there from it; these in
    sides of each of the two anchors.
    """

    widths: tuple[int, ...]  # at strides 4, 8, 16 and 32
    blocks: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> Found:
        def conv(x, width, side, stride, name, scale=2.0, bias=0.0):
            kernel = nn.initializers.variance_scaling(scale, "fan_in", "normal")
            start = jnp.broadcast_to(jnp.asarray(bias, jnp.float32), (width,))
            return nn.Conv(
                width,
                (side, side),
                (stride, stride),
                kernel_init=kernel,
                bias_init=lambda *_: start,
                name=name,
            )(x)

        def act(x):
            return nn.leaky_relu(x, SLOPE)

        # In the beginning: hardly anywhere a face; if there is one, upright and in the middle.
        upright = np.tile(_template().reshape(-1), 2)
        x = act(conv(x, self.widths[0], 4, 4, "patches"))
        x = act(conv(x, self.widths[0], 3, 1, "first"))
        found = []
        for i, stride in enumerate(STRIDES):
            width = self.widths[i + 1]
            x = act(conv(x, width, 3, 2, f"down_{i}"))
            for j in range(self.blocks):
                inner = act(conv(x, width, 3, 1, f"inner_{i}_{j}"))
                x = act(x + conv(inner, width, 3, 1, f"outer_{i}_{j}", 0.02))
            score = conv(x, 2, 1, 1, f"score_{stride}", 0.01, -4.0)
            box = conv(x, 2 * 4, 1, 1, f"box_{stride}", 0.01, BOX / 2)
            points = conv(x, 2 * 10, 1, 1, f"points_{stride}", 0.01, upright)
            place = (*x.shape[:3], 2)
            found.append((score, box.reshape(*place, 4), points.reshape(*place, 5, 2)))
        return found


def _template() -> np.ndarray:
    """Returns float[5, 2]: ArcFace's points from the middle of the crop, in its sides."""
    from insightface.utils import face_align

    return (face_align.arcface_dst - 55.5) / 112


def scaled(images: np.ndarray | jax.Array) -> jax.Array:
    """Returns float32 of pictures uint8, scaled as SCRFD does."""
    return (jnp.asarray(images, jnp.float32) - PIXEL_MEAN) / PIXEL_STD


def loss(found: Found, points: jax.Array, state: jax.Array) -> jax.Array:
    """Returns float32[]: focal loss of the scores and absolute errors of boxes and points.

    A face is to be found near its middle by the anchor of its size; a little further off, and by
    the next anchors, it may be.

    Args:
      points, state: those of composites.Composite, float32[B, F, 5, 2] and int32[B, F].
    """
    exists = state != composites.NONE
    centre, side = composites.crop_square(points)
    side = jnp.where(exists, side, 1.0)
    total, count = 0.0, 0.0
    for (scores, boxes, five), stride, anchors in zip(found, STRIDES, ANCHORS, strict=True):
        size = jnp.asarray(anchors)
        place = _places(scores.shape[1], stride)  # [H, W, 2]
        apart = jnp.linalg.norm(place[None, :, :, None] - centre[:, None, None], axis=-1)
        clipped = jnp.clip(side, ANCHORS[0][0], ANCHORS[-1][-1])
        steps = jnp.abs(jnp.log(clipped[:, None] / size[None, :, None])) / STEP  # [B, 2, F]
        # [B, H, W, 2, F]
        near = jnp.maximum(0.22 * side, 0.75 * stride)[:, None, None] > apart
        whole = (state == composites.WHOLE)[:, None]
        own = near[:, :, :, None] & (whole & (steps < 0.6))[:, None, None]
        around = (apart < 0.5 * side[:, None, None])[:, :, :, None]
        may = jnp.where(whole, steps < 1.25, exists[:, None])
        may = around & may[:, None, None]
        is_face, known = own.any(-1), own.any(-1) | ~may.any(-1)

        right = jnp.where(is_face, scores, -scores)
        each = jax.nn.softplus(-right) * jax.nn.sigmoid(-right) ** FOCUS
        total += jnp.sum(each * known)
        count += jnp.sum(is_face)

        distance = jnp.where(own, apart[:, :, :, None], jnp.inf)
        which = jax.nn.one_hot(jnp.argmin(distance, axis=-1), side.shape[1])
        there = jnp.einsum("bhwaf,bfpc->bhwapc", which, points)
        there = (there - place[None, :, :, None, None]) / size[None, None, None, :, None, None]
        middle, half = (
            jnp.einsum("bhwaf,bfc->bhwac", which, x)
            for x in (centre, BOX / 2 * jnp.stack([side, side], -1))
        )
        off = middle - place[None, :, :, None]
        box = jnp.concatenate([half - off, half + off], -1) / size[None, None, None, :, None]
        errors = POINTS_WEIGHT * jnp.abs(five - there).mean((-2, -1))
        errors += BOX_WEIGHT * jnp.abs(boxes - box).mean(-1)
        total += jnp.sum(errors * is_face)
    return total / jnp.maximum(count, 1.0)


def _places(count: int, stride: int) -> jax.Array:
    """Returns float32[count, count, 2]: where SCRFD's places are, in pixels of the input."""
    steps = stride * jnp.arange(count, dtype=jnp.float32)
    return jnp.stack(jnp.meshgrid(steps, steps), axis=-1)


def write_onnx(path: str | Path, net: DetectorNet, params: dict) -> None:
    """Writes the detector as insightface's SCRFD class takes it: nine outputs, a fixed size."""
    graph, size = networks.Graph(), composites.SIZE
    # Boxes and points in strides instead of anchors.
    params = dict(params)
    for stride, anchors in zip(STRIDES, ANCHORS, strict=True):
        for kind, each in (("box", 4), ("points", 10)):
            factor = np.repeat(np.array(anchors) / stride, each)
            params[f"{kind}_{stride}"] = {
                name: np.asarray(leaf) * factor for name, leaf in params[f"{kind}_{stride}"].items()
            }
    x = graph.act(graph.conv("input.1", params, "patches", 4))
    x = graph.act(graph.conv(x, params, "first"))
    rows = {}
    for i, stride in enumerate(STRIDES):
        x = graph.act(graph.conv(x, params, f"down_{i}", 2))
        for j in range(net.blocks):
            inner = graph.act(graph.conv(x, params, f"inner_{i}_{j}"))
            outer = graph.conv(inner, params, f"outer_{i}_{j}")
            x = graph.act(graph.node("Add", [x, outer], f"sum_{i}_{j}"))
        for kind, each in (("score", 1), ("box", 4), ("points", 10)):
            y = graph.conv(x, params, f"{kind}_{stride}")
            if kind == "score":
                y = graph.node("Sigmoid", [y], f"{y}.sigmoid")
            y = graph.node("Transpose", [y], f"{y}.last", perm=[0, 2, 3, 1])
            shape = graph.constant(f"{y}.shape", np.array([-1, each], np.int64))
            rows[kind, stride] = graph.node("Reshape", [y, shape], f"{kind}.{stride}")
    outputs = {
        rows[kind, stride]: [2 * (size // stride) ** 2, each]
        for kind, each in (("score", 1), ("box", 4), ("points", 10))
        for stride in STRIDES
    }
    graph.write(path, [1, 3, size, size], outputs)
