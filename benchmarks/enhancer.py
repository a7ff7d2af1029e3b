"""Times the training step of a shared ID-Enhancer on random samples; prints JSON lines.

    python -m benchmarks.enhancer [--model mini|tiny|demo|sd21] [--batch 8 32] [--parts 1]
                                  [--mixed_precision no|bf16] [--attention auto] [--repeats 5]

The step is that of `idea-train-enhancer` with its defaults, on one device. Reading the samples is
not in it.
"""

import argparse
import json
import statistics
import sys
import time

from benchmarks import networks
from benchmarks.options import positive
from idea_jax import launch


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.enhancer", description=__doc__.splitlines()[0]
    )
    networks.add_flags(parser)
    parser.add_argument(
        "--batch", type=positive, nargs="+", default=[8], help="samples of a step, each in turn"
    )
    parser.add_argument(
        "--parts", type=positive, default=1, help="in which a step takes them, one after the other"
    )
    args = parser.parse_args(argv)
    if any(size % args.parts for size in args.batch):
        parser.error(f"--parts {args.parts} must divide each --batch")
    return args


def random_samples(model, size: int):
    """A batch of samples, of random faces and pictures and of token ids that name the person."""
    import numpy as np

    from idea_jax.enhancer.samples import EnhancerBatch
    from idea_jax.faces.models import WIDTH

    rng = np.random.default_rng(0)
    side, text = model.unet.sample_size, model.text
    face = rng.standard_normal((size, WIDTH), np.float32)
    ids = rng.integers(0, text.vocab_size, (size, text.max_position_embeddings)).astype(np.int32)
    ids[:, 7:9] = [text.vocab_size, text.vocab_size + 1]
    latents = (size, side, side, model.vae.latent_channels)
    return EnhancerBatch(
        row=np.arange(size, dtype=np.int32),
        face=face / np.linalg.norm(face, axis=1, keepdims=True),
        mean=rng.standard_normal(latents).astype(np.float16),
        std=np.full(latents, 0.1, np.float16),
        token_ids=ids,
    )


def measure(args: argparse.Namespace) -> None:
    """Prints one line for each size of a step.

    Raises: FloatingPointError if a loss or a gradient is not finite.
    """
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from idea_jax.config.reading import build
    from idea_jax.enhancer.beginning import optimizer_of
    from idea_jax.enhancer.settings import EnhancerTrainConfig
    from idea_jax.enhancer.step import EnhancerProgram, Recipe, init_state, train_step
    from idea_jax.method import shared
    from idea_jax.runtime.versions import versions

    model, frozen = networks.load(args)
    needed = {"pretrained_model_name_or_path": "mini", "data": ["."]}  # neither is read
    cfg = build(EnhancerTrainConfig, {}, needed)
    width = model.text.hidden_size
    config = shared.EnhancerConfig(cfg.kind, width, width=cfg.width, kv_rank=cfg.kv_rank)
    tokens = 0.1 * np.random.default_rng(1).standard_normal((config.num_tokens, width))
    tree = shared.init_shared(config, model, jax.random.key(0), tokens, 1.0, tokens)
    constants = {name: leaf for name, leaf in tree.items() if name not in shared.TRAINED}
    optimizer = optimizer_of(cfg)
    mesh = Mesh(np.array(jax.local_devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    for size in args.batch:
        recipe = Recipe(size, args.parts, cfg.drop_adapter, cfg.min_snr_gamma, cfg.ema_decay)
        program = EnhancerProgram(model, config, recipe, optimizer, mesh)
        state = init_state(optimizer, tree)
        batch = jax.device_put(random_samples(model, size))
        inputs = {"seed": np.uint32(0), "stop": np.zeros(1, np.int32)}
        began = time.perf_counter()
        given = constants, batch, inputs | {"step": np.int32(0)}
        compiled = train_step.lower(program, frozen, state, *given).compile()
        compiling, times = time.perf_counter() - began, []
        for step in range(args.repeats + 1):  # the first one is not counted
            given = constants, batch, inputs | {"step": np.int32(step)}
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(frozen, state, *given))
            times.append(time.perf_counter() - began)
        if not metrics.finite:
            raise FloatingPointError(f"a step of {size} samples has a loss that is no number")
        memory = compiled.memory_analysis()
        line = {
            **networks.about(args, model),
            "batch": size,
            "parts": args.parts,
            "compile_s": round(compiling, 2),
            "step_min_ms": round(1e3 * min(times[1:]), 2),
            "step_median_ms": round(1e3 * statistics.median(times[1:]), 2),
            "samples_per_second": round(size / min(times[1:]), 2),
            "device_arguments_mb": round(memory.argument_size_in_bytes / 1e6, 1),
            "device_temporaries_mb": round(memory.temp_size_in_bytes / 1e6, 1),
            "versions": versions(),
        }
        print(json.dumps(line), flush=True)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return launch.run(lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
