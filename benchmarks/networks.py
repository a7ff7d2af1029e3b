"""The networks of a program that is timed alone: random weights on the device, without a folder."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

from benchmarks.options import positive

if TYPE_CHECKING:  # importing JAX takes a second, which --help does without
    from idea_jax.models import sd


def add_flags(parser: argparse.ArgumentParser, *, model: str = "mini") -> None:
    """Adds what decides the networks, and how often they are timed.

    Args:
      model: the default of `--model`.
    """
    parser.add_argument("--model", default=model, choices=("mini", "tiny", "demo", "sd21"))
    parser.add_argument("--mixed_precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--attention", default="auto", choices=("auto", "xla", "cudnn", "splash"))
    parser.add_argument("--repeats", type=positive, default=5)


def load(args: argparse.Namespace) -> "tuple[sd.StableDiffusion, sd.Frozen]":
    """The model and its weights; those of the mini are its own, all others are random.

    Raises: UnsupportedAttention, if a kernel was named that does not run here.
    """
    import jax

    from idea_jax import random_sd
    from idea_jax.config.settings import COMPUTE_DTYPES
    from idea_jax.models import flash, hub, sd

    dtype = COMPUTE_DTYPES[args.mixed_precision]
    attention = flash.resolve(args.attention, jax.local_devices()[0], dtype)
    if args.model == "mini":
        model, frozen = sd.load(hub.resolve("mini").folder, compute_dtype=dtype)
    else:
        model = random_sd.config(args.model, "sd2", vocab_size=random_sd.CLIP_VOCAB_SIZE)
        frozen = jax.tree.map(lambda x: x.astype(dtype), sd.init(model, jax.random.key(0)))
    return dataclasses.replace(model, compute_dtype=dtype, attention=attention), frozen


def about(args: argparse.Namespace, model: "sd.StableDiffusion") -> dict:
    """What a line of results says of the networks and of where they ran."""
    import jax

    return {
        "model": args.model,
        "device": jax.devices()[0].device_kind,
        "mixed_precision": args.mixed_precision,
        "attention": model.attention,
    }
