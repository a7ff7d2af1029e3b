"""Weight files: where they lie, and their tensors, which are read when they are asked for."""

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from idea_jax.errors import InputError
from idea_jax.models.config_reader import say_once
from idea_jax.runtime.files import is_lfs_pointer
from idea_jax.runtime.pickles import Limits, PickleError, TensorPickle

log = logging.getLogger(__name__)

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")


class WeightsError(InputError, ValueError):
    """A weight file is absent, unreadable, or does not fit the network its config describes."""


def _check_shape(shape: tuple[int, ...], name: str) -> None:
    if len(shape) > 4 or math.prod(shape) > 2**30:
        raise PickleError(f"{name} has the shape {list(shape)}, expected four sizes at most")


# Of a network of Stable Diffusion in a pickle: 3.5 GB, 700 tensors, 30 instructions for each.
PICKLE_LIMITS = Limits(16_000_000_000, 5_000, 500_000, _check_shape)


class Tensors(Mapping[str, np.ndarray]):
    """Named tensors that are read when asked for; `headers` has shape and type of each."""

    headers: dict[str, tuple[tuple[int, ...], str]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)


class TensorFiles(Tensors):
    """The tensors of one or several files, safetensors or pickles, and the files' `metadata`."""

    def __init__(self, paths: list[Path]):
        self._files: dict[str, Any] = {}
        self.headers = {}
        self.metadata: dict[str, str] = {}
        for path in paths:
            if path.suffix == ".bin":
                self._add_pickle(path)
                continue
            try:
                file = safe_open(path, framework="numpy")
            except SafetensorError as error:
                if is_lfs_pointer(path):
                    raise WeightsError(
                        f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull "
                        "in that folder, or hf download the repository"
                    ) from error
                raise WeightsError(
                    f"{path} is not a complete safetensors file ({error}); {download_again(path)}"
                ) from error
            self.metadata |= file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 - safe_open is no dictionary
                if key in self.headers:
                    raise WeightsError(f"{path}: {key} is also in another file of the same index")
                part = file.get_slice(key)
                self.headers[key] = (tuple(part.get_shape()), part.get_dtype())
                self._files[key] = file

    def _add_pickle(self, path: Path) -> None:
        try:
            file = TensorPickle(path, PICKLE_LIMITS)
        except PickleError as error:
            if is_lfs_pointer(path):
                raise WeightsError(
                    f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull"
                ) from error
            raise WeightsError(f"{path}: {error}; {download_again(path)}") from error
        if twice := self.headers.keys() & file.headers.keys():
            raise WeightsError(f"{path}: {min(twice)} is also in another file of the same index")
        self.headers |= file.headers
        self._files |= dict.fromkeys(file.headers, file)

    def __getitem__(self, key: str) -> np.ndarray:
        file = self._files[key]
        if not isinstance(file, TensorPickle):
            return file.get_tensor(key)
        try:
            return file.read(key)
        except PickleError as error:
            raise WeightsError(str(error)) from error


def file_names(stem: str, variant: str | None = None) -> list[tuple[str, str]]:
    """What the weights of a network may be called, best first: (file, index of several files).

    Args:
      stem: `model` or `diffusion_pytorch_model`.
      variant: as of `find_weights`.
    """
    infix = f".{variant}" if variant else ""
    pickle = "pytorch_model" if stem == "model" else stem
    return [
        (f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"),
        (f"{pickle}{infix}.bin", f"{pickle}.bin.index{infix}.json"),
    ]


def is_piece(name: str, single: str) -> bool:
    """Whether a file is a piece of what might be the file `single`, by newer or older names."""
    stem, *variant, kind = single.split(".")
    number = r"-\d+-of-\d+"
    infix = rf"\.{re.escape(variant[0])}" if variant else ""
    return bool(re.fullmatch(rf"{stem}({infix}{number}|{number}{infix})\.{kind}", name))


def only_variant(stem: str, present: Iterable[str]) -> str | None:
    """The variant of the safetensors files of a network, if there is one alone."""
    found = variants_of(stem, present)
    return min(found) if len(found) == 1 else None


def variants_of(stem: str, present: Iterable[str]) -> set[str]:
    """The variants of which there are safetensors files; "" is none."""
    # Of a file in pieces the variant stands before the number, or behind it in older ones.
    names = rf"{stem}\.?([\w-]*?)(?:-\d+-of-\d+)?(?:\.([\w-]+))?\.safetensors"
    matches = [re.fullmatch(names, name) for name in present]
    return {found[1] or found[2] or "" for found in matches if found}


def find_weights(
    folder: Path, stem: str, variant: str | None = None, *, exact: bool = False
) -> list[Path]:
    """The weight files of one network: one file, or those that its index names.

    Safetensors come before pickles. Where no variant is asked for, and there is nothing but one, it
    is taken with a notice, unless it has to be `exact`.

    Args:
      stem: as of `file_names`.
      variant: is written before the suffix, as in `model.fp16.safetensors`.

    Raises: WeightsError saying what the folder holds instead.
    """
    for single, index in file_names(stem, variant):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return _of_index(folder / index)
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    only = only_variant(stem, present)
    if variant is None and only and not exact:
        say_once(f"{folder} has weights of the variant {only} alone, which are taken")
        return find_weights(folder, stem, only)
    raise WeightsError(absent(file_names(stem, variant)[0][0], str(folder), stem, present))


def _of_index(index: Path) -> list[Path]:
    """The files that an index names, all of them beside it."""
    kind = ".bin" if ".bin.index" in index.name else ".safetensors"
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise WeightsError(f"{index} is not an index of weight files") from error
    paths = [index.parent / name for name in sorted(names)]
    for path in paths:
        if path.parent != index.parent or path.suffix != kind or not path.is_file():
            raise WeightsError(f"{index} names {path.name}, which is not in {index.parent}")
    return paths


def download_again(path: Path) -> str:
    """How to replace a damaged file; what the Hub's cache holds is not fetched anew unless told."""
    parts = path.absolute().parts
    if "snapshots" in parts:
        at = len(parts) - 1 - parts[::-1].index("snapshots")
        repository = parts[at - 1].removeprefix("models--").replace("--", "/")
        file = "/".join(parts[at + 2 :])
        return f"download it again: hf download {repository} {file} --force-download"
    return "download it again"


def absent(wanted: str, where: str, stem: str, present: list[str]) -> str:
    """The message for weights that are not in a folder or repository, with what to take instead.

    Args:
      wanted: the file's name; `present` are the names that are there instead.
      stem: as of `find_weights`.
    """
    message = f"no {wanted} in {where}; it holds {', '.join(present[:20]) or 'nothing'}"
    variants = variants_of(stem, present)
    named = sorted(f"--variant {variant}" for variant in variants - {""})
    if variants:
        ways = [*named, *(["no --variant"] if "" in variants else [])]
        message += f"; take {' or '.join(ways)}"
    elif any(name.endswith(".safetensors") for name in present):
        message += f"; these have other names than {wanted}: rename what are the weights"
    elif any(name.endswith((".ckpt", ".pt", ".pth", ".msgpack", ".bin")) for name in present):
        names = " or ".join(name for name, _ in file_names(stem))
        message += (
            f"; expected {names}: other pickles (.ckpt, .pt) and Flax files are not read. Convert "
            "them, for example with diffusers' save_pretrained(folder, safe_serialization=True)"
        )
    return message
