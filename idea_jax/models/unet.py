"""The denoising UNet of Stable Diffusion 1.x, 2.x and XL.

The text enters as keys and values: `project_kv` computes them from a context with the kernels of
`cross_kv`, a tree of its own beside the UNet's parameters, and the network is called with the
result. Both trees, and the keys and values, have the structure
`[block]["attentions_j"]["transformer_blocks_k"]["to_k" | "to_v"]`, where block is
`down_blocks_i`, `mid_block` or `up_blocks_i`. In SDXL a text enters in a second way, too: its
pooled output and six numbers, the sizes of the picture, are added to the timestep's embedding. Keys
and values then have the pooled output beside them, as `kv["pooled"]`.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from idea_jax.models.config_reader import OF_AVERAGES, ConfigReader
from idea_jax.models.layers import (
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    Transformer2DModel,
    Upsample2D,
    conv3x3,
    dense,
    timestep_embedding,
)
from idea_jax.models.precision import exact

# Conversions before diffusers 0.9 wrote any value; diffusers takes this one instead of a smaller.
OLD_SAMPLE_SIZE = 64

DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # has cross-attention
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

SIZE_IDS = 6  # original height and width, top and left of the crop, target height and width


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the UNet; a tuple holds one entry per level, from full resolution downwards."""

    sample_size: int  # height and width of the latents the network was trained on
    in_channels: int
    out_channels: int
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    transformer_layers: tuple[int, ...]
    num_attention_heads: tuple[int, ...]
    cross_attention_dim: int
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    addition_time_embed_dim: int = 0  # of each of the six sizes; 0 where none is read (not SDXL)
    addition_embed_dim: int = 0  # of the pooled output and all sizes together

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled output that is added to the timestep's embedding; 0 for none."""
        return self.addition_embed_dim - SIZE_IDS * self.addition_time_embed_dim

    @classmethod
    def from_dict(cls, values: dict, where: str) -> "UNetConfig":
        """Reads diffusers' `unet/config.json`.

        Hugging Face's `attention_head_dim` is really the number of heads
        (https://github.com/huggingface/diffusers/issues/2011), and is read as such.

        Raises: UnsupportedConfig, naming every key with an unsupported value and every unknown key.
        """
        read = ConfigReader(values, where)
        read.expect("_class_name", "UNet2DConditionModel", "FlaxUNet2DConditionModel")
        written_by = read.take("_diffusers_version", str, "")
        channels = read.take_list("block_out_channels", int) or ()
        levels = len(channels)
        added = values.get("addition_embed_type") is not None
        config = cls(
            sample_size=read.take("sample_size", int, 64),
            in_channels=read.take("in_channels", int, 4),
            out_channels=read.take("out_channels", int, 4),
            down_block_types=read.take_list("down_block_types", str),
            up_block_types=read.take_list("up_block_types", str),
            block_out_channels=channels,
            layers_per_block=read.take("layers_per_block", int, 2),
            transformer_layers=read.take_list("transformer_layers_per_block", int, levels, 1),
            num_attention_heads=read.take_list("attention_head_dim", int, levels, 8),
            cross_attention_dim=read.take("cross_attention_dim", int),
            use_linear_projection=read.take("use_linear_projection", bool, False),
            norm_num_groups=read.take("norm_num_groups", int, 32),
            norm_eps=read.take("norm_eps", float, 1e-5),
            flip_sin_to_cos=read.take("flip_sin_to_cos", bool, True),
            freq_shift=read.take("freq_shift", float, 0),
            addition_time_embed_dim=read.take("addition_time_embed_dim", int) if added else 0,
            addition_embed_dim=(
                read.take("projection_class_embeddings_input_dim", int) if added else 0
            ),
        )
        if not read.problems and is_old(written_by) and config.sample_size < OLD_SAMPLE_SIZE:
            read.notices.append(
                f"sample_size is {config.sample_size}, of an old conversion (diffusers "
                f"{written_by}); {OLD_SAMPLE_SIZE} is used, as diffusers does. --resolution, or "
                "--height and --width, ask for other sizes"
            )
            config = dataclasses.replace(config, sample_size=OLD_SAMPLE_SIZE)
        read.expect("addition_embed_type", None, "text_time")
        if not added:
            read.expect("addition_time_embed_dim", None)
            read.expect("projection_class_embeddings_input_dim", None)
        read.expect("act_fn", "silu", "swish")
        read.expect("only_cross_attention", False, [False] * levels)
        read.expect("mid_block_only_cross_attention", None, False)
        for name, default in _ONLY_DEFAULT.items():
            read.expect(name, default)
        read.ignore(*_HARMLESS)
        if not read.problems:
            config._check(read)
        read.close()
        return config

    def _check(self, read: ConfigReader) -> None:
        levels = len(self.block_out_channels)
        for name in ("down_block_types", "up_block_types"):
            size = len(getattr(self, name))
            read.refuse(size != levels, f"{name} has {size} entries for {levels} levels")
        for types, known in (
            (self.down_block_types, DOWN_BLOCKS),
            (self.up_block_types, UP_BLOCKS),
        ):
            for block in sorted(set(types) - set(known)):
                read.refuse(True, f"block type {block!r}: only {' or '.join(known)} is supported")
        for channels, heads in zip(self.block_out_channels, self.num_attention_heads, strict=False):
            read.refuse(
                channels % heads > 0, f"{channels} channels do not divide into {heads} heads"
            )
            read.refuse(
                channels % self.norm_num_groups > 0,
                f"{channels} channels do not divide into norm_num_groups = {self.norm_num_groups}",
            )
        read.refuse(self.block_out_channels[0] % 2 > 0, "block_out_channels[0] is odd")
        read.refuse(
            self.addition_embed_dim > 0 and self.pooled_dim <= 0,
            f"projection_class_embeddings_input_dim = {self.addition_embed_dim}: expected more "
            f"than {SIZE_IDS} times addition_time_embed_dim = {self.addition_time_embed_dim}",
        )

    def to_dict(self) -> dict:
        """The inverse of `from_dict`: the content of a diffusers `unet/config.json`."""
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": self.addition_time_embed_dim,
            "projection_class_embeddings_input_dim": self.addition_embed_dim,
        }
        return {
            **(added if self.addition_embed_dim else {}),
            "_class_name": "UNet2DConditionModel",
            "sample_size": self.sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "down_block_types": list(self.down_block_types),
            "up_block_types": list(self.up_block_types),
            "block_out_channels": list(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "transformer_layers_per_block": list(self.transformer_layers),
            "attention_head_dim": list(self.num_attention_heads),
            "cross_attention_dim": self.cross_attention_dim,
            "use_linear_projection": self.use_linear_projection,
            "norm_num_groups": self.norm_num_groups,
            "norm_eps": self.norm_eps,
            "flip_sin_to_cos": self.flip_sin_to_cos,
            "freq_shift": self.freq_shift,
            "act_fn": "silu",
        }


# Keys of diffusers whose default alone is supported.
_ONLY_DEFAULT = {
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
# Keys that change nothing: origin, the precision of attention logits (always float32 here), a size
# read only together with `addition_embed_type`, and the bookkeeping of diffusers' EMAModel.
_HARMLESS = (
    "_name_or_path",
    "_commit_hash",
    "upcast_attention",
    "addition_embed_type_num_heads",
    *OF_AVERAGES,
)


def is_old(version: str) -> bool:
    """Whether a diffusers version is before 0.9; one that is no version is not."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return bool(numbers) and (int(numbers[1]), int(numbers[2])) < (0, 9)


def _attention_blocks(cfg: UNetConfig) -> Iterator[tuple[str, int, int, int]]:
    """Yields (block name, width, number of attentions, transformer layers in each)."""
    levels = list(zip(cfg.block_out_channels, cfg.transformer_layers, strict=True))
    for i, (kind, (width, depth)) in enumerate(zip(cfg.down_block_types, levels, strict=True)):
        if DOWN_BLOCKS[kind]:
            yield f"down_blocks_{i}", width, cfg.layers_per_block, depth
    yield "mid_block", cfg.block_out_channels[-1], 1, cfg.transformer_layers[-1]
    for i, (kind, (width, depth)) in enumerate(zip(cfg.up_block_types, levels[::-1], strict=True)):
        if UP_BLOCKS[kind]:
            yield f"up_blocks_{i}", width, cfg.layers_per_block + 1, depth


def cross_kv_shapes(cfg: UNetConfig) -> dict:
    """The tree of cross-attention kernels: float32[cross_attention_dim, width] shapes."""
    shapes = {}
    for block, width, attentions, depth in _attention_blocks(cfg):
        kernel = jax.ShapeDtypeStruct((cfg.cross_attention_dim, width), jnp.float32)
        transformer = {
            f"transformer_blocks_{k}": {"to_k": kernel, "to_v": kernel} for k in range(depth)
        }
        shapes[block] = {f"attentions_{j}": transformer for j in range(attentions)}
    return shapes


def project_kv(cross_kv: dict, context: jax.Array, dtype: jnp.dtype) -> dict:
    """Keys and values [B, T, width] of every cross-attention layer, from context [B, T, D]."""
    context = context.astype(dtype)
    with exact(dtype):
        return jax.tree.map(lambda kernel: context @ kernel.astype(dtype), cross_kv)


class UNetBlock(nn.Module):
    """One level on the way down, the middle, or one level on the way up.

    Attributes:
      role: "down", "mid" or "up".
      level: index into the config's per-level tuples.
      resnet_channels: (in, out) of each ResNet block.
      cross: whether attentions follow the ResNet blocks (in the middle: stand between them).
      resample: whether the block ends by changing the resolution.
      attention: kernel of long self-attentions, see `flash`.
      remat: the backward pass computes the inside of ResNet and transformer blocks again.
    """

    cfg: UNetConfig
    dtype: jnp.dtype
    role: str
    level: int
    resnet_channels: tuple[tuple[int, int], ...]
    cross: bool
    resample: bool
    attention: str
    remat: bool

    def setup(self):
        cfg, dtype = self.cfg, self.dtype
        resnet = nn.remat(ResnetBlock2D) if self.remat else ResnetBlock2D
        width = cfg.block_out_channels[self.level]
        self.resnets = [
            resnet(i, o, cfg.norm_num_groups, cfg.norm_eps, dtype, time=True)
            for i, o in self.resnet_channels
        ]
        if self.cross:
            self.attentions = [
                Transformer2DModel(
                    width,
                    cfg.num_attention_heads[self.level],
                    cfg.transformer_layers[self.level],
                    cfg.norm_num_groups,
                    dtype,
                    self.attention,
                    self.remat,
                )
                for _ in range(len(self.resnet_channels) - (self.role == "mid"))
            ]
        if self.resample and self.role == "down":
            self.downsamplers = [Downsample2D(width, dtype)]
        if self.resample and self.role == "up":
            self.upsamplers = [Upsample2D(width, dtype)]

    def project_time(self, activated_time: jax.Array) -> list[jax.Array]:
        """What each ResNet block adds at each timestep, [N, its width]."""
        return [resnet.project_time(activated_time) for resnet in self.resnets]

    def down(self, x: jax.Array, times: list, kv: dict | None) -> tuple[jax.Array, list]:
        """Returns the block's output and all maps that the way up will take in."""
        skips = []
        for j, resnet in enumerate(self.resnets):
            x = resnet(x, times[j])
            if self.cross:
                x = self.attentions[j](x, kv[f"attentions_{j}"])
            skips.append(x)
        if self.resample:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips

    def middle(self, x: jax.Array, times: list, kv: dict) -> jax.Array:
        x = self.resnets[0](x, times[0])
        return self.resnets[1](self.attentions[0](x, kv["attentions_0"]), times[1])

    def up(self, x: jax.Array, times: list, kv: dict | None, skips: list) -> jax.Array:
        """Takes its maps from the end of `skips`, which it shortens."""
        for j, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips.pop()], axis=-1), times[j])
            if self.cross:
                x = self.attentions[j](x, kv[f"attentions_{j}"])
        return self.upsamplers[0](x, size=skips[-1].shape[1:3]) if self.resample else x


