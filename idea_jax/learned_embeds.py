"""Files of pseudo tokens: `learned_embeds.safetensors` written, it and its older relatives read.

Pickles are never given to Python's `pickle`. A small interpreter knows the instructions that
`torch.save` writes for a dictionary of tensors, and can do nothing else.
"""

import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from idea_jax.files import write_tensors

FILE_NAME = "learned_embeds.safetensors"
# The key that AUTOMATIC1111's web UI and ComfyUI write; both name the token after the file.
_WEBUI_KEY = "emb_params"

# Far above any file of this kind (100 tokens of a 1024-wide encoder are 0.4 MB), far below harm.
MAX_BYTES = 16_000_000
MAX_KEYS = 100
MAX_NAME = 200  # characters of a key
MAX_VECTORS = 75  # CLIP reads 77 positions, two of which are the start and the end
MAX_WIDTH = 8192
_MAX_INSTRUCTIONS = 20_000

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class EmbedsError(ValueError):
    """A file of pseudo tokens that cannot be used; the message names it and says why."""


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


def write(path: str | Path, token: str, vectors: np.ndarray, metadata: Mapping[str, str]) -> None:
    """Writes float32[N, D] under the one key `token`: diffusers' `load_textual_inversion` reads it.

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
    _write(path, token, vectors, metadata)


def write_webui(path: str | Path, vectors: np.ndarray, metadata: Mapping[str, str]) -> None:
    """Writes float32[N, D] for AUTOMATIC1111's web UI and ComfyUI; the file's name is the token."""
    _write(path, _WEBUI_KEY, vectors, metadata)


def _write(path: str | Path, key: str, vectors: np.ndarray, metadata: Mapping[str, str]) -> None:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if vectors.ndim != 2:
        raise EmbedsError(f"expected vectors [N, D] to write to {path}, got {list(vectors.shape)}")
    _check(vectors, f"the vectors to write to {path}")
    write_tensors(path, {key: vectors}, {**metadata, "format": "pt"})


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Returns `{token: float32[N, D]}` from any of the forms in use, told apart by content.

    Safetensors or `torch.save` files (both its formats) holding one of
    - `{token: [N, D] or [D]}` (diffusers),
    - `{token_v0: [D], token_v1: [D], ...}` (ID-EA and Cross Initialization; the angle brackets of
      a token are kept, or missing, as they are in the file),
    - `{"emb_params": [N, D]}`, `{"clip_l": [N, D]}` or `{"string_to_param": {"*": [N, D]}}` (web
      UI, ComfyUI); without a name inside, the file's name is the token.

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
    except EmbedsError as error:
        raise EmbedsError(f"{path}: {error}") from error
    except (ValueError, TypeError, IndexError, KeyError, struct.error, OverflowError) as error:
        raise EmbedsError(f"{path} is damaged ({type(error).__name__}: {error})") from error


# --- from bytes to a dictionary of arrays ---------------------------------------------------------


def _parse(content: bytes) -> object:
    if content.startswith(b"PK\x03\x04"):
        return _parse_torch_zip(content)
    # Before the pickles: the length in front of a safetensors header may begin with their byte.
    if content[8:9] == b"{":
        return _parse_safetensors(content)
    if content.startswith(b"\x80"):
        return _parse_torch_legacy(content)
    raise EmbedsError("neither a safetensors file nor one written by torch.save")


def _parse_safetensors(content: bytes) -> dict[str, np.ndarray]:
    import safetensors

    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise EmbedsError(f"damaged safetensors file ({error})") from error
    tensors = {}
    for name, entry in sorted(entries, key=lambda item: item[0]):  # they come in no fixed order
        _check_shape(entry["shape"], name)
        tensors[name] = _floats(bytes(entry["data"]), entry["dtype"]).reshape(entry["shape"])
    return tensors


def _parse_torch_zip(content: bytes) -> object:
    """The format of `torch.save` since 1.6: a zip archive of `data.pkl` and raw storages."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            # torch stores without compression; so a small file cannot unfold to a large one.
            if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
                raise EmbedsError("a zip archive with compression, which torch.save never writes")
            if sum(info.file_size for info in entries.values()) > MAX_BYTES:
                raise EmbedsError("the archive's entries overlap or are too large")
            pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
            if len(pickles) != 1:
                raise EmbedsError("a zip archive without data.pkl, so not written by torch.save")
            folder = pickles[0].removesuffix("data.pkl")
            if (
                entries.get(folder + "byteorder")
                and archive.read(folder + "byteorder") != b"little"
            ):
                raise EmbedsError("written on a big-endian machine, which is not supported")
            tree, _ = _interpret(io.BytesIO(archive.read(pickles[0])))
            return _build(tree, lambda storage: archive.read(f"{folder}data/{storage.key}"))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise EmbedsError(f"damaged zip archive ({error})") from error


