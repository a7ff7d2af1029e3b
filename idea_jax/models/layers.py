"""Layers shared by the networks.

Images and feature maps are [B, H, W, C]. Modules and parameters keep the names of diffusers, with
`resnets.0` written `resnets_0`. Every module takes a compute `dtype` for its matrix products and
convolutions; statistics of norms, softmax and the timestep sinusoid are float32 whatever it is.
A convolution of size 1x1 is written as `dense`, which is the same product.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from idea_jax.models import flash
from idea_jax.models.precision import exact

# diffusers' Transformer2DModel and BasicTransformerBlock
TRANSFORMER_NORM_EPS = 1e-6
LAYER_NORM_EPS = 1e-5


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mix(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """softmax(q k) v for q [B, H, Tq, D] and k, v [B, H, Tk, D]: attention without its scale.

    Its gradient is written out for two reasons. Products of the backward pass are in the dtype of
    q, k and v: derived by JAX, the two of the float32 logits would be float32, several times slower
    than bfloat16 on accelerators. And XLA's product for CPUs takes a left operand by columns at a
    quarter of its speed, so that of the [Tq, Tk] matrices none is transposed.
    """
    return _mix_fwd(q, k, v, causal)[0]


def _mix_fwd(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> tuple[jax.Array, tuple]:
    logits = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    if causal:
        visible = jnp.tril(jnp.ones(logits.shape[2:], bool))
        logits = jnp.where(visible[None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
    return mixed, (q, k, v, weights, mixed)


def _mix_bwd(causal: bool, saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, ...]:
    # Weights that the mask made zero get no gradient, so `causal` needs no case of its own.
    q, k, v, weights, mixed = saved
    with exact(q.dtype):  # traced after the networks, so outside of theirs
        dot_out = jnp.einsum("bhqd,bhkd->bhqk", cotangent, v, preferred_element_type=jnp.float32)
        # The softmax's own sum over its row, as one over D numbers instead of Tk.
        row = cotangent.astype(jnp.float32) * mixed.astype(jnp.float32)
        row = row.sum(axis=-1, keepdims=True)
        logits = (weights.astype(jnp.float32) * (dot_out - row)).astype(q.dtype)
        return (
            jnp.einsum("bhqk,bhkd->bhqd", logits, k),
            jnp.einsum("bhqd,bhqk->bhdk", q, logits).swapaxes(2, 3),
            jnp.einsum("bhqd,bhqk->bhdk", cotangent, weights).swapaxes(2, 3),
        )


_mix.defvjp(_mix_fwd, _mix_bwd)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, num_heads: int, causal: bool = False
) -> jax.Array:
    """Multi-head scaled dot-product attention: [B, Tq, C] from q [B, Tq, C] and k, v [B, Tk, C].

    Logits and softmax are float32; the weights are cast to the dtype of v. `causal` lets position
    i see the positions up to i only.
    """
    B, Tq, C = q.shape
    head_dim = C // num_heads

    # Heads before positions: on the CPU, products over [B, T, H, D] take twice as long.
    def split(x):
        return x.reshape(B, -1, num_heads, head_dim).transpose(0, 2, 1, 3)

    mixed = _mix(split(q * head_dim**-0.5), split(k), split(v), causal)
    return mixed.transpose(0, 2, 1, 3).reshape(B, Tq, C)


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, num_heads: int) -> jax.Array:
    """As `attention`, some positions of q after the others; q [B, Tq, C] as `flash.chunk` allows.

    The matrix of weights never is in memory as a whole, and the backward pass computes it again:
    on a CPU, twice as fast as writing and reading it.
    """
    B, Tq, C = q.shape
    size = flash.chunk(Tq)

    @jax.checkpoint
    def of_chunk(some):
        return attention(some, k, v, num_heads)

    chunks = q.reshape(B, Tq // size, size, C).swapaxes(0, 1)
    return jax.lax.map(of_chunk, chunks).swapaxes(0, 1).reshape(B, Tq, C)


def timestep_embedding(
    timesteps: jax.Array, dim: int, flip_sin_to_cos: bool, freq_shift: float
) -> jax.Array:
    """Sinusoids float32[B, dim] of timesteps [B], whose period grows from 2 pi to 2 pi 10000.

    Source: diffusers `get_timestep_embedding`; `flip_sin_to_cos` puts the cosines first.
    """
    half = dim // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half) / (half - freq_shift))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    parts = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


class GroupNorm(nn.Module):
    """Group normalisation over H, W and the channels of a group; statistics in float32."""

    num_groups: int
    channels: int
    eps: float
    dtype: jnp.dtype

    def setup(self):
        self.scale = self.param("scale", nn.initializers.ones, (self.channels,))
        self.bias = self.param("bias", nn.initializers.zeros, (self.channels,))

    def __call__(self, x: jax.Array) -> jax.Array:
        B, _, _, C = x.shape
        x32 = x.astype(jnp.float32)

        # Mean and mean square of each channel, then of each group, both from one pass over x.
        def over_group(moment):
            moment = moment.reshape(B, self.num_groups, -1).mean(axis=-1, keepdims=True)
            return jnp.broadcast_to(moment, (B, self.num_groups, C // self.num_groups))

        mean = over_group(x32.mean(axis=(1, 2))).reshape(B, C)
        square = over_group(jnp.square(x32).mean(axis=(1, 2))).reshape(B, C)
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        scale = self.scale.astype(jnp.float32)[None, :] * jax.lax.rsqrt(variance + self.eps)
        shift = self.bias.astype(jnp.float32)[None, :] - mean * scale
        return (x32 * scale[:, None, None, :] + shift[:, None, None, :]).astype(self.dtype)


def layer_norm(eps: float, dtype: jnp.dtype) -> nn.LayerNorm:
    """Layer normalisation over channels; statistics in float32, result in `dtype`."""
    return nn.LayerNorm(epsilon=eps, dtype=dtype)


# UNet and VAE take their weights from a checkpoint or from `sd.init`. Flax traces the initialisers
# again in every program, to compare shapes, and drawing random numbers takes long to trace.
ZEROS = nn.initializers.zeros


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, elementwise.

    In float32 it is computed as PyTorch does, by erf: JAX's own is by erfc, which takes 2.5 times
    as long on a CPU. In fewer bits 1 + erf would lose what small values are.
    """
    if x.dtype != jnp.float32:
        return nn.gelu(x, approximate=False)
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


