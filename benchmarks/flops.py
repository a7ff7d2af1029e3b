"""Exact floating-point operations of a JAX function: products and convolutions of its jaxpr.

One multiply-add counts as two. Elementwise work is left out: it is limited by memory, not by
arithmetic. Nothing is computed or allocated, so full-size networks are counted in seconds.
"""

from collections.abc import Callable

import jax
import numpy as np


def count(function: Callable, *arguments) -> int:
    """FLOPs of `function(*arguments)`; an argument may be a tree of `jax.ShapeDtypeStruct`."""
    return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def needed(function: Callable, *arguments) -> int:
    """As `count`, without the operations whose results reach no output, which XLA removes."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    live, _ = jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return of_jaxpr(live)


def of_jaxpr(jaxpr) -> int:
    """FLOPs of a jaxpr, those of inner ones included; a scan counts as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        total += _of_equation(equation)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += times * sum(of_jaxpr(inner) for inner in inner_jaxprs(equation))
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