def _parse_torch_legacy(content: bytes) -> object:
    """The format before torch 1.6: four pickles, a list of storage keys, then the storages."""
    stream = io.BytesIO(content)
    magic, _ = _interpret(stream)
    if magic != 0x1950A86A20F9469CFC6C:
        raise EmbedsError("a pickle that torch.save has not written")
    version, _ = _interpret(stream)
    system, _ = _interpret(stream)
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise EmbedsError("written by an unknown version of torch.save, or on a big-endian machine")
    tree, storages = _interpret(stream)
    keys, _ = _interpret(stream)
    data = {}
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str):  # hashing a nested tuple can take for ever
            raise EmbedsError("damaged list of storages")
        (numel,) = struct.unpack("<q", stream.read(8))
        if numel != storages[key].numel:
            raise EmbedsError(f"storage {key} has {numel} values, {storages[key].numel} announced")
        data[key] = stream.read(numel * np.dtype(_DTYPES[storages[key].dtype]).itemsize)
    return _build(tree, lambda storage: data[storage.key])


def _floats(data: bytes, dtype: str) -> np.ndarray:
    """Returns raw little-endian values as float32[numel]."""
    if dtype not in _DTYPES:
        raise EmbedsError(f"expected floating-point tensors, got {dtype}")
    values = np.frombuffer(data, _DTYPES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


# --- the tensor-only interpreter ------------------------------------------------------------------


class _Storage(NamedTuple):
    dtype: str
    key: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, requires_grad, hooks, metadata=None):
    return _Tensor(storage, offset, shape, strides)


def _rebuild_parameter(tensor, requires_grad, hooks):
    return tensor


def _ordered_dict():
    return {}


# Everything a file may name. What can be called is one of the three functions above, which only put
# their arguments into a tuple.
_GLOBALS: dict[str, object] = {
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "collections OrderedDict": _ordered_dict,
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS_AND_TEXT = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}


def _interpret(stream: io.BytesIO) -> tuple[object, dict[str, _Storage]]:
    """Runs one pickle of protocol 2; returns its value and the storages it names.

    Leaves `stream` right behind the pickle. Whatever `torch.save` does not need for dictionaries of
    tensors is refused before it has any effect.
    """
    stack: list = []
    marks: list[int] = []
    memo: dict[int, object] = {}
    storages: dict[str, _Storage] = {}

    def since_mark() -> list:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def pop(count: int) -> tuple:
        if len(stack) < count:
            raise EmbedsError("damaged pickle (nothing left on the stack)")
        items = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        return items

    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if step > _MAX_INSTRUCTIONS:
            raise EmbedsError("the pickle is too long for a file of pseudo tokens")
        name = opcode.name
        if name == "STOP":
            return pop(1)[0], storages
        if name == "PROTO":
            if argument != 2:
                raise EmbedsError(f"expected pickle protocol 2, as torch.save uses, got {argument}")
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _NUMBERS_AND_TEXT:
            stack.append(argument)
        elif name == "GLOBAL":
            if argument not in _GLOBALS:
                asked_for = argument.replace(" ", ".")[:MAX_NAME]
                raise EmbedsError(
                    f"it asks for {asked_for}, which pseudo tokens never need and which may run "
                    "foreign code; refused, nothing was run"
                )
            stack.append(_GLOBALS[argument])
        elif name == "BINPERSID":
            storage = _storage(*pop(1))
            if storages.setdefault(storage.key, storage) != storage:
                raise EmbedsError(f"storage {storage.key} is described in two ways")
            stack.append(storage)
        elif name == "REDUCE":
            function, arguments = pop(2)
            if not callable(function) or not isinstance(arguments, tuple):
                raise EmbedsError("damaged pickle (a call of something that is no function)")
            stack.append(function(*arguments))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(pop(int(name[-1])))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = pop(1) if name == "APPEND" else since_mark()
            if not isinstance(stack[-1], list):
                raise EmbedsError("damaged pickle (an item appended to something else than a list)")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = pop(2) if name == "SETITEM" else since_mark()
            _set_items(stack[-1], items)
        else:
            raise EmbedsError(
                f"it uses the pickle instruction {name}, which a dictionary of tensors does not "
                "need and which may run foreign code; refused, nothing was run"
            )
    raise EmbedsError("damaged pickle (no end)")


