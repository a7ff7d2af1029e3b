"""Times products and convolutions alone, by XLA and by PyTorch on one core; prints a table.

    python -m benchmarks.products [--repeats 30]

Nothing of this project's programs is in it: each program holds `SETS` equal products of random
float32 numbers. The shapes, and how many a core has of each, are those of a training step of the
workload `mid` with two cores: most of its products' work. A speed is that of the fastest of some
calls; what a step would take is the sum over the shapes.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.options import positive

SETS = 8  # operands of a call, so that they do not stay in the fastest cache


class Product(NamedTuple):
    """[rows, inner] times [inner, columns], `batch` at once, as often as `count` in a step."""

    count: int
    rows: int
    inner: int
    columns: int
    batch: int = 1

    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.columns

    def name(self) -> str:
        at_once = f", {self.batch} at once" if self.batch > 1 else ""
        return f"[{self.rows}, {self.inner}] x [{self.inner}, {self.columns}]{at_once}"

    def operands(self, rng: np.random.Generator) -> list[np.ndarray]:
        sides = (self.rows, self.inner), (self.inner, self.columns)
        lead = (SETS, self.batch)
        return [rng.normal(size=(*lead, *side)).astype(np.float32) for side in sides]


class Convolution(NamedTuple):
    """3x3, of two maps of side x side, as often as `count` in a step."""

    count: int
    side: int
    channels: int
    features: int

    def flops(self) -> int:
        return 2 * 2 * self.side**2 * 9 * self.channels * self.features

    def name(self) -> str:
        return f"3x3, {self.side} x {self.side}, {self.channels} to {self.features}"

    def operands(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Maps [SETS, 2, H, W, C] and kernels [SETS, 3, 3, C, D]."""
        maps = (SETS, 2, self.side, self.side, self.channels)
        kernels = (SETS, 3, 3, self.channels, self.features)
        return [rng.normal(size=shape).astype(np.float32) for shape in (maps, kernels)]


# Half of a step of four samples: both directions, text encoder and UNet.
STEP = [
    Product(76, 154, 256, 256),
    Product(74, 2048, 64, 64),
    Product(80, 128, 256, 256),
    Product(80, 512, 128, 128),
    Product(12, 154, 256, 1024),
    Product(12, 154, 1024, 256),
    Product(5, 2048, 64, 512),
    Product(5, 2048, 512, 64),
    Product(5, 512, 128, 1024),
    Product(5, 512, 1024, 128),
    Product(5, 128, 256, 2048),
    Product(5, 128, 2048, 256),
    Product(7, 128, 256, 2304),
    Product(7, 128, 2304, 256),
    Product(12, 32, 256, 2304),
    Product(12, 32, 2304, 256),
    Product(104, 128, 64, 1024, batch=2),
    Product(136, 128, 1024, 64, batch=2),
    Convolution(12, 32, 64, 64),
    Convolution(12, 16, 128, 128),
    Convolution(2, 32, 128, 128),
    Convolution(2, 16, 256, 256),
]


def of_xla(work: Product | Convolution, operands: list[np.ndarray]) -> Callable[[], object]:
    """A call of one compiled program."""
    import jax

    def one(a, b):
        if isinstance(work, Product):
            return a @ b
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(a, b, (1, 1), "SAME", dimension_numbers=layout)

    # Each operand by itself: XLA would copy a part of a larger array before the product.
    given = jax.device_put([list(operand) for operand in operands])
    run = jax.jit(lambda a, b: [one(x, y) for x, y in zip(a, b, strict=True)])
    return lambda: jax.block_until_ready(run(*given))


def of_torch(work: Product | Convolution, operands: list[np.ndarray]) -> Callable[[], object]:
    """The same calls of PyTorch, maps and kernels in its own layout."""
    import torch

    a, b = map(torch.from_numpy, operands)
    if isinstance(work, Product):
        return lambda: [torch.matmul(a[number], b[number]) for number in range(SETS)]
    a, b = a.permute(0, 1, 4, 2, 3).contiguous(), b.permute(0, 4, 3, 1, 2).contiguous()
    return lambda: [
        torch.nn.functional.conv2d(a[number], b[number], padding=1) for number in range(SETS)
    ]


def fastest(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one product, after two calls that are not counted."""
    times = []
    for number in range(repeats + 2):
        started = time.perf_counter()
        call()
        if number > 1:
            times.append(time.perf_counter() - started)
    return min(times) / SETS


def measure(
    works: list[Product | Convolution], repeats: int
) -> list[tuple[Product | Convolution, float, float]]:
    """Seconds of each by XLA and by PyTorch, one after the other."""
    import torch

    torch.set_num_threads(1)
    rng, found = np.random.default_rng(0), []
    for work in works:
        operands = work.operands(rng)
        calls = of_xla(work, operands), of_torch(work, operands)
        both = [[fastest(call, repeats) for call in calls] for _ in range(2)]  # A B A B
        xla, theirs = np.min(both, axis=0)
        found.append((work, float(xla), float(theirs)))
    return found


def table(found: list[tuple[Product | Convolution, float, float]]) -> str:
    """Markdown: speeds, and what a step would take of them."""
    lines = [
        "| float32, one core | in a step | XLA | PyTorch |",
        "|---|---|---|---|",
    ]
    for work, *seconds in found:
        speeds = " | ".join(f"{work.flops() / one / 1e9:.0f} GF/s" for one in seconds)
        lines.append(f"| {work.name()} | {work.count} | {speeds} |")
    sums = [sum(row[0].count * row[place] for row in found) for place in (1, 2)]
    needed = sum(work.count * work.flops() for work, *_ in found)
    speeds = " | ".join(f"{1e3 * one:.0f} ms, {needed / one / 1e9:.0f} GF/s" for one in sums)
    lines.append(f"| all of a step, {needed / 1e9:.1f} GF | | {speeds} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=positive, default=30, help="calls of each (default: 30)")
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.error("PyTorch is not installed, with which XLA is compared: pip install torch")
    if hasattr(os, "sched_setaffinity"):  # Linux; elsewhere XLA takes all cores
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(table(measure(STEP, args.repeats)))


if __name__ == "__main__":
    sys.exit(main())
