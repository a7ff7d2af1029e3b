"""The autoencoder of Stable Diffusion: images to the moments of their latents, and back."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from idea_jax.models.config_reader import OF_AVERAGES, ConfigReader
from idea_jax.models.layers import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Upsample2D,
    attention,
    conv3x3,
    dense,
)

NORM_EPS = 1e-6  # diffusers' Encoder and Decoder
MOMENTS = ("latents_mean", "latents_std")
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder; `block_out_channels` from full resolution downwards."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512
    # Of each latent channel: latents are (x - mean) * scaling_factor / std. None: 0 and 1.
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, values: dict, where: str) -> "VAEConfig":
        """Reads diffusers' `vae/config.json`.

        Raises: UnsupportedConfig, naming every key with an unsupported value and every unknown key.
        """
        read = ConfigReader(values, where)
        read.expect("_class_name", "AutoencoderKL", "FlaxAutoencoderKL")
        config = cls(
            in_channels=read.take("in_channels", int, 3),
            out_channels=read.take("out_channels", int, 3),
            block_out_channels=read.take_list("block_out_channels", int),
            layers_per_block=read.take("layers_per_block", int, 1),
            latent_channels=read.take("latent_channels", int, 4),
            norm_num_groups=read.take("norm_num_groups", int, 32),
            scaling_factor=read.take("scaling_factor", float, 0.18215),
            sample_size=read.take("sample_size", int, 32),
            **{
                name: read.take_list(name, float) if values.get(name) is not None else None
                for name in MOMENTS
            },
        )
        levels = len(config.block_out_channels or ())
        read.expect("down_block_types", ["DownEncoderBlock2D"] * levels)
        read.expect("up_block_types", ["UpDecoderBlock2D"] * levels)
        read.expect("act_fn", "silu", "swish")
        read.expect("mid_block_add_attention", True)
        read.expect("use_quant_conv", True)
        read.expect("use_post_quant_conv", True)
        read.expect("shift_factor", None)
        read.ignore(*MOMENTS)  # null, if they are still there
        # force_upcast guards float16, which is not a compute dtype here.
        read.ignore("_diffusers_version", "_name_or_path", "_commit_hash", "force_upcast")
        read.ignore(*OF_AVERAGES)
        if not read.problems:
            for name in MOMENTS:
                found = getattr(config, name)
                read.refuse(
                    found is not None and len(found) != config.latent_channels,
                    f"{name} = {found}: expected a number for each of latent_channels = "
                    f"{config.latent_channels}",
                )
            read.refuse(
                (config.latents_mean is None) != (config.latents_std is None)
                or min(config.latents_std or (1.0,)) <= 0,
                "latents_mean and latents_std belong together, and no deviation is 0 or less",
            )
            for channels in config.block_out_channels:
                read.refuse(
                    channels % config.norm_num_groups > 0,
                    f"{channels} channels do not divide into "
                    f"norm_num_groups = {config.norm_num_groups}",
                )
        read.close()
        return config

    def to_dict(self) -> dict:
        """The inverse of `from_dict`: the content of a diffusers `vae/config.json`."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": self.layers_per_block,
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_num_groups,
            "scaling_factor": self.scaling_factor,
            "sample_size": self.sample_size,
            "act_fn": "silu",
            **{name: list(found) for name in MOMENTS if (found := getattr(self, name)) is not None},
        }


