"""Times the train step and the sampler on a random-weight checkpoint; prints JSON.

    python benchmarks/throughput.py [--size demo|tiny|sd15|sd21] [--batch 8] [--repeats 7]
                                    [--mixed_precision no|bf16] [--steps 10]

Compilation and warm-up are timed apart. Times are wall clock around a blocked call; the minimum and
the median are given, and the spread as (max - min) / median. Compare ratios within one run only.
"""

import argparse
import functools
import json
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax import checkpoint, pytrees, random_sd, sample
from idea_jax.config import PROFILE_DEFAULTS
from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.train_step import Photos, draw_batch, init_state, make_optimizer, train_step


def measure(call, repeats):
    """Seconds of the first call (compilation included) and of `repeats` further ones."""
    started = time.perf_counter()
    jax.block_until_ready(call())
    first = time.perf_counter() - started
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    median = statistics.median(times)
    return {
        "first_s": round(first, 3),
        "min_ms": round(min(times) * 1e3, 2),
        "median_ms": round(median * 1e3, 2),
        "spread": round((max(times) - min(times)) / median, 3),
    }


def person(model, frozen, method, optimizer, rng):
    """State, photos and key of a made-up person."""
    key = jax.random.key(0)
    width, vocab = model.text.hidden_size, model.text.vocab_size
    start = rng.normal(size=(2, width)).astype(np.float32)
    face = rng.normal(size=512)
    given = condition.init_given(method, model, key, start, face / np.linalg.norm(face))
    trainable = condition.init_trainable(method, model, frozen.cross_kv, key, start)
    ids = rng.integers(0, vocab, (27, model.text.max_position_embeddings)).astype(np.int32)
    ids[:, 7:9] = [vocab, vocab + 1]
    side = model.unet.sample_size
    moments = rng.normal(size=(2, 1, 2, side, side, model.unet.in_channels)).astype(np.float32)
    photos = Photos(*map(jnp.asarray, moments), jnp.int32(1), jnp.asarray(ids))
    return init_state(optimizer, trainable, given), photos, key


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="demo", choices=random_sd.SIZES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="sampling steps")
    parser.add_argument("--mixed_precision", default="no", choices=("no", "bf16"))
    args = parser.parse_args()

    dtype = "bfloat16" if args.mixed_precision == "bf16" else "float32"
    family = "sd1" if args.size == "sd15" else "sd2"
    plain = random_sd.config(args.size, family, vocab_size=random_sd.CLIP_VOCAB_SIZE)
    model = sd.StableDiffusion(plain.text, plain.unet, plain.vae, plain.schedule, dtype)
    frozen = pytrees.cast(sd.init(model, jax.random.key(0)), model.dtype)
    method = condition.make_method("paper", kv="low_rank", reg_weight=8e-4)
    rates = dict.fromkeys(method.parts(), PROFILE_DEFAULTS["paper"]["kv_learning_rate"])
    optimizer = make_optimizer(rates, beta1=0.9, beta2=0.999, epsilon=1e-7, weight_decay=1e-2)
    state, photos, key = person(model, frozen, method, optimizer, np.random.default_rng(0))

    step = jax.jit(functools.partial(train_step, model, method, optimizer))
    batch = draw_batch(model, photos, key, jnp.int32(0), args.batch)
    train = measure(lambda: step(frozen, state, batch), args.repeats)
    ids = photos.token_ids
    parts = (method, model, frozen, state.trainable, state.given)
    kv = sample.prompt_keys_values(*parts, ids[0], ids[1], jnp.float32(1))
    side = model.unet.sample_size * model.vae.downscale
    draw = functools.partial(
        sample.draw, size=(side, side), scheduler="ddim", steps=args.steps, is_guided=True, eta=0.0
    )
    indices = jnp.arange(args.batch, dtype=jnp.int32)
    drawn = measure(
        lambda: draw(model, frozen, kv, jnp.uint32(0), indices, jnp.float32(7.5)), args.repeats
    )
    print(
        json.dumps(
            {
                "weights": "random",
                "arguments": vars(args),
                "device": jax.devices()[0].device_kind,
                "load_average": os.getloadavg()[0],
                "versions": checkpoint.versions(),
                f"train_step_batch_{args.batch}": train,
                f"draw_{args.batch}_pictures_{args.steps}_steps": drawn,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
