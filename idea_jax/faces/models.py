"""Face models: ONNX files that were looked at before they are run."""

import contextlib
import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from idea_jax.errors import InputError

SIZE = 112  # side of ArcFace's input, in pixels
WIDTH = 512  # length of an ArcFace embedding


# The CPU unless asked: JAX takes most of an accelerator's memory for itself. On CUDA, the operators
# that it lacks run on the CPU.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
}


SELECT = ("largest", "center", "left", "right")


# SHA-256 of the files of insightface's packs that hold no hashes themselves: buffalo_l, antelopev2,
# and the small detector and recogniser of buffalo_s and buffalo_sc. insightface publishes none for
# them; these are the values that many projects that pin the same release files agree on.
KNOWN_SHA256 = {
    "det_10g.onnx": "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
    "w600k_r50.onnx": "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
    "scrfd_10g_bnkps.onnx": "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
    "glintr100.onnx": "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
    "det_500m.onnx": "5e4447f50245bbd7966bd6c0fa52938c61474a04ec7def48753668a9d8b4ea3a",
    "w600k_mbf.onnx": "9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f",
}

# Recognisers that were trained on faces smaller than ArcFace's, by the SHA-256 of their files, and
# the least side of a crop that they need, in pixels: the mini's, whose pictures have 64.
TRAINED_SMALL = {"9054992b5ec17a255dac49210f6dce514b829beaf46869e55f6935a54812400f": 16}


class FaceError(InputError, ValueError):
    """A face model, crop or embedding that cannot be used; the message says what was expected."""


class PackagesMissing(FaceError):
    """A package that reads face models is not installed."""


@dataclass(frozen=True)
class Recogniser:
    """A loaded face recognition model.

    Attributes:
      model: insightface's `ArcFaceONNX`.
      path: the file it came from.
      sha256: hex digest of that file; embeddings of different models cannot be compared.
      provider: the onnxruntime provider that is really in use.
    """

    model: Any
    path: Path
    sha256: str
    provider: str


@dataclass(frozen=True)
class Detector:
    """A loaded face detector, insightface's `SCRFD`; attributes as those of `Recogniser`."""

    model: Any
    path: Path
    sha256: str
    provider: str


def check_select(select: str) -> None:
    """Raises FaceError unless `select` is one of `SELECT` or a number."""
    if select not in SELECT and not (select.isascii() and select.isdigit()):
        raise FaceError(
            f"--face_select must be one of {', '.join(SELECT)}, or a number that counts the faces "
            f"from the left, beginning with 0; got {select!r}"
        )


def manifest(folder: Path) -> Any:
    """Returns insightface's description of a pack with a manifest; None for one without."""
    if not (folder / "manifest.json").is_file():
        return None
    with packages_needed():
        from insightface.model_zoo import has_model_package_manifest, load_model_package
    if not has_model_package_manifest(folder):
        return None
    try:
        return load_model_package(folder)
    except (ValueError, TypeError, OSError) as error:
        raise FaceError(f"the manifest of the face model folder {folder}: {error}") from error


@contextlib.contextmanager
def packages_needed() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise PackagesMissing(
            f"faces need the packages insightface and onnxruntime ({error}); "
            "install them with: pip install insightface onnxruntime"
        ) from error


def load_recogniser(model_file: str | Path, provider: str = "cpu") -> Recogniser:
    """Loads an ArcFace model: one input float [*, 3, 112, 112], one output [*, 512].

    The file is inspected before onnxruntime sees it, since a model with external data makes it read
    any file that the model names; where its SHA-256 is known, that is compared as well.

    Args:
      provider: "cpu" or "cuda".

    Raises:
      FaceError: the file is missing, damaged, refers to other files, has another SHA-256 than is
        known of it, or has other inputs or outputs; the provider is not to be had; or
        insightface is not installed.
    """
    path = Path(model_file)
    model, digest = _open(path, provider, "recognition")
    return Recogniser(model, path, digest, model.session.get_providers()[0])


def load_detector(model_file: str | Path, provider: str = "cpu") -> Detector:
    """Loads an SCRFD face detector that gives five points per face: 9 or 15 outputs.

    Args, Raises: as `load_recogniser`.
    """
    path = Path(model_file)
    model, digest = _open(path, provider, "detection")
    return Detector(model, path, digest, model.session.get_providers()[0])


