"""A face recogniser as a function of JAX, so that gradients pass through it.

onnxruntime has no gradients. The operators of the file are carried out one by one, in float32, as
ONNX defines them: those of ArcFace's residual networks and MobileFaceNet, and of the mini's own.

Source: the operators' definitions, https://onnx.ai/onnx/operators.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from idea_jax.faces.models import SIZE, FaceError, Recogniser, inspect

DENSE = 512  # a picture with a side of n times as many pixels is averaged over n x n places
PLANE = ("NCHW", "OIHW", "NCHW")


class Node(NamedTuple):
    """One operator: names of what it reads, "" where it reads nothing, and of what it gives; its
    attributes, sorted."""

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Network:
    """A recogniser without its weights. Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      nodes: in the order of their execution.
      numbers: whole numbers that the file holds, such as shapes, by name.
      mean, std: how it wants its pixels: (value in 0 to 255 - mean) / std.
    """

    nodes: tuple[Node, ...]
    numbers: tuple[tuple[str, tuple[int, ...]], ...]
    input: str
    output: str
    mean: float
    std: float


def read_network(recogniser: Recogniser) -> tuple[Network, dict[str, np.ndarray]]:
    """Returns the network of a recogniser, and its weights as float32 by name.

    Raises:
      FaceError: it has an operator that is not known here, or the file is another one by now.
    """
    import onnx
    from onnx import numpy_helper

    content, _ = inspect(recogniser.path, recogniser.sha256)
    graph = onnx.load_model_from_string(content).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant" and "value" in values:
            stored[node.output[0]] = numpy_helper.to_array(values["value"])
            continue
        if node.op_type not in OPERATORS:
            raise FaceError(
                f"gradients cannot pass through the face model {recogniser.path}: its operator "
                f"{node.op_type} is none of {', '.join(sorted(OPERATORS))}; take another "
                "recogniser of ArcFace's kind"
            )
        plain = {name: _plain(value) for name, value in values.items()}
        inputs, attributes = tuple(node.input), tuple(sorted(plain.items()))
        nodes.append(Node(node.op_type, inputs, node.output[0], attributes))
    is_float = {name: np.issubdtype(value.dtype, np.floating) for name, value in stored.items()}
    numbers = tuple(
        (name, tuple(int(x) for x in value.reshape(-1)))
        for name, value in sorted(stored.items())
        if not is_float[name]
    )
    weights = {name: np.float32(value) for name, value in stored.items() if is_float[name]}
    (source,) = [item.name for item in graph.input if item.name not in stored]
    model = recogniser.model
    network = Network(
        tuple(nodes),
        numbers,
        source,
        graph.output[0].name,
        float(model.input_mean),
        float(model.input_std),
    )
    return network, weights


def _plain(value: Any) -> Any:
    """An attribute as something that can be hashed."""
    if isinstance(value, bytes):
        return value.decode()
    return tuple(value) if isinstance(value, list) else value


def embed(network: Network, weights: Mapping[str, jax.Array], crops: jax.Array) -> jax.Array:
    """Returns float32[B, 512] of unit norm for aligned crops float32[B, 112, 112, 3], RGB in
    [-1, 1]: what `embedding.embed_faces` says of them, as a function with gradients."""
    pixels = (crops * 127.5 + 127.5 - network.mean) / network.std

    def one(plane):
        """Of one crop, [3, 112, 112]: some files are for batches of one alone."""
        known = {**weights, **dict(network.numbers), "": None}
        known[network.input] = plane[None]
        for node in network.nodes:
            inputs = [known[name] for name in node.inputs]
            known[node.output] = OPERATORS[node.kind](*inputs, **dict(node.attributes))
        return known[network.output][0]

    with jax.default_matmul_precision("highest"):
        found = jax.vmap(one)(pixels.transpose(0, 3, 1, 2))
    return found * lax.rsqrt(jnp.sum(found**2, axis=-1, keepdims=True) + 1e-12)


def cut(pictures: jax.Array, matrices: jax.Array) -> jax.Array:
    """Cuts a crop out of each picture, as `crops.align` does: float32[B, 112, 112, 3].

    Args:
      pictures: float32[B, H, W, 3] in [-1, 1]; beyond its edge a picture is black.
      matrices: float32[B, 2, 3]; the place in a picture, x and y, of a place in the crop.
    """
    parts = max(1, min(pictures.shape[1:3]) // DENSE)
    side = SIZE * parts
    places = (jnp.arange(side, dtype=jnp.float32) + 0.5) / parts - 0.5
    down, right = jnp.meshgrid(places, places, indexing="ij")
    there = jnp.stack([right, down, jnp.ones_like(down)])

    def one(picture, matrix):
        with jax.default_matmul_precision("highest"):
            x, y = jnp.einsum("ij,jvu->ivu", matrix, there)
        channels = [
            jax.scipy.ndimage.map_coordinates(
                picture[..., channel], [y, x], order=1, mode="constant", cval=-1.0
            )
            for channel in range(picture.shape[-1])
        ]
        fine = jnp.stack(channels, axis=-1)
        return fine.reshape(SIZE, parts, SIZE, parts, -1).mean(axis=(1, 3))

    return jax.vmap(one)(pictures, matrices)


# The operators


def _pads(auto_pad: str, pads: tuple[int, ...], dims: int) -> Any:
    """Padding as JAX takes it."""
    if auto_pad != "NOTSET":
        return auto_pad.removesuffix("_UPPER")
    pads = pads or (0,) * (2 * dims)
    return list(zip(pads[:dims], pads[dims:], strict=True))


def _of_two(function: Callable) -> Callable:
    """A function of two arrays of any ranks."""

    def apply(a, b):
        ndim = max(jnp.ndim(a), jnp.ndim(b))
        a, b = (jnp.reshape(x, (1,) * (ndim - jnp.ndim(x)) + jnp.shape(x)) for x in (a, b))
        return function(a, b)

    return apply


_add = _of_two(jnp.add)


def _conv(
    x,
    kernel,
    bias=None,
    *,
    auto_pad="NOTSET",
    dilations=(1, 1),
    group=1,
    kernel_shape=None,
    pads=(),
    strides=(1, 1),
):
    del kernel_shape  # the kernel has it
    out = lax.conv_general_dilated(
        x,
        kernel,
        strides,
        _pads(auto_pad, pads, 2),
        rhs_dilation=dilations,
        dimension_numbers=PLANE,
        feature_group_count=group,
    )
    return out if bias is None else out + bias[None, :, None, None]


def _average(
    x,
    *,
    kernel_shape,
    auto_pad="NOTSET",
    ceil_mode=0,
    count_include_pad=0,
    pads=(),
    strides=(1, 1),
):
    if ceil_mode:
        raise FaceError("gradients cannot pass through a pooling that rounds up")
    window, steps = (1, 1, *kernel_shape), (1, 1, *strides)
    padding = _pads(auto_pad, pads, 2)
    if not isinstance(padding, str):
        padding = [(0, 0), (0, 0), *padding]
    total = lax.reduce_window(x, 0.0, lax.add, window, steps, padding)
    if count_include_pad:
        return total / np.prod(kernel_shape)
    return total / lax.reduce_window(jnp.ones_like(x), 0.0, lax.add, window, steps, padding)


def _batch_norm(x, scale, bias, mean, variance, *, epsilon=1e-5, **_):
    factor = scale * lax.rsqrt(variance + epsilon)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)


def _gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    out = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return out if c is None else _add(out, beta * c)


def _flatten(x, *, axis=1):
    return x.reshape(int(np.prod(x.shape[:axis])), -1)


def _reshape(x, shape, *, allowzero=0):
    whole = [x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(shape)]
    return x.reshape(whole)


def _leaky(x, *, alpha=0.01):
    return jnp.where(x < 0, alpha * x, x)


def _same(x, *_, **__):
    return x


OPERATORS: dict[str, Callable] = {
    "Add": _add,
    "AveragePool": _average,
    "BatchNormalization": _batch_norm,
    "Cast": _same,  # of weights that the file holds in another type
    "Conv": _conv,
    "Div": _of_two(jnp.divide),
    "Dropout": _same,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": partial(jnp.mean, axis=(2, 3), keepdims=True),
    "Identity": _same,
    "LeakyRelu": _leaky,
    "MatMul": jnp.matmul,
    "Mul": _of_two(jnp.multiply),
    "PRelu": _of_two(lambda x, slope: jnp.where(x < 0, slope * x, x)),
    "Relu": lambda x: jnp.maximum(x, 0),
    "Reshape": _reshape,
    "Sigmoid": jax.nn.sigmoid,
    "Sub": _of_two(jnp.subtract),
    "Tanh": jnp.tanh,
}
