"""Files of pseudo tokens: `learned_embeds.safetensors` written, it and its older relatives read.

Tokens are float32[N, D]; those of SDXL, which has two text encoders, are a dict of two such arrays,
by the names that files in use give them: `clip_l` and `clip_g`.

Pickles are never given to Python's `pickle`. A small interpreter knows the instructions that
`torch.save` writes for a dictionary of tensors, and can do nothing else.
"""

import hashlib
import math
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from idea_jax.runtime.files import write_tensors
from idea_jax.runtime.pickles import Limits, PickleError, floats, parse_legacy, parse_zip

FILE_NAME = "learned_embeds.safetensors"

# Far above any file of this kind (100 tokens of a 1024-wide encoder are 0.4 MB), far below harm.
MAX_BYTES = 16_000_000
MAX_KEYS = 100
MAX_VECTORS = 75  # CLIP reads 77 positions, two of which are the start and the end
MAX_NAME = 200  # characters of a key
MAX_WIDTH = 8192
MAX_INSTRUCTIONS = 20_000


class EmbedsError(PickleError):
    """A file of pseudo tokens that cannot be used; the message names it and says why."""


# The key that AUTOMATIC1111's web UI and ComfyUI write; both name the token after the file.
_WEBUI_KEY = "emb_params"
_OF_SDXL = ("clip_l", "clip_g")  # the keys of both, and of diffusers' community


def locate(path: str | Path) -> tuple[Path, str | None]:
    """Returns the file to read for `path`, and a notice if it is not the one that was asked for.

    A folder stands for the file of pseudo tokens in it. A pickle (`.bin`, `.pt`) that is absent is
    replaced by the `.safetensors` file of the same name, since that is what training writes now.

    Raises:
      EmbedsError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        for name in (FILE_NAME, "learned_embeds.bin"):
            if (path / name).is_file():
                return path / name, None
        raise EmbedsError(f"no {FILE_NAME} and no learned_embeds.bin in the folder {path}")
    if path.is_file():
        return path, None
    beside = path.with_suffix(".safetensors")
    if path.suffix in (".bin", ".pt") and beside.is_file():
        return beside, f"{path} does not exist; reading {beside.name} beside it"
    raise EmbedsError(f"the file of pseudo tokens {path} does not exist")


def second_of(path: str | Path) -> Path:
    """The file beside `learned_embeds...` for the tokens of SDXL's second text encoder."""
    path = Path(path)
    stem = Path(FILE_NAME).stem
    return path.with_name(path.name.replace(stem, f"{stem}_2", 1))


def write(path: str | Path, token: str, vectors: Any, metadata: Mapping[str, str]) -> None:
    """Writes float32[N, D] under the one key `token`: diffusers' `load_textual_inversion` reads it.

    Of SDXL the tokens of the second text encoder are in `second_of` this file, under the same key,
    as diffusers' own training writes them.

    diffusers names the vectors `token`, `token_1`, ...; a prompt needs `token` only. An earlier
    file at `path` is replaced only once the new one is complete.

    Args:
      token: in lower case and without spaces: the tokenizer lowers prompts, and would never find
        it otherwise.

    Raises:
      EmbedsError: the token or the vectors cannot be used.
    """
    if not token or token != token.lower() or any(c.isspace() for c in token):
        raise EmbedsError(f"expected a token in lower case without spaces, got {token!r}")
    if isinstance(vectors, Mapping):
        _write(second_of(path), {token: vectors[_OF_SDXL[1]]}, metadata)
        vectors = vectors[_OF_SDXL[0]]
    _write(path, {token: vectors}, metadata)


def write_webui(path: str | Path, vectors: Any, metadata: Mapping[str, str]) -> None:
    """Writes tokens for AUTOMATIC1111's web UI and ComfyUI, in one file whose name is the token."""
    tensors = vectors if isinstance(vectors, Mapping) else {_WEBUI_KEY: vectors}
    _write(path, tensors, metadata)


def _write(path: str | Path, tensors: Mapping, metadata: Mapping[str, str]) -> None:
    found = {key: np.ascontiguousarray(value, np.float32) for key, value in tensors.items()}
    for vectors in found.values():
        if vectors.ndim != 2:
            shape = list(vectors.shape)
            raise EmbedsError(f"expected vectors [N, D] to write to {path}, got {shape}")
        _check(vectors, f"the vectors to write to {path}")
    write_tensors(path, found, {**metadata, "format": "pt"})