def _set_items(target: object, items: list | tuple) -> None:
    keys, values = items[0::2], items[1::2]
    # Only text as keys: hashing a nested tuple can take for ever.
    if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
        raise EmbedsError("expected a dictionary with text as keys")
    target.update(zip(keys, values, strict=True))


def _storage(reference: object) -> _Storage:
    """Reads torch's `("storage", type, key, device, number of values[, view])`."""
    match reference:
        case ("storage", str(dtype), str(key), str(), int(numel)) | (
            "storage", str(dtype), str(key), str(), int(numel), None
        ) if dtype in _DTYPES and 0 <= numel <= MAX_BYTES:  # fmt: skip
            return _Storage(dtype, key, numel)
    raise EmbedsError("a reference to something else than a float tensor's storage")


def _build(tree: object, load: Callable[[_Storage], bytes]) -> object:
    """Replaces the tensors of a tree (two levels of dictionaries) by float32 arrays."""
    if isinstance(tree, dict):
        # Counted here, since a small pickle can refer to one inner dictionary many times.
        leaves = sum(len(value) if isinstance(value, dict) else 1 for value in tree.values())
        if leaves > MAX_KEYS:
            raise EmbedsError(f"more than {MAX_KEYS} entries; is it a checkpoint?")
        return {
            key: {inner: _array(leaf, load) for inner, leaf in value.items()}
            if isinstance(value, dict)
            else _array(value, load)
            for key, value in tree.items()
        }
    return _array(tree, load)


def _array(leaf: object, load: Callable[[_Storage], bytes]) -> object:
    if not isinstance(leaf, _Tensor):
        return leaf
    storage, offset, shape, strides = leaf
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage):
        raise EmbedsError("damaged tensor")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise EmbedsError("damaged tensor (its offset, shape or strides are no counts)")
    _check_shape(shape, "tensor")
    values = _floats(load(storage), storage.dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= values.size:
        raise EmbedsError(
            f"a tensor reaches to value {last} of a storage that ends at {values.size - 1}"
        )
    steps = [np.arange(size) * stride for size, stride in zip(shape, strides, strict=True)]
    return values[offset + sum(np.ix_(*steps))]


# --- from arrays to tokens ------------------------------------------------------------------------


def _check_shape(shape: tuple[int, ...] | list[int], name: str) -> None:
    fits = 1 <= len(shape) <= 2 and 1 <= shape[-1] <= MAX_WIDTH
    if not fits or not 1 <= math.prod(shape[:-1]) <= MAX_VECTORS:
        raise EmbedsError(
            f"expected {name} of shape [D] or [N, D] with N <= {MAX_VECTORS} and D <= {MAX_WIDTH}, "
            f"got {list(shape)}"
        )


def _check(vectors: np.ndarray, what: str) -> None:
    _check_shape(vectors.shape, what)
    if not np.isfinite(vectors).all():
        raise EmbedsError(f"{what} holds values that are not finite")


def _tokens(tree: object, path: Path) -> dict[str, np.ndarray]:
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
        raise EmbedsError("made for SDXL (two text encoders); SD 1.x and 2.x have one")
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
