"""ArcFace through insightface: what the network sees, what comes out, which files are refused."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from idea_jax.faces import embedding, random_model
from idea_jax.faces import models as face_models
from idea_jax.faces.crops import face_crop

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory):
    path = tmp_path_factory.mktemp("face") / "random.onnx"
    random_model.write_random_recogniser(path, seed=3)
    return face_models.load_recogniser(path)


def crops(count):
    return [RNG.integers(0, 256, (112, 112, 3), np.uint8) for _ in range(count)]


def write_model(path, nodes, weights, inputs=None, outputs=None, kind=TensorProto.FLOAT):
    """Writes an ONNX model, from `x` [batch, 3, 112, 112] to `y` [batch, 512] by default."""
    inputs = inputs or {"x": ["batch", 3, 112, 112]}
    outputs = outputs or {"y": ["batch", 512]}
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(n, kind, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [
            value if isinstance(value, TensorProto) else numpy_helper.from_array(value, name)
            for name, value in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def write_probe(path, batch="batch", embedded=False):
    """A model whose output is (mean of channel 0, of channel 1, of channel 2, 1, 0, 0, ...).

    With `embedded`, its own first nodes scale 0..255 to [-1, 1], as in models converted from MXNet.
    """
    weights = {"w": np.eye(3, 512, dtype=np.float32), "b": np.eye(1, 512, 3, np.float32)[0]}
    nodes, start = [], "x"
    if embedded:
        weights |= {"mean": np.float32(127.5), "scale": np.float32(1 / 127.5)}
        nodes = [
            helper.make_node("Sub", ["x", "mean"], ["s"], name="Sub_0"),
            helper.make_node("Mul", ["s", "scale"], ["m"], name="Mul_0"),
        ]
        start = "m"
    nodes += [
        helper.make_node("ReduceMean", [start], ["r"], name="r", axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["r", "w", "b"], ["y"], name="y"),
    ]
    return write_model(path, nodes, weights, {"x": [batch, 3, 112, 112]}, {"y": [batch, 512]})


# --- what reaches the network, and what comes out -------------------------------------------------


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("batch", ["batch", 1])
def test_network_sees_rgb_scaled_to_minus_one_and_one(tmp_path, embedded, batch):
    recogniser = face_models.load_recogniser(write_probe(tmp_path / "probe.onnx", batch, embedded))
    colours = np.array([[255, 127, 0], [10, 200, 60]], np.uint8)
    pictures = [np.broadcast_to(colour, (112, 112, 3)) for colour in colours]
    embeds = embedding.embed_faces(recogniser, pictures)
    expected = (colours.astype(np.float64) - 127.5) / 127.5
    # The probe sums 12,544 float32 pixels per channel; measured error 2e-5.
    np.testing.assert_allclose(embeds[:, :3] / embeds[:, 3:4], expected, atol=1e-4)


def test_embeddings_equal_onnxruntime_alone_and_have_unit_norm(recogniser):
    import onnxruntime

    pictures = crops(3)
    embeds = embedding.embed_faces(recogniser, pictures)
    session = onnxruntime.InferenceSession(str(recogniser.path), providers=["CPUExecutionProvider"])
    batch = (np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32) - 127.5) / 127.5
    (expected,) = session.run(None, {session.get_inputs()[0].name: batch})
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert embeds.dtype == np.float32 and embeds.shape == (3, 512)
    np.testing.assert_allclose(embeds, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1.0, atol=1e-6)


def test_recogniser_names_its_file_hash_and_provider(recogniser):
    import hashlib

    assert recogniser.sha256 == hashlib.sha256(recogniser.path.read_bytes()).hexdigest()
    assert recogniser.provider == "CPUExecutionProvider"
    assert recogniser.model.session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("crop", "message"),
    [
        (np.zeros((112, 111, 3), np.uint8), r"crop 1 .* got uint8\[112, 111, 3\]"),
        (np.zeros((112, 112, 3), np.float32), "got float32"),
        (np.zeros((112, 112), np.uint8), r"got uint8\[112, 112\]"),
    ],
)
def test_embed_faces_refuses_other_crops(recogniser, crop, message):
    with pytest.raises(face_models.FaceError, match=message):
        embedding.embed_faces(recogniser, [*crops(1), crop])
    with pytest.raises(face_models.FaceError, match="at least one"):
        embedding.embed_faces(recogniser, [])


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_embedding_that_is_zero_or_not_finite_is_refused_without_values(tmp_path, value):
    weights = {"w": np.full((3, 512), value, np.float32)}
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["r"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    recogniser = face_models.load_recogniser(write_model(tmp_path / "bad.onnx", nodes, weights))
    with pytest.raises(
        face_models.FaceError, match=r"row 0\) is zero or not finite; check the picture"
    ):
        embedding.embed_faces(recogniser, crops(1))


def test_model_that_cannot_process_a_crop_is_named(tmp_path):
    """onnxruntime refuses a crop, since this model takes two at a time only."""
    recogniser = face_models.load_recogniser(write_probe(tmp_path / "pairs.onnx", batch=2))
    with pytest.raises(face_models.FaceError, match=r"pairs\.onnx cannot process a crop \(Invalid"):
        embedding.embed_faces(recogniser, crops(1))


def test_model_of_bytes_needs_a_manifest(tmp_path):
    """Without one, insightface gives every model float32."""
    weights = {"w": np.eye(3, 512, dtype=np.float32), "b": np.eye(1, 512, 3, np.float32)[0]}
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["r"], axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["r", "w", "b"], ["y"]),
    ]
    path = write_model(tmp_path / "bytes.onnx", nodes, weights, kind=TensorProto.UINT8)
    with pytest.raises(
        face_models.FaceError, match=r"is not an ArcFace .* got input x tensor\(uint8\)"
    ):
        face_models.load_recogniser(path)
    task = {"file": "bytes.onnx", "preprocessing": "embedded"}
    manifest = {"manifest_version": 2, "model_id": "own", "license": "MODEL.LICENSE"}
    (tmp_path / "manifest.json").write_text(
        json.dumps({**manifest, "tasks": {"recognition": task}})
    )
    colour = np.array([10, 200, 60], np.uint8)
    (embed,) = embedding.embed_faces(
        face_models.load_recogniser(path), [np.broadcast_to(colour, (112, 112, 3))]
    )
    np.testing.assert_allclose(embed[:3] / embed[3], colour, rtol=1e-4)


def test_mean_embedding_is_the_normalised_mean():
    embeds = np.eye(3, 512, dtype=np.float32)
    mean = embedding.mean_embedding(embeds)
    assert mean.dtype == np.float32 and mean.shape == (512,)
    np.testing.assert_allclose(mean[:3], 3**-0.5, rtol=1e-6)
    np.testing.assert_array_equal(embedding.mean_embedding(embeds[:1]), embeds[0])
    with pytest.raises(face_models.FaceError, match="zero or not finite"):
        embedding.mean_embedding(np.stack([embeds[0], -embeds[0]]))
    for other in (embeds[0], embeds[:0]):
        with pytest.raises(face_models.FaceError, match=r"expected embeddings \[P, 512\]"):
            embedding.mean_embedding(other)


def test_embeddings_tell_pictures_apart_and_seeds_differ(recogniser, tmp_path):
    pictures = crops(2)
    first = embedding.embed_faces(recogniser, [*pictures, pictures[0]])
    assert first[0] @ first[2] > 0.9999 and first[0] @ first[1] < 0.5
    for seed in (3, 4):
        random_model.write_random_recogniser(tmp_path / f"{seed}.onnx", seed)
    same = (tmp_path / "3.onnx").read_bytes() == recogniser.path.read_bytes()
    assert same and (tmp_path / "3.onnx").read_bytes() != (tmp_path / "4.onnx").read_bytes()
    with pytest.raises(ValueError, match="multiple of 16"):
        random_model.write_random_recogniser(tmp_path / "a.onnx", size=100)


def test_loading_and_embedding_print_nothing(recogniser):
    code = (
        "import sys, numpy as np; from idea_jax.faces import embedding, models; "
        "assert 'insightface' not in sys.modules and 'onnx' not in sys.modules; "
        f"model = models.load_recogniser({str(recogniser.path)!r}); "
        "embedding.embed_faces(model, [np.full((112, 112, 3), 9, np.uint8)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# --- crops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (112, 112), (64, 40), (501, 333)])
def test_face_crop_takes_the_central_square(size):
    width, height = size
    side = min(size)
    image = Image.new("RGB", size, (250, 0, 0))
    left, top = (width - side) // 2, (height - side) // 2
    image.paste((0, 250, 0), (left, top, left + side, top + side))
    crop = face_crop(image, pre_aligned=False)
    assert crop.shape == (112, 112, 3) and crop.dtype == np.uint8
    assert (crop == (0, 250, 0)).all()


def test_face_crop_averages_when_it_shrinks():
    """A fine checkerboard becomes grey; plain sampling would leave black or white."""
    checks = (np.indices((1120, 1120)).sum(0) % 2 * 255).astype(np.uint8)
    crop = face_crop(Image.fromarray(checks).convert("RGB"), pre_aligned=False)
    np.testing.assert_allclose(crop, 127.5, atol=2)


def test_pre_aligned_crop_is_used_as_it_is():
    pixels = crops(1)[0]
    np.testing.assert_array_equal(face_crop(Image.fromarray(pixels), pre_aligned=True), pixels)
    with pytest.raises(
        face_models.FaceError, match=r"112 x 112 pixels, got 128 x 112.*--pre_aligned"
    ):
        face_crop(Image.new("RGB", (128, 112)), pre_aligned=True)
    with pytest.raises(face_models.FaceError, match="got mode L"):
        face_crop(Image.new("L", (112, 112)), pre_aligned=True)


# --- files that are refused -----------------------------------------------------------------------


@pytest.fixture
def no_onnxruntime(monkeypatch):
    """Makes it an error to reach onnxruntime."""
    import insightface.model_zoo  # noqa: F401  (derives a class from the one replaced here)
    import onnxruntime

    def session(*_, **__):
        raise AssertionError("onnxruntime has been given the file")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)


def external_tensor():
    tensor = numpy_helper.from_array(np.zeros((3, 512), np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../../etc/passwd"), ("offset", "0"), ("length", "6144")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return tensor


@pytest.mark.parametrize("place", ["initializer", "constant", "subgraph", "function"])
def test_external_data_is_refused_before_onnxruntime(tmp_path, no_onnxruntime, place):
    path = tmp_path / "outside.onnx"
    constant = helper.make_node("Constant", [], ["w"], value=external_tensor())
    tail = [
        helper.make_node("ReduceMean", ["x"], ["r"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    if place == "initializer":
        write_model(path, tail, {"w": external_tensor()})
    elif place == "constant":
        write_model(path, [constant, *tail], {})
    elif place == "subgraph":
        branch = helper.make_graph(
            [constant], "b", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 512])]
        )
        choose = helper.make_node("If", ["c"], ["w"], then_branch=branch, else_branch=branch)
        write_model(path, [choose, *tail], {"c": np.array(True)})
    else:
        write_model(path, tail, {"w": np.zeros((3, 512), np.float32)})
        model = onnx.load_model_from_string(path.read_bytes())
        opset = [helper.make_opsetid("", 17)]
        model.functions.append(helper.make_function("own", "f", [], ["w"], [constant], opset))
        path.write_bytes(model.SerializeToString())
    with pytest.raises(face_models.FaceError, match=r"outside\.onnx .*external data: w\).*refused"):
        face_models.load_recogniser(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no network"),
        (b"<html>404 not found</html>", "damaged or no ONNX file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "damaged or no ONNX file"),
        (bytes(1000), "damaged or no ONNX file|holds no network"),
    ],
)
def test_other_files_are_refused_before_onnxruntime(tmp_path, no_onnxruntime, content, message):
    (tmp_path / "face.onnx").write_bytes(content)
    with pytest.raises(
        face_models.FaceError, match=rf"face\.onnx .*({message}).*download it again"
    ):
        face_models.load_recogniser(tmp_path / "face.onnx")


def test_cut_model_is_refused_wherever_it_is_cut(tmp_path, recogniser):
    whole = recogniser.path.read_bytes()
    for share in (0.0001, 0.01, 0.5, 0.9, 0.99999):
        (tmp_path / "cut.onnx").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(face_models.FaceError, match=r"cut\.onnx"):
            face_models.load_recogniser(tmp_path / "cut.onnx")


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(face_models.FaceError, match=r"absent\.onnx does not exist"):
        face_models.load_recogniser(tmp_path / "absent.onnx")
    with pytest.raises(face_models.FaceError, match="is a folder"):
        face_models.load_recogniser(tmp_path)


def test_other_input_size_is_refused_naming_both(tmp_path):
    random_model.write_random_recogniser(tmp_path / "big.onnx", size=128)
    with pytest.raises(
        face_models.FaceError, match=r"expected .*\[\*, 3, 112, 112\].*3, 128, 128\]"
    ):
        face_models.load_recogniser(tmp_path / "big.onnx")


@pytest.mark.parametrize("case", ["width", "two inputs", "many outputs", "grey"])
def test_models_for_something_else_are_refused(tmp_path, case):
    width = 256 if case == "width" else 512
    channels = 1 if case == "grey" else 3
    inputs = {"x": ["batch", channels, 112, 112]}
    outputs = {"y": ["batch", width]}
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["r"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["r", "w"], ["y"]),
    ]
    if case == "two inputs":
        inputs["z"] = ["batch", 512]
        nodes[1] = helper.make_node("MatMul", ["r", "w"], ["p"])
        nodes.append(helper.make_node("Add", ["p", "z"], ["y"]))
    if case == "many outputs":
        outputs["r"] = ["batch", 3]
    weights = {"w": np.zeros((channels, width), np.float32)}
    write_model(tmp_path / "other.onnx", nodes, weights, inputs, outputs)
    with pytest.raises(
        face_models.FaceError, match="is not an ArcFace recognition model: expected"
    ):
        face_models.load_recogniser(tmp_path / "other.onnx")


def test_graph_that_onnxruntime_refuses_gives_one_error(tmp_path):
    nodes = [helper.make_node("NoSuchOperator", ["x"], ["y"])]
    with pytest.raises(face_models.FaceError, match=r"cannot load the face model .*odd\.onnx"):
        face_models.load_recogniser(write_model(tmp_path / "odd.onnx", nodes, {}))


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface.model_zoo.arcface_onnx", None)
    with pytest.raises(face_models.FaceError, match="pip install insightface onnxruntime"):
        face_models.load_recogniser(tmp_path / "a.onnx")
