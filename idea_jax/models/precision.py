"""Products that are what their type says on every device."""

from contextlib import AbstractContextManager, nullcontext

import jax
import jax.numpy as jnp


def exact(dtype: jnp.dtype) -> AbstractContextManager:
    """Around products in float32: in it they are that on every device.

    By default a TPU takes one product of bfloat16 for it, and an NVIDIA GPU one of TF32. Whoever
    has set `jax_default_matmul_precision` is obeyed. Products of bfloat16 stay outside: some
    kernels refuse more than one for them.
    """
    is_ours = jnp.dtype(dtype) == jnp.float32 and jax.config.jax_default_matmul_precision is None
    return jax.default_matmul_precision("highest") if is_ours else nullcontext()
