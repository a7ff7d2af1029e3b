"""A face detector of SCRFD's shape that answers with fixed faces, so that insightface's own
pre-processing, decoding, suppression of doubles and alignment run around it."""

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

STRIDES = (8, 16, 32)
ANCHORS = 2
# Eyes, nose and corners of the mouth in ArcFace's crop of 112 pixels, as insightface has them.
TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


def similarity(angle, scale, shift):
    """The matrix [2, 3] that turns by `angle` degrees, scales, then shifts."""
    c, s = np.cos(np.radians(angle)) * scale, np.sin(np.radians(angle)) * scale
    return np.array([[c, -s, shift[0]], [s, c, shift[1]]])


def apply(matrix, points):
    return np.asarray(points) @ matrix[:, :2].T + matrix[:, 2]


def face(x, y, side, score=0.9, angle=0.0):
    """(box, points, score) of a face whose aligned crop is a square of `side` around (x, y)."""
    matrix = similarity(angle, side / 112, (0, 0))
    points = apply(matrix, TEMPLATE - 56) + np.array([[x, y]])
    half = 0.4 * side
    return np.array([x - half, y - half, x + half, y + half]), points, score


def write_detector(
    path: Path, faces, *, size=640, only_up_to=None, only_with_corner=None, points=True, fixed=False
):
    """Writes the model.

    Args:
        faces: (box [4], points [5, 2], score) each, in pixels of a detector input of side `size`.
        only_up_to: no face is seen in a larger input.
        only_with_corner: no face is seen unless this is the colour (RGB) of the upper left corner.
        points: whether there are outputs for the points.
        fixed: whether the input has this size and no other.
    """
    count = {s: (640 // s) ** 2 * ANCHORS for s in STRIDES}
    tables = {s: [np.zeros((count[s], n), np.float32) for n in (1, 4, 10)] for s in STRIDES}
    for box, five, score in faces:
        # Seen at two anchors of stride 8 and one of 16, as real detectors do; all but the best of
        # the three are suppressed.
        for stride, anchor, loss in ((8, 0, 0.0), (8, 1, 0.03), (16, 0, 0.05)):
            cell = (np.array([box[0] + box[2], box[1] + box[3]]) / 2).clip(0, size - 1) // stride
            row = int((cell[1] * (size // stride) + cell[0]) * ANCHORS) + anchor
            center = cell * stride
            scores, boxes, kps = tables[stride]
            scores[row] = score - loss
            boxes[row] = np.concatenate([center - box[:2], box[2:] - center]) / stride
            kps[row] = ((np.asarray(five) - center) / stride).reshape(-1)

    nodes, weights, outputs = [], [], []

    def constant(name, value):
        weights.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(operator, inputs, output, **attributes):
        nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    shape = node("Shape", ["input.1"], "shape")
    height = node("Gather", [shape, constant("two", np.int64(2))], "height")
    width = node("Gather", [shape, constant("three", np.int64(3))], "width")
    gate = constant("open", np.float32(1))
    if only_up_to is not None:
        small = node("LessOrEqual", [width, constant("limit", np.int64(only_up_to))], "small")
        gate = node("Cast", [small], "is_small", to=TensorProto.FLOAT)
    if only_with_corner is not None:
        starts, ends = constant("from", np.int64([0, 0])), constant("to", np.int64([4, 4]))
        corner = node(
            "Slice", ["input.1", starts, ends, constant("hw", np.int64([2, 3]))], "corner"
        )
        # As insightface's SCRFD scales colours.
        colour = (np.float32(only_with_corner) - 127.5) / 128
        difference = node(
            "Sub", [corner, constant("colour", colour.reshape(1, 3, 1, 1))], "differs"
        )
        most = node("ReduceMax", [node("Abs", [difference], "abs")], "most", keepdims=0)
        alike = node("Less", [most, constant("nearly", np.float32(0.02))], "alike")
        gate = node("Cast", [alike], "is_alike", to=TensorProto.FLOAT)

    zero, axis = constant("zero", np.int64([0])), constant("axis", np.int64([0]))
    kinds = (("score", 1), ("bbox", 4), ("kps", 10))[: 3 if points else 2]
    for number, (kind, n) in enumerate(kinds):
        for s in STRIDES:
            stride = constant(f"stride_{kind}_{s}", np.int64(s))
            cells = node(
                "Mul",
                [
                    node("Div", [height, stride], f"rows_{kind}_{s}"),
                    node("Div", [width, stride], f"columns_{kind}_{s}"),
                ],
                f"cells_{kind}_{s}",
            )
            rows = node(
                "Mul", [cells, constant(f"n_{kind}_{s}", np.int64(ANCHORS))], f"a_{kind}_{s}"
            )
            end = node(
                "Reshape", [rows, constant(f"one_{kind}_{s}", np.int64([1]))], f"e_{kind}_{s}"
            )
            table = constant(f"table_{kind}_{s}", tables[s][number])
            sliced = node("Slice", [table, zero, end, axis], f"sliced_{kind}_{s}")
            other = gate if kind == "score" else constant(f"unit_{kind}_{s}", np.float32(1))
            node("Mul", [sliced, other], f"{kind}_{s}")
            outputs.append(
                helper.make_tensor_value_info(f"{kind}_{s}", TensorProto.FLOAT, [f"n_{s}", n])
            )
    sides = [size, size] if fixed else ["h", "w"]
    graph = helper.make_graph(
        nodes,
        "scrfd",
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, *sides])],
        outputs,
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path