class VAEAttention(nn.Module):
    """Single-head self-attention over the positions of a feature map, with a residual."""

    channels: int
    num_groups: int
    dtype: jnp.dtype

    def setup(self):
        self.group_norm = GroupNorm(self.num_groups, self.channels, NORM_EPS, self.dtype)
        self.to_q = dense(self.channels, self.dtype)
        self.to_k = dense(self.channels, self.dtype)
        self.to_v = dense(self.channels, self.dtype)
        self.to_out_0 = dense(self.channels, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        h = self.group_norm(x).reshape(B, H * W, C)
        h = self.to_out_0(attention(self.to_q(h), self.to_k(h), self.to_v(h), num_heads=1))
        return x + h.reshape(B, H, W, C)


class VAEBlock(nn.Module):
    """ResNet blocks with (in, out) channels, then at most one change of resolution."""

    channels: tuple[tuple[int, int], ...]
    num_groups: int
    dtype: jnp.dtype
    downsample: bool = False
    upsample: bool = False

    def setup(self):
        self.resnets = [
            ResnetBlock2D(i, o, self.num_groups, NORM_EPS, self.dtype) for i, o in self.channels
        ]
        if self.downsample:
            self.downsamplers = [Downsample2D(self.channels[-1][1], self.dtype, asymmetric=True)]
        if self.upsample:
            self.upsamplers = [Upsample2D(self.channels[-1][1], self.dtype)]

    def __call__(self, x: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x = resnet(x)
        if self.downsample:
            x = self.downsamplers[0](x)
        return self.upsamplers[0](x) if self.upsample else x


class VAEMidBlock(nn.Module):
    """A ResNet block, attention, a ResNet block."""

    channels: int
    num_groups: int
    dtype: jnp.dtype

    def setup(self):
        size = (self.channels, self.channels, self.num_groups, NORM_EPS, self.dtype)
        self.resnets = [ResnetBlock2D(*size) for _ in range(2)]
        self.attentions = [VAEAttention(self.channels, self.num_groups, self.dtype)]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Images [B, H, W, in_channels] to twice the latent channels."""

    cfg: VAEConfig
    dtype: jnp.dtype

    def setup(self):
        cfg, dtype, groups = self.cfg, self.dtype, self.cfg.norm_num_groups
        widths = cfg.block_out_channels
        self.conv_in = conv3x3(widths[0], dtype)
        blocks = []
        for i, width in enumerate(widths):
            same = ((width, width),) * (cfg.layers_per_block - 1)
            sizes = ((widths[max(i - 1, 0)], width), *same)
            blocks.append(VAEBlock(sizes, groups, dtype, downsample=i < len(widths) - 1))
        self.down_blocks = blocks
        self.mid_block = VAEMidBlock(widths[-1], groups, dtype)
        self.conv_norm_out = GroupNorm(groups, widths[-1], NORM_EPS, dtype)
        self.conv_out = conv3x3(2 * cfg.latent_channels, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [B, h, w, latent_channels] to images."""

    cfg: VAEConfig
    dtype: jnp.dtype

    def setup(self):
        cfg, dtype, groups = self.cfg, self.dtype, self.cfg.norm_num_groups
        widths = cfg.block_out_channels[::-1]
        self.conv_in = conv3x3(widths[0], dtype)
        self.mid_block = VAEMidBlock(widths[0], groups, dtype)
        blocks = []
        for i, width in enumerate(widths):
            sizes = ((widths[max(i - 1, 0)], width), *((width, width),) * cfg.layers_per_block)
            blocks.append(VAEBlock(sizes, groups, dtype, upsample=i < len(widths) - 1))
        self.up_blocks = blocks
        self.conv_norm_out = GroupNorm(groups, widths[-1], NORM_EPS, dtype)
        self.conv_out = conv3x3(cfg.out_channels, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder with the 1x1 layers between them. Latents here are unscaled."""

    cfg: VAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        cfg, dtype = self.cfg, self.dtype
        self.encoder = Encoder(cfg, dtype)
        self.quant_conv = dense(2 * cfg.latent_channels, dtype)
        self.post_quant_conv = dense(cfg.latent_channels, dtype)
        self.decoder = Decoder(cfg, dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance, float32[B, h, w, latent_channels], of images in [-1, 1].

        The log-variance is clipped to [-30, 20], as diffusers does.
        """
        moments = self.quant_conv(self.encoder(images)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images float32[B, H, W, out_channels], about [-1, 1], of latents [B, h, w, C]."""
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstructs images from the mean of their latents."""
        return self.decode(self.encode(images)[0])
