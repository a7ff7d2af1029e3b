"""Which ONNX files are a run's face models: the given, the checkpoint's, or a pack's."""

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from idea_jax.faces.models import (
    KNOWN_SHA256,
    SIZE,
    FaceError,
    PackagesMissing,
    manifest,
    packages_needed,
)
from idea_jax.runtime.files import is_lfs_pointer

log = logging.getLogger(__name__)

# The packs that are looked for in insightface's own folder, best known first; the first is the one
# that is downloaded.
PACKS = ("buffalo_l", "antelopev2")

EXPECTED = (
    "expected a folder of insightface: a detector such as det_10g.onnx and a recogniser such as "
    "w600k_r50.onnx (pack buffalo_l)"
)

# The packs that insightface names, and its files as they are called in them and on their own. Its
# models have the same terms wherever a copy of them lies.
NAMED = (
    "buffalo_l buffalo_m buffalo_s buffalo_sc antelope antelopev2 raccoon_l raccoon_s cheetah_l "
    "cheetah_s"
).split()
ITS_FILES = re.compile(
    r"(det_\d+(\.\d)?[gm]|scrfd_.+|retinaface_.+|w600k_.+|glintr?\d+k?.*|webface.+|ms1mv\d.*|"
    r"r\d+_(glint|ms1m|webface|casia).*|arcface_r\d+.*)\.onnx",
    re.IGNORECASE,
)

LICENCE = "insightface's face models are for non-commercial research only"


class NotInPack(FaceError):
    """A folder has no model for a task, nor a damaged file that could be one."""


def find_recogniser(
    face_model: str | Path | None,
    face_model_dir: str | Path | None,
    own_folder: Path | None,
    *,
    accept_licence: bool,
) -> Path:
    """Returns the recognition model of a run.

    It is the file given, or that of the pack given, or that in the checkpoint's own folder, or that
    of a pack in insightface's folder; failing these, and only with `accept_licence`, that of the
    pack which insightface then downloads. The detector that belongs to it lies in the same folder.

    Raises:
      FaceError: there is none, the pack is unusable, or the download fails.
    """
    if face_model is not None:
        return Path(os.path.expanduser(face_model))
    if face_model_dir is not None:
        # Not Path.expanduser, which fails where there is no home: this leaves the name as it is.
        return find_in_pack(Path(os.path.expanduser(face_model_dir)), "recognition")
    if own_folder is not None and any(own_folder.glob("*.onnx")):
        return find_in_pack(own_folder, "recognition")
    packs = packs_folder()
    for name in PACKS if packs else ():
        folder = packs / name
        if folder.exists():
            try:
                return find_in_pack(folder, "recognition")
            except PackagesMissing:
                raise
            except FaceError as error:
                raise FaceError(
                    f"{error}. Remove {folder} to have a pack downloaded again"
                ) from error
    if not accept_licence:
        raise FaceError(
            "this run needs a face model: give --face_model_dir PACK (a folder of insightface with "
            "a detector and a recogniser), or --face_model FILE.onnx (ArcFace, 112x112 input), or "
            f"--accept_face_licence to let insightface download {PACKS[0]} (290 MB; {LICENCE}); "
            "or train without a face: --profile cross_init"
        )
    return find_in_pack(download(PACKS[0]), "recognition")


def packs_folder() -> Path | None:
    """Where insightface keeps its packs by default; None for a user without a home folder."""
    home = os.path.expanduser("~")
    return None if home == "~" else Path(home) / ".insightface" / "models"


