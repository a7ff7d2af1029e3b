"""Self-attention kernels that never hold the matrix of weights: cuDNN's on NVIDIA, Pallas' on TPU.

Which one a device takes is decided here, the chunks of `layers.chunked_attention` for CPUs too.

They compute what `layers.attention` computes, up to the rounding of the compute dtype. Only the
long sequences of the UNet's first levels are worth them; whatever a kernel does not do, and all
shorter sequences, stay with plain XLA.
"""

import jax
import jax.numpy as jnp

from idea_jax.errors import InputError
from idea_jax.models.precision import exact

MIN_POSITIONS = 1024  # shorter sequences have weights that fit the caches
CHUNK = 128  # positions, of sequences up to 16 times as long; measured on two cores
SPLASH_BLOCKS = (512, 256, 128)  # positions in a tile; the first that divides the sequence


class UnsupportedAttention(InputError, ValueError):
    """The kernel that was asked for does not run on this device or in this type."""


def resolve(kind: str, device: jax.Device, dtype: str) -> str:
    """Returns the kernel to use, "xla", "cudnn", "splash" or "chunked".

    Args:
      kind: one of them, or "auto" for the fastest that the device has.
      device: that runs it, such as `jax.local_devices()[0]`.
      dtype: compute dtype of the network.

    Raises: UnsupportedAttention, if a kernel was named that does not run there.
    """
    fits = {
        "cudnn": has_cudnn(device) and dtype == "bfloat16",
        "splash": device.platform == "tpu",
        "chunked": device.platform == "cpu",
    }
    if kind == "auto":
        return next((name for name, does_fit in fits.items() if does_fit), "xla")
    if kind == "chunked":  # plain XLA: any device runs it
        return kind
    if not fits.get(kind, True):
        needs = {
            "cudnn": "an NVIDIA GPU of compute capability 8 or more and --mixed_precision bf16",
            "splash": "a TPU",
        }[kind]
        raise UnsupportedAttention(
            f"--attention {kind} needs {needs}; this is {device.device_kind} in {dtype}: leave it "
            "at auto"
        )
    return kind


def has_cudnn(device: jax.Device) -> bool:
    """Whether a device is an NVIDIA GPU of Ampere or later; cuDNN's kernels are for no other.

    JAX calls AMD's GPUs "gpu" as well, and lowers the kernel for any GPU without a word.
    """
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    return float(device.compute_capability) >= 8.0


def choose(kind: str, positions: int, head_dim: int) -> str:
    """The kernel for one layer: `kind`, or "xla" where that does not pay or cannot do it."""
    if positions < MIN_POSITIONS:
        return "xla"
    if kind == "cudnn" and (head_dim > 128 or head_dim % 8):
        return "xla"
    if kind == "splash" and positions % SPLASH_BLOCKS[-1]:
        return "xla"
    if kind == "chunked" and chunk(positions) is None:
        return "xla"
    return kind


def chunk(positions: int) -> int | None:
    """How many positions `layers.chunked_attention` takes at once, so that their weights fit the
    caches: a divisor of all positions, or None where none is large enough to pay."""
    most = max(CHUNK, positions // 16)
    return next((size for size in range(most, CHUNK // 2, -1) if positions % size == 0), None)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, num_heads: int) -> jax.Array:
    """Attention bfloat16[B, T, C] of q, k, v bfloat16[B, T, C]."""

    def split(x):
        return x.reshape(*x.shape[:2], num_heads, -1)

    mixed = jax.nn.dot_product_attention(split(q), split(k), split(v), implementation="cudnn")
    return mixed.reshape(q.shape)


def splash(
    q: jax.Array, k: jax.Array, v: jax.Array, num_heads: int, *, interpret: bool = False
) -> jax.Array:
    """Attention [B, T, C] of q, k, v [B, T, C]; T is a multiple of 128.

    Args:
      interpret: run the kernel's program without a TPU, slowly, to check it.
    """
    # Imported here: Pallas takes a second, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        FullMask,
        MultiHeadMask,
        make_splash_mha,
    )

    B, T, C = q.shape
    block = next(size for size in SPLASH_BLOCKS if T % size == 0)
    names = (
        "block_q",
        "block_kv",
        "block_kv_compute",
        "block_q_dkv",
        "block_kv_dkv",
        "block_kv_dkv_compute",
        "block_q_dq",
        "block_kv_dq",
    )
    kernel = make_splash_mha(
        MultiHeadMask([FullMask((T, T))] * num_heads),
        block_sizes=BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def split(x):
        return x.reshape(B, T, num_heads, -1).transpose(0, 2, 1, 3)

    def join(x):
        return x.transpose(0, 2, 1, 3).reshape(B, T, C)

    def plain(q, k, v):
        scaled = (q * jnp.asarray((C // num_heads) ** -0.5, q.dtype)).astype(q.dtype)
        return join(jax.vmap(kernel)(split(scaled), split(k), split(v)))

    # What the backward pass needs is kept without an axis of heads: a TPU holds the last axis of
    # the kernel's arrays in multiples of 128, so heads of 64 would take twice their memory.
    def forward(q, k, v):
        mixed, pull = jax.vjp(plain, q, k, v)
        by_head = (B, num_heads, T, C // num_heads)
        return mixed, jax.tree.map(lambda x: join(x) if x.shape == by_head else x, pull)

    def backward(kept, gradient):
        # Otherwise XLA sees that both passes split alike, and keeps what is split.
        kept, gradient = jax.lax.optimization_barrier((kept, gradient))
        pull = jax.tree.map(lambda x: split(x) if x.shape == (B, T, C) else x, kept)
        with exact(gradient.dtype):  # traced after the networks, so outside of theirs
            return pull(gradient)

    attend = jax.custom_vjp(plain)
    attend.defvjp(forward, backward)
    return attend(q, k, v)
