"""Reads what `torch.save` wrote, without running anything that a file says.

Only float tensors in two levels of dictionaries are built; all else is refused.
"""

import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Far above any file of this kind (100 tokens of a 1024-wide encoder are 0.4 MB), far below harm.
from idea_jax.errors import InputError

MAX_BYTES = 16_000_000
MAX_KEYS = 100
MAX_VECTORS = 75  # CLIP reads 77 positions, two of which are the start and the end
MAX_NAME = 200  # characters of a key
MAX_WIDTH = 8192
_MAX_INSTRUCTIONS = 20_000
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class EmbedsError(InputError, ValueError):
    """A file of pseudo tokens that cannot be used; the message names it and says why."""


def parse_zip(content: bytes) -> object:
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


def parse_legacy(content: bytes) -> object:
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
        data[key] = stream.read(numel * np.dtype(DTYPES[storages[key].dtype]).itemsize)
    return _build(tree, lambda storage: data[storage.key])


def floats(data: bytes, dtype: str) -> np.ndarray:
    """Returns raw little-endian values as float32[numel]."""
    if dtype not in DTYPES:
        raise EmbedsError(f"expected floating-point tensors, got {dtype}")
    values = np.frombuffer(data, DTYPES[dtype])
    if dtype == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


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

_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
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
            stack.append(_global(argument))
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
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
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


def _global(name: str) -> object:
    """What a pickle names, if it is one of the few things that it may name."""
    if name not in _GLOBALS:
        asked_for = name.replace(" ", ".")[:MAX_NAME]
        raise EmbedsError(
            f"it asks for {asked_for}, which pseudo tokens never need and which may run foreign "
            "code; refused, nothing was run"
        )
    return _GLOBALS[name]


def _set_items(target: object, items: list | tuple) -> None:
    keys, values = items[0::2], items[1::2]
    # Only text as keys: hashing a nested tuple can take for ever.
    if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
        raise EmbedsError("expected a dictionary with text as keys")
    target.update(zip(keys, values, strict=True))


def _storage(reference: object) -> _Storage:
    """Reads torch's `("storage", type, key, device, number of values[, view])`."""
    if isinstance(reference, tuple) and len(reference) == 6 and reference[5] is None:
        reference = reference[:5]
    match reference:
        case ("storage", str(dtype), str(key), str(), int(numel)):
            if dtype in DTYPES and 0 <= numel <= MAX_BYTES:
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
    check_shape(shape, "tensor")
    values = floats(load(storage), storage.dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= values.size:
        raise EmbedsError(
            f"a tensor reaches to value {last} of a storage that ends at {values.size - 1}"
        )
    steps = [np.arange(size) * stride for size, stride in zip(shape, strides, strict=True)]
    return values[offset + sum(np.ix_(*steps))]


def check_shape(shape: tuple[int, ...] | list[int], name: str) -> None:
    fits = 1 <= len(shape) <= 2 and 1 <= shape[-1] <= MAX_WIDTH
    if not fits or not 1 <= math.prod(shape[:-1]) <= MAX_VECTORS:
        raise EmbedsError(
            f"expected {name} of shape [D] or [N, D] with N <= {MAX_VECTORS} and D <= {MAX_WIDTH}, "
            f"got {list(shape)}"
        )
