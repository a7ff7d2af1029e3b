"""The small networks that read pictures of the drawn world, and their way into ONNX."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from idea_jax.pytrees import flatten, unflatten
from idea_jax.runtime.files import atomic_write

SLOPE = 0.1  # of the activation below zero
_OPSET = 17
_IR_VERSION = 8  # understood by every onnxruntime since 1.14


class ConvNet(nn.Module):
    """Pictures float[B, S, S, 3] in [-1, 1] to float32[B, outputs].

    The mean of each 2x2 pixels if `halve`; a convolution; then per width a convolution with stride
    2 and a residual block; a weighted mean over all places for each channel (MobileFaceNet, arXiv
    1804.07573: what lies in the middle of a face counts for more); a linear layer. There is no
    normalisation: residual branches start at a tenth of their size instead.
    """

    widths: tuple[int, ...]
    outputs: int
    halve: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(width, stride, name, scale=2.0):
            kernel = nn.initializers.variance_scaling(scale, "fan_in", "normal")
            return nn.Conv(width, (3, 3), (stride, stride), kernel_init=kernel, name=name)

        def act(x):
            return nn.leaky_relu(x, SLOPE)

        if self.halve:
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = act(conv(self.widths[0], 1, "first")(x))
        for i, width in enumerate(self.widths[1:]):
            x = act(conv(width, 2, f"down_{i}")(x))
            inner = act(conv(width, 1, f"inner_{i}")(x))
            x = act(x + conv(width, 1, f"outer_{i}", scale=0.02)(inner))
        side, channels = x.shape[1], x.shape[3]
        mean = nn.initializers.constant(1 / side**2)
        place = self.param("place", mean, (side, side, channels))
        x = jnp.sum(x * place[None], axis=(1, 2))
        return nn.Dense(self.outputs, name="last")(x)


def outputs(net: ConvNet, params: dict, images: jax.Array) -> list[jax.Array]:
    """Returns the outputs float32[B, ..., C] of all layers, before their activations."""
    _, state = net.apply(
        {"params": params},
        images,
        capture_intermediates=lambda module, _: isinstance(module, nn.Conv | nn.Dense),
        mutable=["intermediates"],
    )
    return jax.tree.leaves(state["intermediates"])


def save(path: str | Path, params: dict) -> None:
    """Writes the weights as float16 safetensors."""
    tensors = {name: np.asarray(leaf, np.float16) for name, leaf in flatten(params).items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)


def load(path: str | Path) -> tuple[ConvNet, dict]:
    """Returns a network that `save` wrote (without `halve`), and its weights as float32."""
    tensors = load_file(path)
    params = unflatten({name: jnp.asarray(x, jnp.float32) for name, x in tensors.items()})
    levels = sum(name.startswith("down_") for name in params)
    biases = [params["first"]["bias"], *(params[f"down_{i}"]["bias"] for i in range(levels))]
    return ConvNet(tuple(map(len, biases)), len(params["last"]["bias"])), params


class Graph:
    """An ONNX graph in the making, with float16 weights that are cast where they are used.

    No node's name begins with `Sub` or `Mul`: by these names insightface recognises models that
    scale pixels themselves.
    """

    def __init__(self):
        self.nodes, self.stored = [], []

    def weight(self, name: str, values: np.ndarray) -> str:
        from onnx import TensorProto, numpy_helper

        self.stored.append(numpy_helper.from_array(np.float16(values), f"{name}.half"))
        return self.node("Cast", [f"{name}.half"], name, to=TensorProto.FLOAT)

    def constant(self, name: str, values: np.ndarray) -> str:
        """Adds numbers that are kept as they are."""
        from onnx import numpy_helper

        self.stored.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def node(self, kind: str, inputs: list[str], name: str, **attributes) -> str:
        from onnx import helper

        node = helper.make_node(kind, inputs, [name], name=f"node.{name}", **attributes)
        self.nodes.append(node)
        return name

    def conv(self, x: str, params: dict, name: str, stride: int = 1) -> str:
        """Adds a convolution of Flax, padding and all."""
        kernel = np.asarray(params[name]["kernel"]).transpose(3, 2, 0, 1)
        bias = np.asarray(params[name]["bias"])
        return self.node(
            "Conv",
            [x, self.weight(f"{name}.weight", kernel), self.weight(f"{name}.bias", bias)],
            name,
            kernel_shape=list(kernel.shape[2:]),
            strides=[stride, stride],
            auto_pad="SAME_UPPER",
        )

    def act(self, x: str) -> str:
        return self.node("LeakyRelu", [x], f"{x}.act", alpha=SLOPE)

    def write(self, path: str | Path, image: list, outputs: dict[str, list]) -> None:
        """Writes the model: float `input.1` of shape `image` to outputs of these shapes."""
        from onnx import TensorProto, helper, save_model

        def described(name, shape):
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        graph = helper.make_graph(
            self.nodes,
            "idea_jax mini",
            [described("input.1", image)],
            [described(*item) for item in outputs.items()],
            self.stored,
        )
        model = helper.make_model(
            graph,
            producer_name="idea_jax mini",
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
        )
        with atomic_write(path) as temporary:
            save_model(model, str(temporary))


def write_onnx(path: str | Path, net: ConvNet, params: dict, size: int) -> None:
    """Writes a network as ONNX: float [batch, 3, size, size] in [-1, 1] -> [batch, outputs]."""
    graph, x = Graph(), "input.1"
    if net.halve:
        x = graph.node("AveragePool", [x], "halved", kernel_shape=[2, 2], strides=[2, 2])
    x = graph.act(graph.conv(x, params, "first"))
    for i in range(len(net.widths) - 1):
        x = graph.act(graph.conv(x, params, f"down_{i}", 2))
        inner = graph.act(graph.conv(x, params, f"inner_{i}"))
        x = graph.act(graph.node("Add", [x, graph.conv(inner, params, f"outer_{i}")], f"sum_{i}"))
    place = np.asarray(params["place"])
    side, channels = place.shape[0], place.shape[2]
    kernel = graph.weight("place.weight", place.transpose(2, 0, 1)[:, None])
    x = graph.node("Conv", [x, kernel], "placed", kernel_shape=[side, side], group=channels)
    x = graph.node("Flatten", [x], "features")
    last = [graph.weight(f"last.{part}", params["last"][part]) for part in ("kernel", "bias")]
    graph.node("Gemm", [x, *last], "embedding")
    graph.write(path, ["batch", 3, size, size], {"embedding": ["batch", net.outputs]})
