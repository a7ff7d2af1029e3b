"""What a program costs, read off its jaxpr: operations, memory, collectives.

Nothing is computed or allocated, so full-size networks are counted in seconds.

One multiply-add counts as two operations. Elementwise work is left out of them: it is limited by
memory, not by arithmetic. Kernels (Pallas) are not looked into; count with plain attention.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

# What XLA fuses into whatever reads it: such a value is computed again instead of kept.
FUSED = frozenset(
    """
    abs add add_any all_gather and atan2 broadcast_in_dim ceil clamp convert_element_type copy cos
    div eq erf erf_inv erfc exp exp2 expand_dims expm1 floor ge gt integer_pow iota is_finite le
    log log1p logistic lt max min mul ne neg not or pad pcast pow pvary real reduce_precision rem
    reshape rev round rsqrt select_n sign sin sqrt square squeeze stop_gradient sub
    tan tanh transpose xor
    """.split()
)
LANES = 128  # values of the last axis, in multiples of which a TPU's kernels take their arrays
COLLECTIVES = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "all_gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ppermute": "permute",
}


def count(function: Callable, *arguments) -> int:
    """FLOPs of `function(*arguments)`; an argument may be a tree of `jax.ShapeDtypeStruct`."""
    return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def needed(function: Callable, *arguments) -> int:
    """As `count`, without the operations whose results reach no output, which XLA removes."""
    return of_jaxpr(live(jax.make_jaxpr(function)(*arguments).jaxpr))


def live(jaxpr):
    """A jaxpr without the operations whose results reach no output."""
    return jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def of_jaxpr(jaxpr) -> int:
    """FLOPs of a jaxpr, those of inner ones included; a scan counts as often as it runs, and of
    several branches the dearest.

    Of a program over a mesh (`jax.shard_map`) those of one device.
    """
    total = 0
    for equation in jaxpr.eqns:
        total += _of_equation(equation)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        together = max if equation.primitive.name == "cond" else sum
        total += times * together([0, *map(of_jaxpr, inner_jaxprs(equation))])
    return total


def convolutions(jaxpr):
    """Yields (image shape, kernel shape [H, W, I, O], strides, padding) of each, inner ones too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            image, kernel = (atom.aval.shape for atom in equation.invars)
            yield image, kernel, equation.params["window_strides"], equation.params["padding"]
        for inner in inner_jaxprs(equation):
            yield from convolutions(inner)


