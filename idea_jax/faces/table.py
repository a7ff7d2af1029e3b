"""The file of precomputed faces: one row per picture, found by the SHA-256 of the picture.

A safetensors file, P rows: `embeddings` float32[P, 512] of unit norm, `boxes` float32[P, 4] (left,
top, right, bottom) and `points` float32[P, 5, 2] in pixels of the upright picture, `scores`
float32[P], `picture_sha256` and `crop_sha256` uint8[P, 32]. The embeddings are biometric data.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np

from idea_jax.faces.models import WIDTH, FaceError
from idea_jax.runtime.files import write_tensors

_KEY = "idea_jax.faces"
_VERSION = 2  # version 1 did not say how often a face was looked at: once
_SHAPES = {
    "embeddings": ((WIDTH,), np.float32),
    "boxes": ((4,), np.float32),
    "points": ((5, 2), np.float32),
    "scores": ((), np.float32),
    "picture_sha256": ((32,), np.uint8),
    "crop_sha256": ((32,), np.uint8),
}


class Sight(NamedTuple):
    """What is known of the face on one picture.

    Attributes:
      box: float32[4], left, top, right, bottom in pixels of the upright picture.
      points: float32[5, 2], eyes, nose and corners of the mouth, x and y in the same pixels; None
        if nobody looked for them.
      score: the detector's, 0 to 1; 1 where none was used.
      crop_sha256: hex digest of the pixels that the recogniser was given.
      embed: float32[512] of unit norm; None if no recogniser was used.
    """

    box: np.ndarray
    points: np.ndarray | None
    score: float
    crop_sha256: str
    embed: np.ndarray | None


@dataclass(frozen=True)
class About:
    """How all rows of a table were made; rows of different making cannot stand in one table."""

    face_model: str | None  # SHA-256 of the recogniser, if there was one
    detector: str | None  # SHA-256 of the detector, if there was one
    face_select: str
    pre_aligned: bool
    looks: int  # 3 if each face was looked at again after it was cut out (`finding.look_again`),
    # upright and upside down; 2 if upright alone, in older files


@dataclass(frozen=True)
class FaceTable:
    """Precomputed faces.

    Attributes:
      about: how they were made.
      rows: SHA-256 of a picture -> its face.
      names: SHA-256 of a picture -> its file name, for people who read the file.
    """

    about: About
    rows: Mapping[str, Sight]
    names: Mapping[str, str]

    def look(self, picture: Any) -> Sight:
        """Returns a picture's row.

        Raises:
          FaceError: there is none.
        """
        sight = self.rows.get(picture.sha256())
        if sight is None:
            raise FaceError(
                f"{picture} is not among the {len(self.rows)} pictures of --face_embeddings; run "
                "python -m idea_jax.faces again on its folder or data set (it adds what is "
                "missing), and see whether it finds a face there"
            )
        return sight


def read(path: str | Path) -> FaceTable:
    """Reads a table.

    Raises:
      FaceError: the file is missing or is no complete, finite table of this version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FaceError(
            f"the file of face embeddings {path} does not exist; write it with: "
            f"python -m idea_jax.faces PHOTOS --out {path}"
        )
    try:
        with safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            arrays = {name: file.get_tensor(name) for name in _SHAPES if name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as error:
        # AttributeError: a number type that NumPy lacks; RecursionError: deeply nested JSON.
        raise FaceError(
            f"{path} is damaged or no safetensors file ({error}); delete it and write it again"
        ) from error
    if isinstance(about, dict) and about.get("format_version") == 1:
        about = {**about, "format_version": _VERSION, "looks": 1}
    expected = {"format_version": int, "names": list, **get_type_hints(About)}
    is_table = (
        isinstance(about, dict)
        and set(about) == set(expected)
        and all(isinstance(about[name], kind) for name, kind in expected.items())
        and all(isinstance(name, str) for name in about["names"])
        and set(arrays) == set(_SHAPES)
    )
    if not is_table or about["format_version"] != _VERSION:
        found = about.get("format_version") if isinstance(about, dict) else None
        other = f" (it has {found})" if found not in (None, _VERSION) else ""
        raise FaceError(
            f"{path} holds no face embeddings of format version 1 or {_VERSION}{other}; expected a "
            "file that python -m idea_jax.faces wrote: write it again with this version, or "
            "install the idea_jax that wrote it"
        )
    count = len(about["names"])
    for name, (shape, dtype) in _SHAPES.items():
        if arrays[name].shape != (count, *shape) or arrays[name].dtype != dtype:
            raise FaceError(
                f"{path}: expected {name} to be {np.dtype(dtype)}{[count, *shape]}, got "
                f"{arrays[name].dtype}{list(arrays[name].shape)}; delete it and write it again"
            )
    norms = np.linalg.norm(arrays["embeddings"].astype(np.float64), axis=1)
    finite = all(np.isfinite(values).all() for values in arrays.values())
    if not finite or (np.abs(norms - 1) > 1e-3).any():
        raise FaceError(
            f"{path} holds values that are not finite, or embeddings that are not of unit norm; "
            "delete it and write it again"
        )
    digests = [row.tobytes().hex() for row in arrays["picture_sha256"]]
    columns = [arrays[name] for name in "boxes points scores crop_sha256 embeddings".split()]
    rows = {
        digest: Sight(box, points, float(score), crop.tobytes().hex(), embed)
        for digest, box, points, score, crop, embed in zip(digests, *columns, strict=True)
    }
    names = dict(zip(digests, about.pop("names"), strict=True))
    about.pop("format_version")
    return FaceTable(About(**about), rows, names)


def write(path: str | Path, table: FaceTable) -> None:
    """Writes a table, atomically, for nobody but the user to read.

    Raises:
      WriteError: the disk is full, or the place cannot be written to.
    """
    digests = sorted(table.rows, key=lambda digest: (table.names[digest], digest))
    rows = [table.rows[digest] for digest in digests]
    columns = {
        "embeddings": [row.embed for row in rows],
        "boxes": [row.box for row in rows],
        "points": [row.points for row in rows],
        "scores": [row.score for row in rows],
        "picture_sha256": [list(bytes.fromhex(digest)) for digest in digests],
        "crop_sha256": [list(bytes.fromhex(row.crop_sha256)) for row in rows],
    }
    arrays = {
        name: np.array(columns[name], dtype).reshape(len(rows), *shape)
        for name, (shape, dtype) in _SHAPES.items()
    }
    about = {
        "format_version": _VERSION,
        **vars(table.about),
        "names": [table.names[digest] for digest in digests],
    }
    write_tensors(path, arrays, {_KEY: json.dumps(about, sort_keys=True)}, private=True)
