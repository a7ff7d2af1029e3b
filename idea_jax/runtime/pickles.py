"""Reads what `torch.save` wrote, without running anything that a file says.

Only tensors in two levels of dictionaries are built; all else is refused.
"""

import io
import os
import pickletools
import re
import struct
import threading
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from idea_jax.errors import InputError

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
COUNTS = {"I64": "<i8", "I32": "<i4"}  # told apart from floats, and never built
MAX_SHOWN = 200  # characters of what a file says, in a message


class PickleError(InputError, ValueError):
    """A file that is not what `torch.save` makes of tensors, or asks for more than tensors."""


class Limits(NamedTuple):
    """What a file may be at most.

    Attributes:
      bytes, keys: of the file, and of its dictionaries.
      instructions: of a pickle.
      check: raises unless a tensor may have a shape; it is told a name as well.
    """

    bytes: int
    keys: int
    instructions: int
    check: Callable[[tuple[int, ...], str], None]


def parse_zip(content: bytes, limits: Limits) -> object:
    """The format of `torch.save` since 1.6: a zip archive of `data.pkl` and raw storages."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            tree, folder = _open_zip(archive, limits)
            load = lambda storage: archive.read(f"{folder}data/{storage.key}")  # noqa: E731
            return _build(tree, load, limits)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise PickleError(f"damaged zip archive ({error})") from error


def _open_zip(archive: zipfile.ZipFile, limits: Limits) -> tuple[object, str]:
    """Returns what the archive's pickle holds, and the folder of its storages."""
    entries = {info.filename: info for info in archive.infolist()}
    # torch stores without compression; so a small file cannot unfold to a large one.
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise PickleError("a zip archive with compression, which torch.save never writes")
    if sum(info.file_size for info in entries.values()) > limits.bytes:
        raise PickleError("the archive's entries overlap or are too large")
    pickles = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise PickleError("a zip archive without data.pkl, so not written by torch.save")
    folder = pickles[0].removesuffix("data.pkl")
    if entries.get(folder + "byteorder") and archive.read(folder + "byteorder") != b"little":
        raise PickleError("written on a big-endian machine, which is not supported")
    if entries[pickles[0]].file_size > 100 * limits.instructions:
        raise PickleError("the pickle is too long for a file of tensors")
    tree, _ = _interpret(io.BytesIO(archive.read(pickles[0])), limits)
    return tree, folder


class TensorPickle:
    """The tensors of a large file of `torch.save` (a zip archive); each is read when asked for.

    Attributes:
      headers: shape and type of each, such as (3, 4) and "F16".

    Raises:
      PickleError: the file is damaged, or holds anything but one dictionary of tensors.
    """

    def __init__(self, path: str | os.PathLike, limits: Limits):
        self._lock = threading.Lock()  # an archive has one place that it is read at
        self._limits = limits
        try:
            self._archive = zipfile.ZipFile(path)
            tree, self._folder = _open_zip(self._archive, limits)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise PickleError(
                f"it is cut, or no file of torch.save since torch 1.6 ({error})"
            ) from error
        except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
            if isinstance(error, PickleError):
                raise
            raise PickleError(f"damaged pickle ({type(error).__name__}: {error})") from error
        if not isinstance(tree, dict) or len(tree) > limits.keys:
            raise PickleError(f"expected one dictionary of at most {limits.keys} tensors")
        self._tensors: dict[str, _Tensor] = {}
        self.headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, value in tree.items():
            if not isinstance(value, _Tensor):
                raise PickleError(f"{name[:MAX_SHOWN]} is no tensor, expected a flat dictionary")
            _check_tensor(value, name[:MAX_SHOWN], limits)
            self._tensors[name] = value
            self.headers[name] = (value.shape, value.storage.dtype)

    def read(self, name: str) -> np.ndarray:
        """The tensor of that name, of a float type; bfloat16 as float32."""
        storage, offset, shape, strides = self._tensors[name]
        with self._lock:
            try:
                data = self._archive.read(f"{self._folder}data/{storage.key}")
            except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
                raise PickleError(f"{name}: its values cannot be read ({error})") from error
        if storage.dtype not in DTYPES:
            raise PickleError(f"{name}: expected floating-point values, got {storage.dtype}")
        values = np.frombuffer(data, DTYPES[storage.dtype])
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if last >= values.size:
            raise PickleError(f"{name} reaches to value {last} of {values.size}")
        if storage.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        size = values.itemsize
        return np.lib.stride_tricks.as_strided(
            values[offset:], shape, [step * size for step in strides], writeable=False
        )