def find_in_pack(folder: Path, task: str) -> Path:
    """Returns the ONNX file of a pack for a task, "recognition" or "detection".

    As in insightface: what the pack's manifest names, otherwise the first file by name that looks
    like such a model.

    Raises:
      NotInPack: the folder is empty or nested, or it has no such file; the message lists what was
        found.
      FaceError: the folder is missing or unreadable, its manifest is damaged, or a file that
        could be the one is.
    """
    if not folder.exists():
        raise FaceError(f"the face model folder {folder} does not exist; {EXPECTED}")
    if not folder.is_dir():
        raise FaceError(
            f"{folder} is a file: give the folder that holds it, or the file itself with "
            f"--face_model; {EXPECTED}"
        )
    package = manifest(folder)
    if package is not None:
        if task not in package.tasks:
            raise NotInPack(f"the manifest of {folder} names no {task} model; {EXPECTED}")
        return package.tasks[task].path
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise FaceError(
            f"the face model folder {folder} cannot be read: {error.strerror}"
        ) from error
    files = [path for path in entries if path.suffix == ".onnx"]
    if not files:
        nested = sorted({path.parent for path in folder.glob("*/*.onnx")})
        if nested:
            raise NotInPack(
                f"{folder} holds no .onnx file itself, but {nested[0]} does (some archives nest "
                f"the folder): give --face_model_dir {nested[0]}, or move its files up; {EXPECTED}"
            )
        found = ", ".join(path.name for path in entries[:5]) or "nothing"
        raise NotInPack(
            f"the face model folder {folder} holds no .onnx file, but {found}; {EXPECTED}"
        )
    tasks = {}
    for path in files:
        tasks[path.name] = _task_of(path)
        if tasks[path.name] == task:
            return path
    found = ", ".join(f"{name} ({what})" for name, what in tasks.items())
    message = f"the face model folder {folder} has no {task} model: {found}; {EXPECTED}"
    if any(what.startswith("damaged") for what in tasks.values()):
        raise FaceError(f"{message}. Replace or remove the damaged file")
    if task == "detection":
        message += (
            ". Add the detector of the same pack (det_10g.onnx of buffalo_l, scrfd_10g_bnkps.onnx "
            "of antelopev2); without one, --face_model FILE takes the central square of each photo "
            "for the face, but not with --crop face or --face_select"
        )
    raise NotInPack(message)


def _task_of(path: Path) -> str:
    """What an ONNX file is for, by its inputs and outputs, as insightface tells them apart."""
    with packages_needed():
        import onnx
        from google.protobuf.message import DecodeError

    try:
        if is_lfs_pointer(path):
            return "damaged: a pointer of git-lfs, run git lfs pull"
        graph = onnx.load(path, load_external_data=False).graph
    except (DecodeError, OSError, ValueError):
        return "damaged"
    weights = {tensor.name for tensor in graph.initializer}
    shapes = [
        [size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in graph.input
        if value.name not in weights
    ]
    if not graph.node:
        return "damaged"
    if len(graph.output) >= 5:
        return "detection"
    if len(graph.output) == 1 and len(shapes) == 1 and shapes[0][1:] == [3, SIZE, SIZE]:
        return "recognition"
    return "for something else"


def download(name: str) -> Path:
    """Has insightface download a pack into its own folder; returns that.

    Raises:
      FaceError: it cannot be had. Whatever stops it, nothing incomplete is left.
    """
    with packages_needed():
        from insightface.utils import storage
    packs = packs_folder()
    if packs is None:
        raise FaceError(
            "there is no home folder for insightface's packs: set HOME, or give --face_model_dir"
        )
    folder = packs / name
    log.warning("insightface downloads its pack %s to %s", name, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # insightface would take a half unpacked folder for the pack ever after: renamed when whole.
        with (
            tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as root,
            contextlib.redirect_stdout(sys.stderr),  # standard output is for results
        ):
            os.replace(storage.ensure_available("models", name, root=root), folder)
    except Exception as error:  # of the HTTP library, the archive, the disk
        raise FaceError(
            f"insightface could not download {name} ({type(error).__name__}: {error}); where there "
            f"is network, fetch {storage.model_zoo_download_url(f'{name}.zip')}, unpack it to "
            f"{folder}, or give its folder with --face_model_dir"
        ) from error
    return folder


def licence(files: Sequence[Path]) -> str | None:
    """Returns what has to be said of the terms of face models; None if they are not insightface's.

    Args:
      files: the models that are used.

    Raises:
      FaceError: the manifest of their pack is damaged.
    """
    for file in files:
        if (
            file.name in KNOWN_SHA256
            or ITS_FILES.fullmatch(file.name)
            or file.parent.name in NAMED
            or file.parent.parent == packs_folder()
        ):
            return LICENCE
    for package in (manifest(folder) for folder in {file.parent for file in files}):
        if package is not None:  # as insightface has it: without that file, these terms hold
            return f"{LICENCE}, unless {package.license_path} says otherwise"
    return None