def _open(path: Path, provider: str, task: str) -> tuple[Any, str]:
    """Returns insightface's object for a model, and the file's SHA-256."""
    with packages_needed():
        import onnxruntime
        from insightface.model_zoo import get_model, preload_cuda_libraries
        from insightface.model_zoo.arcface_onnx import ArcFaceONNX
        from insightface.model_zoo.scrfd import SCRFD
    package = manifest(path.parent)
    declared = package.tasks.get(task) if package is not None else None
    if declared is not None and declared.path != path.resolve():
        declared = None
    expected = (declared.sha256 if declared else None) or KNOWN_SHA256.get(path.name)
    content, digest = inspect(path, expected)
    providers = PROVIDERS[provider]
    if providers[0] not in onnxruntime.get_available_providers():
        raise FaceError(_no_provider(provider, "this onnxruntime was built without it"))
    preload_cuda_libraries(providers)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: warnings about graph clean-up help nobody here
    settings = {"sess_options": options, "providers": list(providers)}
    # By default insightface builds a session for each size of a detector's input, from the file.
    one = {"static_shape_sessions": False}
    model = None
    try:
        if declared:
            # The manifest also says how the model wants its pixels. insightface opens the file
            # itself, and with the hash makes sure that it is still the one that was inspected.
            declared = replace(declared, sha256=digest)
            model = get_model(str(path), model_descriptor=declared, **settings, **one)
            session = model.session
        else:
            session = onnxruntime.InferenceSession(content, **settings)  # what was inspected
    except Exception as error:  # onnxruntime's errors share no public base class
        raise FaceError(f"onnxruntime cannot load the face model {path}: {error}") from error
    used = session.get_providers()[0]
    if used != providers[0]:  # onnxruntime itself only warns, and goes on with the CPU
        raise FaceError(_no_provider(provider, f"onnxruntime fell back to {used}"))
    # Without a manifest insightface gives every model float32. With one it has refused what it
    # cannot feed.
    types = ("tensor(float)", "tensor(uint8)") if declared else ("tensor(float)",)
    if task == "recognition":
        _check_recogniser(path, session, types)
        # It looks into the file itself, for whether the network scales colours.
        model = model or ArcFaceONNX(model_file=io.BytesIO(content), session=session)
    else:
        _check_detector(path, session, types)
        model = model or SCRFD(session=session, **one)
    return model, digest


def _no_provider(provider: str, why: str) -> str:
    return (
        f"--face_provider {provider}: {PROVIDERS[provider][0]} cannot be used ({why}); install "
        "onnxruntime-gpu with the CUDA libraries it names, or use --face_provider cpu"
    )


def inspect(path: Path, expected: str | None) -> tuple[bytes, str]:
    """Checks that `path` is one ONNX model without external data and, where it is known, that it
    has the expected SHA-256; returns its bytes and their SHA-256.

    Raises:
      FaceError: it is not.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FaceError(
            f"expected the ONNX file of a face model, such as w600k_r50.onnx, but {path} {what}"
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
    digest = hashlib.sha256(content).hexdigest()
    if expected not in (None, digest):
        raise FaceError(
            f"{path} is not the file that insightface gives this name: its SHA-256 is {digest}, "
            f"expected {expected}; it is damaged or was changed: remove its folder and "
            "download the pack again, or rename the file if it is a model of your own"
        )
    return content, digest


def _external_tensors(message: Any) -> Iterator:
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


def _check_recogniser(path: Path, session: Any, types: Sequence[str]) -> None:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    fits = (
        len(inputs) == 1
        and len(outputs) == 1
        and inputs[0].type in types
        and len(inputs[0].shape) == 4
        and list(inputs[0].shape[1:]) == [3, SIZE, SIZE]
        and len(outputs[0].shape) == 2
        and outputs[0].shape[1] == WIDTH
    )
    if not fits:
        raise FaceError(
            f"{path} is not an ArcFace recognition model: expected one input float "
            f"[*, 3, {SIZE}, {SIZE}] and one output [*, {WIDTH}], got {_interface(session)}"
        )


def _check_detector(path: Path, session: Any, types: Sequence[str]) -> None:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    fits = (
        len(inputs) == 1
        and inputs[0].type in types
        and len(inputs[0].shape) == 4
        and inputs[0].shape[1] == 3
        and len(outputs) in (9, 15)
    )
    if not fits:
        raise FaceError(
            f"{path} is not an SCRFD face detector with five points per face: expected one input "
            f"float [*, 3, *, *] and 9 or 15 outputs, got {_interface(session)}"
        )


def _interface(session: Any) -> str:
    return "; ".join(
        [f"input {item.name} {item.type} {item.shape}" for item in session.get_inputs()]
        + [f"output {item.name} {item.shape}" for item in session.get_outputs()]
    )