def parse_legacy(content: bytes, limits: Limits) -> object:
    """The format before torch 1.6: four pickles, a list of storage keys, then the storages."""
    stream = io.BytesIO(content)
    magic, _ = _interpret(stream, limits)
    if magic != 0x1950A86A20F9469CFC6C:
        raise PickleError("a pickle that torch.save has not written")
    version, _ = _interpret(stream, limits)
    system, _ = _interpret(stream, limits)
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise PickleError("written by an unknown version of torch.save, or on a big-endian machine")
    tree, storages = _interpret(stream, limits)
    keys, _ = _interpret(stream, limits)
    data = {}
    for key in keys if isinstance(keys, list) else ():
        if not isinstance(key, str):  # hashing a nested tuple can take for ever
            raise PickleError("damaged list of storages")
        (numel,) = struct.unpack("<q", stream.read(8))
        if numel != storages[key].numel:
            raise PickleError(f"storage {key} has {numel} values, {storages[key].numel} announced")
        kind = (DTYPES | COUNTS)[storages[key].dtype]
        data[key] = stream.read(numel * np.dtype(kind).itemsize)
    return _build(tree, lambda storage: data[storage.key], limits)


def floats(data: bytes, dtype: str) -> np.ndarray:
    """Returns raw little-endian values as float32[numel]."""
    if dtype not in DTYPES:
        raise PickleError(f"expected floating-point tensors, got {dtype}")
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


class _Parameters(dict):
    """Stands for a torch module of parameters, in which old files keep their tensors."""


def _no_set(items=()):
    return None


# Everything a file may name. What can be called is one of the functions above, which only put their
# arguments into a tuple, or drop them.
_GLOBALS: dict[str, object] = {
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "collections OrderedDict": _ordered_dict,
    "torch DoubleStorage": "F64",
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch.nn.modules.container ParameterDict": _Parameters,
    "__builtin__ set": _no_set,
}

_EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}

_NUMBERS_AND_TEXT = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}


def _interpret(stream: io.BytesIO, limits: Limits) -> tuple[object, dict[str, _Storage]]:
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
            raise PickleError("damaged pickle (nothing left on the stack)")
        items = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        return items

    for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if step > limits.instructions:
            raise PickleError("the pickle is too long for a file of tensors")
        name = opcode.name
        if name == "STOP":
            return pop(1)[0], storages
        if name == "PROTO":
            if argument != 2:
                raise PickleError(f"expected pickle protocol 2, as torch.save uses, got {argument}")
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
            stack.append(_referred(pop(1)[0], storages, limits))
        elif name == "REDUCE":
            function, arguments = pop(2)
            known = callable(function) and function is not _Parameters
            if not known or not isinstance(arguments, tuple):
                raise PickleError("damaged pickle (a call of something that is no function)")
            stack.append(function(*arguments))
        elif name == "NEWOBJ":
            stack.append(_new(*pop(2)))
        elif name == "BUILD":
            _set_state(stack[-2], *pop(1))
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(pop(int(name[-1])))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = pop(1) if name == "APPEND" else since_mark()
            if not isinstance(stack[-1], list):
                raise PickleError("damaged pickle (an item appended to something else than a list)")
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = pop(2) if name == "SETITEM" else since_mark()
            _set_items(stack[-1], items)
        else:
            raise PickleError(
                f"it uses the pickle instruction {name}, which a dictionary of tensors does not "
                "need and which may run foreign code; refused, nothing was run"
            )
    raise PickleError("damaged pickle (no end)")