def dense(features: int, dtype: jnp.dtype, use_bias: bool = True) -> nn.Dense:
    """A linear layer over channels; Flax's own initial values are zeros."""
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=ZEROS)


# XLA's convolutions for CPUs are slow where a map has few positions and many channels: the product
# of its patches with the kernel is 1.3 to 6 times as fast there, and the gradient 2 to 10 times.
PATCHED = 256  # channels of an input, at least
PATCHED_POSITION = 4  # channels for each position of an output, at least


def _convolve(x: jax.Array, kernel: jax.Array, strides, padding, **given) -> jax.Array:
    """`jax.lax.conv_general_dilated` of maps [B, H, W, C] with a kernel [h, w, C, D]."""
    convolve = partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **given
    )
    _, height, width, features = jax.eval_shape(convolve, x, kernel).shape
    least = max(PATCHED, PATCHED_POSITION * height * width)
    if x.shape[-1] < least or x.dtype != jnp.float32:
        return convolve(x, kernel)

    def multiply(x, kernel):
        padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        down, across = strides
        patches = [
            padded[:, row : row + down * height : down, column : column + across * width : across]
            for row in range(kernel.shape[0])
            for column in range(kernel.shape[1])
        ]
        return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, features)

    return jax.lax.platform_dependent(x, kernel, cpu=multiply, default=convolve)


def conv3x3(channels: int, dtype: jnp.dtype, stride: int = 1, padding=((1, 1), (1, 1))) -> nn.Conv:
    """A 3x3 convolution with its padding written out; Flax's own initial values are zeros."""
    return nn.Conv(
        channels,
        (3, 3),
        strides=stride,
        padding=padding,
        dtype=dtype,
        kernel_init=ZEROS,
        conv_general_dilated=_convolve,
    )


class ResnetBlock2D(nn.Module):
    """Two norm-SiLU-convolution stages with a shortcut; `time` adds a row for the timestep."""

    in_channels: int
    out_channels: int
    num_groups: int
    eps: float
    dtype: jnp.dtype
    time: bool = False

    def setup(self):
        self.norm1 = GroupNorm(self.num_groups, self.in_channels, self.eps, self.dtype)
        self.conv1 = conv3x3(self.out_channels, self.dtype)
        if self.time:
            self.time_emb_proj = dense(self.out_channels, self.dtype)
        self.norm2 = GroupNorm(self.num_groups, self.out_channels, self.eps, self.dtype)
        self.conv2 = conv3x3(self.out_channels, self.dtype)
        if self.in_channels != self.out_channels:
            self.conv_shortcut = dense(self.out_channels, self.dtype)

    def project_time(self, activated_time: jax.Array) -> jax.Array:
        """The row for each timestep, [N, out_channels], of its embedding after SiLU [N, E]."""
        return self.time_emb_proj(activated_time)

    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        """x [B, H, W, in_channels]; `time` [B or 1, out_channels], from `project_time`."""
        h = self.conv1(nn.silu(self.norm1(x)))
        if self.time:
            h = h + time[:, None, None, :]
        h = self.conv2(nn.silu(self.norm2(h)))
        if self.in_channels != self.out_channels:
            x = self.conv_shortcut(x)
        return x + h


