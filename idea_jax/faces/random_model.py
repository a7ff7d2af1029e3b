"""A face recogniser with random weights, in ArcFace's format: for the demo and the tests only.

It stands in where no real model may be shipped. Its embeddings tell pictures apart, not people.
"""

from pathlib import Path

import numpy as np

from idea_jax.runtime.files import atomic_write

_OPSET = 17
_IR_VERSION = 8  # understood by every onnxruntime since 1.14


def write_random_recogniser(path: str | Path, seed: int = 0, size: int = 112) -> None:
    """Writes an ONNX model: float [batch, 3, size, size] scaled to [-1, 1] -> [batch, 512].

    Three strided convolutions and a projection. `tanh` is odd and no layer has a bias, so that
    embeddings spread in all directions. No node's name begins with `Sub` or `Mul`: by these names
    insightface recognises models that do the scaling to [-1, 1] themselves.

    Args:
      size: side of the input in pixels, a multiple of 16; ArcFace's is 112.
    """
    from onnx import TensorProto, helper, numpy_helper, save_model

    if size < 16 or size % 16:
        raise ValueError(f"expected a size that is a multiple of 16, got {size}")
    rng = np.random.default_rng(seed)
    nodes, weights, current = [], [], "input.1"
    channels = 3
    for layer, (width, kernel, stride) in enumerate([(16, 7, 4), (32, 3, 2), (32, 3, 2)]):
        fan_in = channels * kernel * kernel
        kernels = rng.normal(0.0, fan_in**-0.5, (width, channels, kernel, kernel))
        weights.append(numpy_helper.from_array(kernels.astype(np.float32), f"conv{layer}.weight"))
        nodes.append(
            helper.make_node(
                "Conv",
                [current, f"conv{layer}.weight"],
                [f"conv{layer}"],
                name=f"conv{layer}",
                kernel_shape=[kernel, kernel],
                strides=[stride, stride],
                auto_pad="SAME_UPPER",
            )
        )
        nodes.append(
            helper.make_node("Tanh", [f"conv{layer}"], [f"act{layer}"], name=f"act{layer}")
        )
        current, channels = f"act{layer}", width
    features = channels * (size // 16) ** 2
    projection = rng.normal(0.0, features**-0.5, (features, 512)).astype(np.float32)
    weights.append(numpy_helper.from_array(projection, "projection.weight"))
    nodes.append(helper.make_node("Flatten", [current], ["features"], name="flatten"))
    nodes.append(
        helper.make_node("MatMul", ["features", "projection.weight"], ["embedding"], name="project")
    )
    graph = helper.make_graph(
        nodes,
        "random_recogniser",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 512])],
        weights,
    )
    model = helper.make_model(
        graph,
        producer_name="idea_jax random weights",
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    with atomic_write(path) as temporary:
        save_model(model, str(temporary))
