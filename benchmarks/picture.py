"""Profiles drawing: what takes the time, and when the device is idle; prints a line of JSON.

    python -m benchmarks.picture [--model mini|tiny|demo|sd21] [--pictures 1] [--steps 50]
                                 [--mixed_precision no|bf16] [--attention auto] [--repeats 5]

The program is that of `idea-sample`, on one device. XLA_FLAGS are in the line, so that runs with
and without one can be told apart: `XLA_FLAGS=--xla_gpu_enable_command_buffer=` starts each kernel
by itself, instead of graphs of them.
"""

import argparse
import json
import os
import statistics
import sys
import time

from benchmarks import networks
from benchmarks.options import positive
from idea_jax import launch


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.picture", description=__doc__.splitlines()[0]
    )
    networks.add_flags(parser)
    parser.add_argument("--pictures", type=positive, default=1, help="drawn at once")
    parser.add_argument("--steps", type=positive, default=50, help="each with guidance")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict:
    """What is reported of drawing.

    Returns: times of calls without a profile, and what `profiling` says of one with it;
      "idle_of_median": the share of the median call in which no operation ran.
    """
    import jax
    import numpy as np

    from benchmarks import profiling, settings
    from idea_jax.runtime.versions import versions
    from idea_jax.sampling import engine, programs

    model, frozen = networks.load(args)
    side = model.unet.sample_size * model.vae.downscale
    how = programs.Sampling((side, side), "ddim", args.steps)
    mesh = engine.mesh_of(jax.local_devices()[:1])
    _, shapes, *_ = engine.call_shapes(model, engine.Kind(how, 1, True), args.pictures, mesh)
    draw, key = np.random.default_rng(0).standard_normal, np.uint32(0)
    kv = jax.tree.map(lambda x: jax.numpy.asarray(draw(x.shape, np.float32), x.dtype), shapes)
    numbers = np.stack([np.full(args.pictures, key), np.arange(args.pictures, dtype=key.dtype)], 1)
    given = frozen, kv, numbers, np.full(args.pictures, settings.GUIDANCE, np.float32)
    given = jax.block_until_ready(jax.device_put(given))
    began = time.perf_counter()
    compiled = programs.draw_everywhere.lower(mesh, model, *given, how).compile()
    compiling, times = time.perf_counter() - began, []
    for _ in range(args.repeats + 1):  # the first one is not counted
        began = time.perf_counter()
        jax.block_until_ready(compiled(*given))
        times.append(1e3 * (time.perf_counter() - began))
    profile = profiling.record(lambda: compiled(*given))
    filled, middle = profiling.occupied(profile), statistics.median(times[1:])
    return {
        **networks.about(args, model),
        "pictures": args.pictures,
        "steps": args.steps,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "compile_s": round(compiling, 2),
        "min_ms": round(min(times[1:]), 2),
        "median_ms": round(middle, 2),
        "temporaries_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
        **{name: round(value, 4) for name, value in filled.items()},
        "idle_of_median": round(1 - filled["busy_ms"] / middle, 4),
        "top_ten": [[name, round(share, 4)] for name, share in profiling.top_ten(profile)],
        "versions": versions(),
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return launch.run(lambda: print(json.dumps(measure(args)), flush=True))


if __name__ == "__main__":
    sys.exit(main())
