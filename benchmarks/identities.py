"""Times the step of many people for several numbers of people and of devices; prints JSON lines.

    python -m benchmarks.identities [--model mini|tiny|demo|sd21] [--people 1 2 4 8 16]
                                    [--devices 1 2 4 8] [--data 1] [--batch 8] [--repeats 5]
                                    [--mixed_precision no|bf16] [--attention auto]

On a CPU the devices are simulated: they share the machine's cores, so their times show nothing, and
what is judged is the structure (collectives, memory of a device). Each number of devices runs in a
process of its own. On a GPU or TPU take --devices up to those that are there. People are spread
over the devices, or over groups of --data of them, each of which shares the samples of its people;
numbers that do not divide are left out.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time

from benchmarks import networks
from benchmarks.options import positive
from idea_jax import launch

STEPS = 320  # of a person, from which people/hour is computed; nothing else of a run is in it


def figures(compiled, times: list[float], needed: float, devices: int, people: int) -> dict:
    """What is reported of a compiled step of people.

    Args:
      times: seconds of steps.
      needed: FLOPs of a step.
    """
    step, memory, text = min(times), compiled.memory_analysis(), compiled.as_text()
    return {
        "step_min_ms": round(1e3 * step, 2),
        "step_median_ms": round(1e3 * statistics.median(times), 2),
        "people_per_hour_320_steps": round(3600 * people / (STEPS * step), 2),
        "tflops_per_device": round(needed / step / devices / 1e12, 4),
        "collectives": len(re.findall(r" (?:all-reduce|all-gather)(?:-start)?\(", text)),
        "device_arguments_mb": round(memory.argument_size_in_bytes / 1e6, 1),
        "device_temporaries_mb": round(memory.temp_size_in_bytes / 1e6, 1),
        "process_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def somebody(model, method, optimizer) -> tuple:
    """The state and the photos of a person of random numbers, on the host."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from idea_jax.method import condition
    from idea_jax.training.step import Photos, init_state

    rng = np.random.default_rng(0)
    key, width, vocab = jax.random.key(0), model.text.hidden_size, model.text.vocab_size
    start = rng.normal(size=(2, width)).astype(np.float32)
    face = rng.normal(size=512)
    given = condition.init_given(model, method, key, start, face / np.linalg.norm(face))
    trainable = condition.init_trainable(model, method, key, start)
    side, channels = model.unet.sample_size, model.unet.in_channels
    moments = rng.normal(size=(2, 1, 2, side, side, channels)).astype(np.float32)
    ids = rng.integers(0, vocab, (27, model.text.max_position_embeddings)).astype(np.int32)
    ids[:, 7:9] = [vocab, vocab + 1]
    return jax.device_get(
        (init_state(optimizer, trainable, given), Photos(*moments, jnp.int32(1), ids))
    )


def measure(args: argparse.Namespace) -> None:
    """Prints one line for each number of people, on the devices of this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from idea_jax import costs
    from idea_jax.config.settings import PROFILE_DEFAULTS
    from idea_jax.method import condition
    from idea_jax.runtime.versions import versions
    from idea_jax.training.program import Program, draw_and_step, step_people
    from idea_jax.training.step import make_optimizer

    model, frozen = networks.load(args)
    method = condition.make_method("paper", kv="low_rank", reg_weight=8e-4)
    rates = dict.fromkeys(method.parts(), PROFILE_DEFAULTS["paper"]["kv_learning_rate"])
    optimizer = make_optimizer(rates, beta1=0.9, beta2=0.999, epsilon=1e-7, weight_decay=1e-2)
    (count,) = args.devices
    groups = count // args.data
    devices = np.array(jax.devices()[:count]).reshape(groups, args.data)
    mesh = Mesh(devices, ("identity", "data"), axis_types=(AxisType.Auto,) * 2)
    frozen = jax.device_put(frozen, NamedSharding(mesh, P()))
    one = somebody(model, method, optimizer)
    key = jax.random.key(0)
    program = Program(model, method, optimizer, args.batch, mesh)
    plain = dataclasses.replace(model, attention="xla")  # computes nothing twice
    plain = dataclasses.replace(program, model=plain)
    needed = costs.needed(functools.partial(draw_and_step, plain), frozen, *one, key)
    about = networks.about(args, model)
    about |= {"devices": count, "devices_on_data": args.data, "batch": args.batch}
    for people in args.people:
        if people % groups:
            continue

        def put(tree):
            return jax.device_put(tree, NamedSharding(mesh, P("identity")))

        states, photos = put(jax.tree.map(lambda leaf, n=people: np.stack([leaf] * n), one))
        last = put(np.full(people, 10**9, np.int32))
        began = time.perf_counter()
        given = photos, key, last, jnp.int32(1)
        compiled = step_people.lower(program, frozen, states, *given).compile()
        compiling = time.perf_counter() - began
        times = []
        for _ in range(args.repeats + 1):  # the first one is not counted
            began = time.perf_counter()
            states, _ = jax.block_until_ready(compiled(frozen, states, *given))
            times.append(time.perf_counter() - began)
        line = {
            **about,
            "people": people,
            "compile_s": round(compiling, 2),
            **figures(compiled, times[1:], people * needed, count, people),
            "load_average": round(os.getloadavg()[0], 1),
            "versions": versions(),
        }
        print(json.dumps(line), flush=True)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.identities", description=__doc__.splitlines()[0]
    )
    networks.add_flags(parser)
    parser.add_argument("--people", type=positive, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--devices", type=positive, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--data", type=positive, default=1)
    parser.add_argument("--batch", type=positive, default=8)
    args = parser.parse_args(argv)
    if not any(count % args.data == 0 for count in args.devices):
        parser.error(
            f"--data {args.data} divides none of --devices {' '.join(map(str, args.devices))}"
        )
    args.devices = [count for count in args.devices if count % args.data == 0]
    return args


def main() -> int:
    args = parse()
    if len(args.devices) == 1:
        # Read by the CPU backend alone, and only if it is set before JAX starts.
        flag = f"--xla_force_host_platform_device_count={args.devices[0]}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        return launch.run(lambda: measure(args))
    for count in args.devices:
        # The last one counts.
        flags = [*sys.argv[1:], "--devices", str(count)]
        done = subprocess.run([sys.executable, "-m", "benchmarks.identities", *flags])
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