class Downsample2D(nn.Module):
    """Halves H and W with a 3x3 convolution of stride 2.

    The UNet pads by one on every side; the VAE's encoder pads only below and to the right.
    """

    channels: int
    dtype: jnp.dtype
    asymmetric: bool = False

    def setup(self):
        pad = (0, 1) if self.asymmetric else (1, 1)
        self.conv = conv3x3(self.channels, self.dtype, stride=2, padding=(pad, pad))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(x)


class Upsample2D(nn.Module):
    """Doubles H and W by repetition, then convolves.

    `size` (H, W) crops the last row or column where the map on the way down had an odd size:
    the same values as a nearest-neighbour resize to that size.
    """

    channels: int
    dtype: jnp.dtype

    def setup(self):
        self.conv = conv3x3(self.channels, self.dtype)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        B, H, W, C = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (B, H, 2, W, 2, C))
        x = x.reshape(B, 2 * H, 2 * W, C)
        if size is not None:
            x = x[:, : size[0], : size[1], :]
        return self.conv(x)


class GEGLU(nn.Module):
    """Linear layer to twice the width, one half gating the other through the exact GELU."""

    width: int
    dtype: jnp.dtype

    def setup(self):
        self.proj = dense(2 * self.width, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * gelu(gate)


class FeedForward(nn.Module):
    """The feed-forward part of a transformer block: GEGLU to four times the width, and back."""

    width: int
    dtype: jnp.dtype

    def setup(self):
        self.net_0 = GEGLU(4 * self.width, self.dtype)
        self.net_2 = dense(self.width, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.net_2(self.net_0(x))


class SelfAttention(nn.Module):
    """Self-attention over [B, T, C]; `attention` is the kernel for long sequences (`flash`)."""

    width: int
    num_heads: int
    dtype: jnp.dtype
    attention: str = "xla"

    def setup(self):
        self.to_q = dense(self.width, self.dtype, use_bias=False)
        self.to_k = dense(self.width, self.dtype, use_bias=False)
        self.to_v = dense(self.width, self.dtype, use_bias=False)
        self.to_out_0 = dense(self.width, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        chosen = flash.choose(self.attention, x.shape[1], self.width // self.num_heads)
        kernels = {"cudnn": flash.cudnn, "splash": flash.splash, "chunked": chunked_attention}
        kernel = kernels.get(chosen, attention)
        return self.to_out_0(kernel(self.to_q(x), self.to_k(x), self.to_v(x), self.num_heads))


class CrossAttention(nn.Module):
    """Attention from [B, T, C] to keys and values that were projected outside the network."""

    width: int
    num_heads: int
    dtype: jnp.dtype

    def setup(self):
        self.to_q = dense(self.width, self.dtype, use_bias=False)
        self.to_out_0 = dense(self.width, self.dtype)

    def __call__(self, x: jax.Array, kv: dict) -> jax.Array:
        """`kv` holds `to_k` and `to_v`, each [B, text positions, C]."""
        k, v = kv["to_k"].astype(self.dtype), kv["to_v"].astype(self.dtype)
        return self.to_out_0(attention(self.to_q(x), k, v, self.num_heads))


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a LayerNorm before it."""

    width: int
    num_heads: int
    dtype: jnp.dtype
    attention: str = "xla"

    def setup(self):
        self.norm1 = layer_norm(LAYER_NORM_EPS, self.dtype)
        self.attn1 = SelfAttention(self.width, self.num_heads, self.dtype, self.attention)
        self.norm2 = layer_norm(LAYER_NORM_EPS, self.dtype)
        self.attn2 = CrossAttention(self.width, self.num_heads, self.dtype)
        self.norm3 = layer_norm(LAYER_NORM_EPS, self.dtype)
        self.ff = FeedForward(self.width, self.dtype)

    def __call__(self, x: jax.Array, kv: dict) -> jax.Array:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), kv)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the positions of a feature map [B, H, W, C]."""

    width: int
    num_heads: int
    depth: int
    num_groups: int
    dtype: jnp.dtype
    attention: str = "xla"
    remat: bool = False  # of each block the backward pass keeps what enters it alone

    def setup(self):
        block = nn.remat(BasicTransformerBlock) if self.remat else BasicTransformerBlock
        self.norm = GroupNorm(self.num_groups, self.width, TRANSFORMER_NORM_EPS, self.dtype)
        self.proj_in = dense(self.width, self.dtype)
        self.transformer_blocks = [
            block(self.width, self.num_heads, self.dtype, self.attention) for _ in range(self.depth)
        ]
        self.proj_out = dense(self.width, self.dtype)

    def __call__(self, x: jax.Array, kv: dict) -> jax.Array:
        B, H, W, C = x.shape
        h = self.proj_in(self.norm(x).reshape(B, H * W, C))
        for k, block in enumerate(self.transformer_blocks):
            h = block(h, kv[f"transformer_blocks_{k}"])
        return x + self.proj_out(h).reshape(B, H, W, C)