def inner_jaxprs(equation):
    """Yields the jaxprs among an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def _of_equation(equation) -> int:
    if not equation.outvars:
        return 0
    name, out = equation.primitive.name, equation.outvars[0].aval
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * int(np.prod(out.shape)) * int(np.prod([left[axis] for axis in contracted]))
    if name == "conv_general_dilated":
        kernel, layout = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
        taps = int(np.prod([kernel[axis] for axis in layout.rhs_spec[1:]]))
        # Zeros that dilation puts between the values of the input cost nothing: a gradient of a
        # convolution with stride s does as much work as the convolution.
        zeros = int(np.prod(equation.params["lhs_dilation"]))
        return 2 * int(np.prod(out.shape)) * taps // zeros
    return 0


class Collective(NamedTuple):
    """Collectives of one kind over the same axes.

    calls: how many a program takes. bytes: what each device gets from them, all together.
    """

    kind: str
    axes: tuple[str, ...]
    calls: int
    bytes: int


def collectives(jaxpr) -> list[Collective]:
    """What a program over a mesh sends between devices; a scan counts as often as it runs."""
    found: dict[tuple, list[int]] = {}

    def look(jaxpr, times):
        for equation in jaxpr.eqns:
            kind = COLLECTIVES.get(equation.primitive.name)
            if kind is not None:
                axes = equation.params.get("axes", equation.params.get("axis_name"))
                axes = tuple(axes) if isinstance(axes, tuple | list) else (axes,)
                size = sum(bytes_of(out.aval) for out in equation.outvars)
                total = found.setdefault((kind, axes), [0, 0])
                total[0] += times
                total[1] += times * size
            inside = times * (
                equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            )
            for inner in inner_jaxprs(equation):
                look(inner, inside)

    look(jaxpr, 1)
    return [Collective(*key, *total) for key, total in sorted(found.items())]


def bytes_of(aval, lanes: int = 1) -> int:
    """Bytes of an array of this shape and type, its last axis filled up to whole `lanes`."""
    shape = getattr(aval, "shape", ())
    size = int(np.prod(shape, dtype=np.int64))
    if shape and lanes > 1:
        size = size // max(shape[-1], 1) * (-(-shape[-1] // lanes) * lanes)
    try:
        return size * np.dtype(aval.dtype).itemsize
    except (AttributeError, TypeError):  # random keys; they are small
        return 8 * size


class Memory(NamedTuple):
    """An estimate of a program's memory on a device, its arguments left out.

    peak: bytes of the values that are held at once, at most.
    traffic: bytes that are read and written, each value once a use.
    """

    peak: int
    traffic: int


def memory(jaxpr, *, pads_kernels: bool = False) -> Memory:
    """Estimates what a program holds beside its arguments, and what it moves.

    The program runs in the order of its jaxpr. A value that is fused is computed again by
    whatever reads it, as long as it is no smaller than what it is computed from; every other one is
    held until it is read for the last time. XLA orders, fuses and lays out in its own way, so this
    is an estimate; docs/scale.md says how near it came to compiled programs. Weights that are
    gathered from several devices are left out.

    Args:
      pads_kernels: the arrays of Pallas' kernels take whole `LANES`, as on a TPU.
    """
    jaxpr, held = live(jaxpr), _Held(LANES if pads_kernels else 1)
    known = held.run(jaxpr, {})
    for atom in jaxpr.outvars:
        held.read(_roots(atom, known), len(held.work))
    return Memory(held.peak(), held.traffic)


class _Held:
    """The values that a program holds, each with the operations between which it does.

    `known` maps a variable to its roots: the numbers of the values that are held for its sake.
    """

    def __init__(self, lanes: int):
        self.lanes, self.traffic = lanes, 0
        self.sizes: list[int] = []
        self.born: list[int] = []
        self.last: list[int] = []
        self.work: list[int] = []  # bytes that each operation needs while it runs

    def run(self, jaxpr, known: dict) -> dict:
        """Adds all operations of a jaxpr, and returns what is known after them."""
        for equation in jaxpr.eqns:
            inner = _inlined(equation)
            if inner is None:
                self.add(equation, known)
                continue
            given = equation.invars[len(equation.invars) - len(inner.invars) :]
            own = {a: _roots(b, known) for a, b in zip(inner.invars, given, strict=True)}
            self.run(inner, own)
            for out, result in zip(equation.outvars, inner.outvars, strict=True):
                known[out] = _roots(result, own)
        return known

    def add(self, equation, known: dict) -> None:
        """Adds one operation."""
        name, number = equation.primitive.name, len(self.work)
        is_kernel = name == "pallas_call"
        given = [atom.aval for atom in equation.invars]
        used = frozenset().union(*(_roots(atom, known) for atom in equation.invars))
        lanes = self.lanes if is_kernel else 1
        sizes = [bytes_of(out.aval, lanes) for out in equation.outvars]
        if name in FUSED and sum(sizes) >= sum(self.sizes[root] for root in used):
            known |= dict.fromkeys(equation.outvars, used)
            return
        self.read(used, number)
        self.work.append(sum(bytes_of(aval, lanes) - bytes_of(aval) for aval in given))
        self.traffic += sum(sizes) + sum(bytes_of(aval) for aval in given)
        if not is_kernel:
            times = equation.params.get("length", 1) if name == "scan" else 1
            for inner in inner_jaxprs(equation):
                inside = memory(inner, pads_kernels=self.lanes > 1)
                self.work[-1] = max(self.work[-1], inside.peak)
                self.traffic += times * inside.traffic
        for out, size in zip(equation.outvars, sizes, strict=True):
            known[out] = frozenset((len(self.sizes),))
            self.sizes.append(size)
            self.born.append(number)
            self.last.append(number)

    def read(self, roots: frozenset, number: int) -> None:
        """Notes that an operation reads values."""
        for root in roots:
            self.last[root] = number

    def peak(self) -> int:
        """The most bytes at once."""
        change = np.zeros(len(self.work) + 2, np.int64)
        for size, first, last in zip(self.sizes, self.born, self.last, strict=True):
            change[first] += size
            change[last + 1] -= size
        held = np.cumsum(change)[: len(self.work)] + np.asarray(self.work, np.int64)
        return int(held.max(initial=0))


def _roots(atom, known: dict) -> frozenset:
    is_literal = hasattr(atom, "val")
    return frozenset() if is_literal else known.get(atom, frozenset())


def _inlined(equation):
    """The jaxpr that an equation calls once, as part of the program around it; None if none."""
    if equation.primitive.name in ("scan", "while", "cond", "pallas_call"):
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    return inner if hasattr(inner, "eqns") else None
