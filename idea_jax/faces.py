"""From a picture to an ArcFace embedding, with insightface's own recognition class on the CPU.

Embeddings are biometric data: nothing here logs or prints them.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 112  # side of ArcFace's input, in pixels
WIDTH = 512  # length of an ArcFace embedding
# The CPU always: JAX takes most of an accelerator's memory for itself.
PROVIDERS = ("CPUExecutionProvider",)


class FaceError(ValueError):
    """A face model, crop or embedding that cannot be used; the message says what was expected."""


@dataclass(frozen=True)
class Recogniser:
    """A loaded face recognition model.

    Attributes:
        model: insightface's `ArcFaceONNX`.
        path: the file it came from.
        sha256: hex digest of that file; embeddings of different models cannot be compared.
        provider: the onnxruntime provider that is really in use.
    """

    model: object
    path: Path
    sha256: str
    provider: str


def load_recogniser(model_file: str | Path) -> Recogniser:
    """Loads an ArcFace model: one input float [*, 3, 112, 112], one output [*, 512].

    The file is inspected before onnxruntime sees it, since a model with external data makes it read
    any file that the model names.

    Raises:
        FaceError: the file is missing, damaged, refers to other files, or has other inputs or
            outputs; or insightface is not installed.
    """
    path = Path(model_file)
    try:
        import onnxruntime
        from insightface.model_zoo.arcface_onnx import ArcFaceONNX
    except ImportError as error:
        raise FaceError(
            f"faces need the packages insightface and onnxruntime ({error}); "
            "install them with: pip install insightface onnxruntime"
        ) from error

    digest = _inspect(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings about graph clean-up help nobody here
    try:
        session = onnxruntime.InferenceSession(
            str(path), sess_options=options, providers=list(PROVIDERS)
        )
    except Exception as error:  # onnxruntime's errors share no public base class
        raise FaceError(f"onnxruntime cannot load the face model {path}: {error}") from error
    _check_interface(path, session)
    model = ArcFaceONNX(model_file=str(path), session=session)
    return Recogniser(model, path, digest, session.get_providers()[0])


def _inspect(path: Path) -> str:
    """Checks that `path` is one ONNX model without external data; returns its SHA-256."""
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FaceError(
            f"expected the ONNX file of an ArcFace model, such as w600k_r50.onnx, but {path} {what}"
        )
    if path.stat().st_size >= 2**31:
        raise FaceError(f"{path} is larger than an ONNX file can be (2 GiB); is it a checkpoint?")
    try:
        content = path.read_bytes()
        model = onnx.load_model_from_string(content)
    except OSError as error:
        raise FaceError(f"the face model {path} cannot be read: {error.strerror}") from error
    except DecodeError as error:
        raise FaceError(
            f"the face model {path} is damaged or no ONNX file; download it again"
        ) from error
    if not model.graph.node:
        raise FaceError(
            f"the face model {path} ({len(content)} bytes) holds no network: it is empty, cut off "
            "or no ONNX file; download it again"
        )
    external = sorted({tensor.name for tensor in _external_tensors(model)})
    if external:
        raise FaceError(
            f"the face model {path} keeps weights in other files (external data: "
            f"{', '.join(external[:3])}), which is refused because it can name any file; "
            "save it as one file"
        )
    return hashlib.sha256(content).hexdigest()


def _external_tensors(message: object) -> Iterator:
    """Yields every tensor anywhere in an ONNX model (subgraphs, attributes, functions) that points
    to another file."""
    import onnx
    from google.protobuf.message import Message

    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            yield message
        return
    for _, value in message.ListFields():
        items = [value] if isinstance(value, Message) else value
        if not isinstance(items, str | bytes | int | float):
            for item in items:
                if isinstance(item, Message):
                    yield from _external_tensors(item)


def _check_interface(path: Path, session: object) -> None:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    expected = f"one input float [*, 3, {SIZE}, {SIZE}] and one output [*, {WIDTH}]"
    got = "; ".join(
        [f"input {item.name} {item.type} {item.shape}" for item in inputs]
        + [f"output {item.name} {item.shape}" for item in outputs]
    )
    fits = (
        len(inputs) == 1
        and len(outputs) == 1
        and inputs[0].type == "tensor(float)"
        and len(inputs[0].shape) == 4
        and list(inputs[0].shape[1:]) == [3, SIZE, SIZE]
        and len(outputs[0].shape) == 2
        and outputs[0].shape[1] == WIDTH
    )
    if not fits:
        raise FaceError(
            f"{path} is not an ArcFace recognition model: expected {expected}, got {got}"
        )


def face_crop(image: Image.Image, *, pre_aligned: bool) -> np.ndarray:
    """Returns the RGB crop uint8[112, 112, 3] that the recogniser takes.

    Args:
        image: 8-bit RGB.
        pre_aligned: `image` is an aligned 112x112 crop already and is used as it is. Otherwise its
            central square is scaled, without looking for a face.

    Raises:
        FaceError: `image` is not RGB, or `pre_aligned` and not 112x112.
    """
    if image.mode != "RGB":
        raise FaceError(f"expected an RGB picture, got mode {image.mode}")
    if not pre_aligned:
        width, height = image.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        # Cropped first: with `box`, Pillow's filter would reach beyond the square.
        square = image.crop((left, top, left + side, top + side))
        return np.array(square.resize((SIZE, SIZE), resample=Image.Resampling.BICUBIC))
    if image.size != (SIZE, SIZE):
        width, height = image.size
        raise FaceError(
            f"expected an aligned crop of {SIZE} x {SIZE} pixels, got {width} x {height}; "
            "leave out --pre_aligned for an ordinary photo"
        )
    return np.array(image)


def embed_faces(recogniser: Recogniser, crops: Sequence[np.ndarray]) -> np.ndarray:
    """Returns float32[P, 512] of unit norm for P crops uint8[112, 112, 3] in RGB.

    Raises:
        FaceError: there is no crop, one has another shape or dtype, or its embedding is not finite
            or zero.
    """
    if len(crops) == 0:
        raise FaceError("expected at least one face crop, got none")
    embeds = []
    for index, crop in enumerate(crops):
        crop = np.asarray(crop)
        if crop.shape != (SIZE, SIZE, 3) or crop.dtype != np.uint8:
            raise FaceError(
                f"expected face crop {index} to be uint8[{SIZE}, {SIZE}, 3], "
                f"got {crop.dtype}{list(crop.shape)}"
            )
        # insightface works on OpenCV's channel order, and swaps it back before the network. One at
        # a time, since some exported models have a fixed batch of one.
        bgr = np.ascontiguousarray(crop[:, :, ::-1])
        embeds.append(recogniser.model.get_feat(bgr).reshape(-1))
    return _normalise(np.stack(embeds), "the embedding of face crop")


def mean_embedding(embeds: np.ndarray) -> np.ndarray:
    """Returns float32[512] of unit norm: the normalised mean of unit embeddings float32[P, 512].

    Raises:
        FaceError: wrong shape, a value that is not finite, or embeddings that cancel out.
    """
    embeds = np.asarray(embeds, np.float32)
    if embeds.ndim != 2 or embeds.shape[0] == 0:
        raise FaceError(f"expected embeddings [P, {WIDTH}] with P >= 1, got {list(embeds.shape)}")
    mean = embeds.astype(np.float64).mean(axis=0, keepdims=True)
    return _normalise(mean, "the mean embedding")[0]


def _normalise(embeds: np.ndarray, what: str) -> np.ndarray:
    embeds = embeds.astype(np.float64)
    norms = np.linalg.norm(embeds, axis=1, keepdims=True)
    bad = ~np.isfinite(norms[:, 0]) | (norms[:, 0] < 1e-6)
    if bad.any():
        rows = ", ".join(str(row) for row in np.flatnonzero(bad))
        raise FaceError(
            f"{what} (row {rows}) is zero or not finite; check the picture and the face model"
        )
    return (embeds / norms).astype(np.float32)