def trigger_of(token: str, is_word: Callable[[str], bool]) -> str:
    """The word that means a person in web UIs, where it is the name of a file.

    It is the placeholder without the characters that no file name has in every system, in any
    script. It is no word of the vocabulary, which would mean the person wherever it stands; and
    placeholders that would give the same word are told apart by a digest.

    Args:
      is_word: whether the vocabulary has a text as one word.
    """
    bare = token.strip("<>")
    name = re.sub(r"[^\w-]+", "-", bare).strip("-")[:40]
    if name != bare or not name:
        name = f"{name or 'idea'}-{hashlib.sha256(token.encode()).hexdigest()[:6]}"
    return f"idea-{name}" if is_word(name) else name


def read(path: str | Path) -> dict[str, Any]:
    """Returns `{token: float32[N, D]}` from any of the forms in use, told apart by content.

    Safetensors or `torch.save` files (both its formats) holding one of
    - `{token: [N, D] or [D]}` (diffusers),
    - `{token_v0: [D], token_v1: [D], ...}` (ID-EA and Cross Initialization; the angle brackets of
      a token are kept, or missing, as they are in the file),
    - `{"emb_params": [N, D]}`, `{"clip_l": [N, D]}` or `{"string_to_param": {"*": [N, D]}}` (web
      UI, ComfyUI, and the first textual inversion, which kept a torch module there); without a
      name inside, the file's name is the token;
    - `{"clip_l": [N, D], "clip_g": [N, E]}` (SDXL, of all programs), whose token is the file's name
      and has a dict of both.

    Raises:
      EmbedsError: the file is missing, too large, damaged, of another kind, or asks for anything
        but tensors; in no case is anything from it run.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise EmbedsError(
            f"the file of pseudo tokens {path} cannot be read: {error.strerror}"
        ) from error
    if len(content) > MAX_BYTES:
        raise EmbedsError(
            f"{path} is larger than {MAX_BYTES // 1_000_000} MB, too large for pseudo tokens; "
            "is it a checkpoint?"
        )
    try:
        return _tokens(_parse(content), path)
    except PickleError as error:
        raise EmbedsError(f"{path}: {error}") from error
    except (ValueError, TypeError, IndexError, KeyError, struct.error, OverflowError) as error:
        raise EmbedsError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def read_both(path: str | Path) -> dict[str, Any]:
    """`read`, and where `second_of` the file lies beside it, each token with a dict of both.

    Raises:
      EmbedsError: as `read`, of either file, or they hold other tokens.
    """
    path, second = Path(path), second_of(path)
    tokens = read(path)
    if second == path or not second.is_file():
        return tokens
    others = read(second)
    if set(others) != set(tokens):
        raise EmbedsError(
            f"{path} holds {', '.join(tokens):.200}, and {second.name} beside it "
            f"{', '.join(others):.200}: expected the same, for SDXL's two text encoders"
        )
    try:
        pairs = {name: (tokens[name], others[name]) for name in tokens}
        return {name: _of_two(dict(zip(_OF_SDXL, pairs[name], strict=True))) for name in pairs}
    except EmbedsError as error:
        raise EmbedsError(f"{path} and {second.name} beside it: {error}") from error


def _parse(content: bytes) -> Any:
    if content.startswith(b"PK\x03\x04"):
        return parse_zip(content, LIMITS)
    # Before the pickles: the length in front of a safetensors header may begin with their byte.
    if content[8:9] == b"{":
        return _parse_safetensors(content)
    if content.startswith(b"\x80"):
        return parse_legacy(content, LIMITS)
    raise EmbedsError("neither a safetensors file nor one written by torch.save")


def _parse_safetensors(content: bytes) -> dict[str, np.ndarray]:
    import safetensors

    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise EmbedsError(f"damaged safetensors file ({error})") from error
    tensors = {}
    for name, entry in sorted(entries, key=lambda item: item[0]):  # they come in no fixed order
        check_shape(entry["shape"], name)
        tensors[name] = floats(bytes(entry["data"]), entry["dtype"]).reshape(entry["shape"])
    return tensors


def _check(vectors: np.ndarray, what: str) -> None:
    check_shape(vectors.shape, what)
    if not np.isfinite(vectors).all():
        raise EmbedsError(f"{what} holds values that are not finite")


def check_shape(shape: tuple[int, ...] | list[int], name: str) -> None:
    fits = 1 <= len(shape) <= 2 and 1 <= shape[-1] <= MAX_WIDTH
    if not fits or not 1 <= math.prod(shape[:-1]) <= MAX_VECTORS:
        raise EmbedsError(
            f"expected {name} of shape [D] or [N, D] with N <= {MAX_VECTORS} and D <= {MAX_WIDTH}, "
            f"got {list(shape)}"
        )


LIMITS = Limits(MAX_BYTES, MAX_KEYS, MAX_INSTRUCTIONS, check_shape)


def _tokens(tree: Any, path: Path) -> dict[str, Any]:
    """Sorts out which of the known forms `tree` has."""
    if isinstance(tree, np.ndarray):
        tree = {path.stem: tree}
    if not isinstance(tree, dict) or not tree:
        raise EmbedsError("expected a dictionary of tensors")
    if "string_to_param" in tree:
        params, name = tree["string_to_param"], tree.get("name")
        if not isinstance(params, dict) or len(params) != 1:
            raise EmbedsError("expected one tensor under string_to_param")
        tree = {name if isinstance(name, str) and name else path.stem: next(iter(params.values()))}
    elif "clip_g" in tree:
        return {path.stem: _of_two(tree)}
    elif len(tree) == 1 and next(iter(tree)) in (_WEBUI_KEY, "clip_l"):
        tree = {path.stem: next(iter(tree.values()))}
    if len(tree) > MAX_KEYS or max(map(len, tree)) > MAX_NAME:
        raise EmbedsError(
            f"more than {MAX_KEYS} keys, or a name of more than {MAX_NAME} characters"
        )
    for key, value in tree.items():
        if not isinstance(value, np.ndarray):
            raise EmbedsError(f"expected a tensor under {key!r}, got {type(value).__name__}")
        _check(value, repr(key))
    return _join_vectors({key: np.atleast_2d(value) for key, value in tree.items()})


def _of_two(tree: dict) -> dict[str, np.ndarray]:
    """The tokens of SDXL's two text encoders."""
    if set(tree) != set(_OF_SDXL) or not all(isinstance(x, np.ndarray) for x in tree.values()):
        raise EmbedsError(
            f"made for SDXL, which has two text encoders: expected the tensors "
            f"{' and '.join(_OF_SDXL)}, found {', '.join(map(repr, tree)):.200}"
        )
    both = {name: np.atleast_2d(tree[name]) for name in _OF_SDXL}
    for name, vectors in both.items():
        _check(vectors, repr(name))
    first, second = (len(vectors) for vectors in both.values())
    if first != second:
        raise EmbedsError(f"{first} tokens of clip_l and {second} of clip_g: expected as many")
    return both


def _join_vectors(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Joins `x_v0`, `x_v1`, ... (one vector each) to `x`, in the order of their numbers."""
    groups: dict[str, dict[int, np.ndarray]] = {}
    tokens = {}
    for key, vectors in rows.items():
        numbered = re.fullmatch(r"(.+)_v(\d{1,3})", key)
        if numbered and len(vectors) == 1:
            groups.setdefault(numbered[1], {})[int(numbered[2])] = vectors[0]
        else:
            tokens[key] = vectors
    for token, vectors in groups.items():
        if len(vectors) == 1 and 0 not in vectors:  # a name that happens to end in _v2
            (number,) = vectors
            token, vectors = f"{token}_v{number}", {0: vectors[number]}
        if sorted(vectors) != list(range(len(vectors))):
            raise EmbedsError(f"expected {token}_v0, _v1, ... without gaps, got {sorted(vectors)}")
        if len({vector.shape for vector in vectors.values()}) > 1 or token in tokens:
            raise EmbedsError(f"the vectors of {token} do not belong together")
        tokens[token] = np.stack([vectors[number] for number in range(len(vectors))])
    return tokens