def _global(name: str) -> object:
    """What a pickle names, if it is one of the few things that it may name."""
    if name not in _GLOBALS:
        asked_for = name.replace(" ", ".")[:MAX_SHOWN]
        raise PickleError(
            f"it asks for {asked_for}, which tensors never need and which may run foreign "
            "code; refused, nothing was run"
        )
    return _GLOBALS[name]


def _set_items(target: object, items: list | tuple) -> None:
    keys, values = items[0::2], items[1::2]
    # Only text as keys: hashing a nested tuple can take for ever.
    if not isinstance(target, dict) or not all(isinstance(key, str) for key in keys):
        raise PickleError("expected a dictionary with text as keys")
    target.update(zip(keys, values, strict=True))


def _referred(reference: object, storages: dict[str, _Storage], limits: Limits) -> object:
    """What a reference means: a storage, or the one kind of module."""
    if isinstance(reference, tuple) and reference[:2] == ("module", _Parameters):
        return _Parameters  # the format before 1.6 has its source beside it
    storage = _storage(reference, limits.bytes)
    if storages.setdefault(storage.key, storage) != storage:
        raise PickleError(f"storage {storage.key} is described in two ways")
    return storage


def _new(kind: object, arguments: object) -> object:
    if kind is not _Parameters or not isinstance(arguments, tuple) or arguments:
        raise PickleError("damaged pickle (an object of an unknown kind)")
    return _Parameters()


def _set_state(target: object, state: object) -> None:
    """Gives a module its parameters; what else a state says, such as versions, does not count."""
    if not isinstance(target, dict) or not isinstance(state, dict):
        raise PickleError("damaged pickle (a state of something that has none)")
    if isinstance(target, _Parameters):
        own = state.get("_parameters")
        target.update(own if isinstance(own, dict) else {})


def _storage(reference: object, most: int) -> _Storage:
    """Reads torch's `("storage", type, key, device, number of values[, view])`."""
    if isinstance(reference, tuple) and len(reference) == 6 and reference[5] is None:
        reference = reference[:5]
    match reference:
        case ("storage", str(dtype), str(key), str(), int(numel)):
            if dtype in DTYPES | COUNTS and 0 <= numel <= most:
                return _Storage(dtype, key, numel)
    raise PickleError("a reference to something else than a tensor's storage")


def _build(tree: object, load: Callable[[_Storage], bytes], limits: Limits) -> object:
    """Replaces the tensors of a tree (two levels of dictionaries) by float32 arrays."""
    if isinstance(tree, dict):
        # Counted here, since a small pickle can refer to one inner dictionary many times.
        leaves = sum(len(value) if isinstance(value, dict) else 1 for value in tree.values())
        if leaves > limits.keys:
            raise PickleError(f"more than {limits.keys} entries; is it a checkpoint?")
        return {
            key: {inner: _array(leaf, load, limits) for inner, leaf in value.items()}
            if isinstance(value, dict)
            else _array(value, load, limits)
            for key, value in tree.items()
        }
    return _array(tree, load, limits)


def _array(leaf: object, load: Callable[[_Storage], bytes], limits: Limits) -> object:
    if not isinstance(leaf, _Tensor):
        return leaf
    storage, offset, shape, strides = leaf
    if isinstance(storage, _Storage) and storage.dtype in COUNTS:
        return None  # such as the id of a token, which says nothing elsewhere
    _check_tensor(leaf, "tensor", limits)
    values = floats(load(storage), storage.dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if last >= values.size:
        raise PickleError(
            f"a tensor reaches to value {last} of a storage that ends at {values.size - 1}"
        )
    steps = [np.arange(size) * stride for size, stride in zip(shape, strides, strict=True)]
    return values[offset + sum(np.ix_(*steps))]


def _check_tensor(tensor: _Tensor, name: str, limits: Limits) -> None:
    storage, offset, shape, strides = tensor
    if not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise PickleError("damaged tensor")
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage):
        raise PickleError("damaged tensor")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise PickleError("damaged tensor (its offset, shape or strides are no counts)")
    if len(shape) != len(strides):
        raise PickleError("damaged tensor (as many sizes as strides)")
    limits.check(shape, name)
