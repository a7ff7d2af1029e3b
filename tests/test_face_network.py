"""Recognisers as functions of JAX, against onnxruntime, OpenCV and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from idea_jax.faces import crops, embedding, network, random_model
from idea_jax.faces import models as face_models
from idea_jax.models import hub

WIDTH = 8


def arcface(path):
    """A residual network as ArcFace's are exported, with random weights; returns its recogniser."""
    rng = np.random.default_rng(0)
    nodes, stored = [], []

    def weight(name, *shape, low=-1.0, scale=1.0):
        stored.append(numpy_helper.from_array(np.float32(rng.uniform(low, 1, shape) * scale), name))
        return name

    def node(kind, inputs, name, **attributes):
        nodes.append(helper.make_node(kind, inputs, [name], name=f"node.{name}", **attributes))
        return name

    def conv(x, name, before, after, stride, group=1):
        size = 3 if stride == 1 or group > 1 else 1
        kernel = weight(f"{name}.w", after, before // group, size, size, scale=0.3)
        bias = weight(f"{name}.b", after)
        pads = [size // 2] * 4
        settings = {"strides": [stride, stride], "pads": pads, "group": group}
        return node("Conv", [x, kernel, bias], name, dilations=[1, 1], **settings)

    def norm(x, name, width):
        parts = [weight(f"{name}.{p}", width) for p in ("scale", "bias", "mean")]
        return node("BatchNormalization", [x, *parts, weight(f"{name}.var", width, low=0.5)], name)

    x = conv("input.1", "first", 3, WIDTH, 4, group=1)
    x = node("PRelu", [x, weight("slope", WIDTH, 1, 1)], "act")
    inner = norm(x, "bn1", WIDTH)
    inner = conv(inner, "conv1", WIDTH, WIDTH, 1)
    inner = node("PRelu", [inner, weight("slope2", WIDTH, 1, 1)], "act2")
    inner = conv(inner, "conv2", WIDTH, WIDTH, 2, group=WIDTH)
    short = conv(x, "short", WIDTH, WIDTH, 2)
    x = norm(node("Add", [inner, short], "sum"), "bn2", WIDTH)
    x = node("AveragePool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    x = node("Flatten", [x], "flat", axis=1)
    x = node("Dropout", [x], "dropped")
    fc = [weight("fc.w", 512, WIDTH * 7 * 7, scale=0.1), weight("fc.b", 512)]
    x = node("Gemm", [x, *fc], "fc", transB=1)
    norm(x, "features", 512)
    graph = helper.make_graph(
        nodes,
        "arcface",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 512])],
        stored,
    )
    opset = [helper.make_opsetid("", 13)]
    onnx.save_model(helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    return face_models.load_recogniser(path)


def random(path):
    random_model.write_random_recogniser(path)
    return face_models.load_recogniser(path)


def of_one(path):
    """A recogniser whose file is for one crop at a time, as some are exported."""
    random_model.write_random_recogniser(path)
    model = onnx.load(str(path))
    (flatten,) = [node for node in model.graph.node if node.op_type == "Flatten"]
    shape = numpy_helper.from_array(np.int64([1, -1]), "one crop")
    model.graph.initializer.append(shape)
    name, flat = flatten.input[0], flatten.output[0]
    flatten.CopyFrom(helper.make_node("Reshape", [name, "one crop"], [flat]))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save_model(model, str(path))
    return face_models.load_recogniser(path)


def shipped(_):
    return face_models.load_recogniser(hub.resolve("mini").folder / "face" / "recogniser.onnx")


@pytest.mark.parametrize("make", [arcface, random, of_one, shipped])
def test_embeddings_are_those_of_onnxruntime(make, tmp_path):
    recogniser = make(tmp_path / "model.onnx")
    seen = np.random.default_rng(1).integers(0, 256, (2, 112, 112, 3), np.uint8)
    net, weights = network.read_network(recogniser)
    got = jax.jit(network.embed, static_argnums=0)(net, weights, np.float32(seen) / 127.5 - 1)
    np.testing.assert_allclose(got, embedding.embed_faces(recogniser, [*seen]), atol=2e-5)


def test_gradients_are_finite_differences(tmp_path):
    net, weights = network.read_network(random(tmp_path / "model.onnx"))
    rng = np.random.default_rng(2)
    picture = jnp.asarray(rng.uniform(-1, 1, (1, 16, 16, 3)), jnp.float32)
    aim = rng.normal(size=512).astype(np.float32)
    matrix = jnp.array([[[0.1, 0.02, 1.0], [-0.02, 0.1, 2.0]]], jnp.float32)

    @jax.jit
    def likeness(picture):
        return network.embed(net, weights, network.cut(picture, matrix))[0] @ aim

    way = jnp.asarray(rng.normal(size=picture.shape), jnp.float32)
    step = 1e-2
    rise = (likeness(picture + step * way) - likeness(picture - step * way)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(jax.grad(likeness)(picture) * way), rise, rtol=1e-2)


@pytest.mark.parametrize("side", [64, 300, 1200])
def test_crops_are_those_that_recognisers_are_shown(side):
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    picture = small.resize((side, side), Image.Resampling.BICUBIC)
    points = np.float32([[38, 52], [73, 51], [56, 71], [41, 92], [70, 92]]) / 112
    turned = (points - 0.5) @ np.float32([[0.9, 0.3], [-0.3, 0.9]]) * 0.5 + 0.55
    matrix = np.linalg.inv(np.vstack([crops.alignment(turned * side), [0, 0, 1]]))[:2]
    pixels = np.float32(np.asarray(picture))[None] / 127.5 - 1
    got = np.asarray(network.cut(pixels, np.float32(matrix)[None]))[0] * 127.5 + 127.5
    apart = np.abs(got - crops.align(picture, turned * side))
    # OpenCV places a pixel to a 32nd, and large pictures are averaged down in another order.
    assert apart.mean() < 0.6 and np.quantile(apart, 0.999) < 8


def test_an_operator_that_is_not_known_is_named(tmp_path):
    path = tmp_path / "model.onnx"
    random_model.write_random_recogniser(path)
    model = onnx.load(str(path))
    model.graph.node[1].op_type = "Softsign"
    onnx.save_model(model, str(path))
    with pytest.raises(face_models.FaceError, match="Softsign"):
        network.read_network(face_models.load_recogniser(path))