class TimestepEmbedding(nn.Module):
    """The two-layer network on the sinusoid of a timestep, or of all that is added to it."""

    width: int
    dtype: jnp.dtype

    def setup(self):
        self.linear_1 = dense(self.width, self.dtype)
        self.linear_2 = dense(self.width, self.dtype)

    def __call__(self, sinusoid: jax.Array) -> jax.Array:
        return self.linear_2(nn.silu(self.linear_1(sinusoid)))


class UNet2DConditionModel(nn.Module):
    """Predicts the noise (or v) in latents, given the timestep and the text's keys and values.

    `attention` is the kernel of long self-attentions, see `flash`; `remat` as of `UNetBlock`.
    """

    cfg: UNetConfig
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"
    remat: bool = False

    def setup(self):
        cfg, dtype = self.cfg, self.dtype

        def block(role, level, sizes, cross, resample):
            how = self.attention, self.remat
            return UNetBlock(cfg, dtype, role, level, sizes, cross, resample, *how)

        channels, layers = cfg.block_out_channels, cfg.layers_per_block
        last = len(channels) - 1
        self.time_embedding = TimestepEmbedding(4 * channels[0], dtype)
        if cfg.addition_embed_dim:
            self.add_embedding = TimestepEmbedding(4 * channels[0], dtype)
        self.conv_in = conv3x3(channels[0], dtype)

        down = []
        skip_channels = [channels[0]]
        for i, kind in enumerate(cfg.down_block_types):
            width, before = channels[i], channels[max(i - 1, 0)]
            sizes = ((before, width), *(((width, width),) * (layers - 1)))
            down.append(block("down", i, sizes, DOWN_BLOCKS[kind], i < last))
            skip_channels += [width] * (layers + (i < last))
        self.down_blocks = down

        middle = ((channels[-1], channels[-1]),) * 2
        self.mid_block = block("mid", last, middle, True, False)

        up = []
        before = channels[-1]
        for i, kind in enumerate(cfg.up_block_types):
            width = channels[last - i]
            sizes = []
            for _ in range(layers + 1):
                sizes.append((before + skip_channels.pop(), width))
                before = width
            up.append(block("up", last - i, tuple(sizes), UP_BLOCKS[kind], i < last))
        self.up_blocks = up
        self.conv_norm_out = GroupNorm(cfg.norm_num_groups, channels[0], cfg.norm_eps, dtype)
        self.conv_out = conv3x3(cfg.out_channels, dtype)

    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        kv: dict,
        size_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Returns float32[B, h, w, out_channels].

        Arguments: sample float[B, h, w, in_channels], any h and w; timesteps int32 or float32[B],
        or a scalar for all; kv as `project_kv` returns it, with the same B. SDXL alone: kv has a
        "pooled" [B, pooled_dim], and size_ids is [B, 6].
        """
        # One timestep for all images stays one row.
        times = self.embed_times(jnp.atleast_1d(timesteps), kv.get("pooled"), size_ids)
        return self.denoise(sample, times, kv)

    def embed_times(
        self,
        timesteps: jax.Array,
        pooled: jax.Array | None = None,
        size_ids: jax.Array | None = None,
    ) -> dict:
        """What the ResNet blocks of each level add at int32 or float32[N] timesteps: [N, width].

        In SDXL also for `pooled` [N, pooled_dim] and `size_ids` [N, 6]; a single timestep stands
        for all of their rows.
        """
        cfg = self.cfg
        sinusoid = timestep_embedding(
            timesteps, cfg.block_out_channels[0], cfg.flip_sin_to_cos, cfg.freq_shift
        )
        time = self.time_embedding(sinusoid)
        if cfg.addition_embed_dim:
            sizes = timestep_embedding(
                size_ids.reshape(-1),
                cfg.addition_time_embed_dim,
                cfg.flip_sin_to_cos,
                cfg.freq_shift,
            )
            added = jnp.concatenate([pooled, sizes.reshape(len(pooled), -1)], axis=-1)
            time = time + self.add_embedding(added)
        time = nn.silu(time)  # every ResNet block applies it, and it is the same for all of them
        return {
            "down": [block.project_time(time) for block in self.down_blocks],
            "mid": self.mid_block.project_time(time),
            "up": [block.project_time(time) for block in self.up_blocks],
        }

    def denoise(self, sample: jax.Array, times: dict, kv: dict) -> jax.Array:
        """`__call__`, with a row per image, or one for all, of what `embed_times` returns."""
        # down
        x = self.conv_in(sample)
        skips = [x]
        for i, block in enumerate(self.down_blocks):
            x, maps = block.down(x, times["down"][i], kv.get(f"down_blocks_{i}"))
            skips += maps

        # middle
        x = self.mid_block.middle(x, times["mid"], kv["mid_block"])

        # up
        for i, block in enumerate(self.up_blocks):
            x = block.up(x, times["up"][i], kv.get(f"up_blocks_{i}"), skips)

        x = self.conv_out(nn.silu(self.conv_norm_out(x)))
        return x.astype(jnp.float32)
