"""The image encoder of CLIP with its projection: transformers' CLIPVisionModelWithProjection."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from idea_jax.models.clip_text import ACTIVATIONS, CLIPEncoder
from idea_jax.models.config_reader import ConfigReader
from idea_jax.models.layers import layer_norm


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of the image encoder."""

    hidden_size: int
    intermediate_size: int
    projection_dim: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_dict(cls, values: dict, where: str) -> "CLIPVisionConfig":
        """Reads transformers' `image_encoder/config.json`.

        Raises: UnsupportedConfig, naming every key with an unsupported value and every unknown key.
        """
        read = ConfigReader(values, where)
        # Defaults are those of transformers' CLIPVisionConfig: its files may leave them out.
        config = cls(
            hidden_size=read.take("hidden_size", int, 768),
            intermediate_size=read.take("intermediate_size", int, 3072),
            projection_dim=read.take("projection_dim", int, 512),
            num_hidden_layers=read.take("num_hidden_layers", int, 12),
            num_attention_heads=read.take("num_attention_heads", int, 12),
            image_size=read.take("image_size", int, 224),
            patch_size=read.take("patch_size", int, 32),
            hidden_act=read.take("hidden_act", str, "quick_gelu"),
            layer_norm_eps=read.take("layer_norm_eps", float, 1e-5),
        )
        read.expect("model_type", "clip_vision_model")
        read.expect("architectures", ["CLIPVisionModelWithProjection"], None)
        read.expect("num_channels", 3)
        read.expect("attention_dropout", 0.0)
        read.expect("dropout", 0.0)
        read.ignore(
            "_name_or_path",
            "_commit_hash",
            "transformers_version",
            "torch_dtype",
            "dtype",
            "initializer_factor",
            "initializer_range",
            "return_dict",
        )
        if not read.problems:
            read.refuse(
                config.hidden_act not in ACTIVATIONS,
                f"hidden_act = {config.hidden_act!r}: only {' or '.join(ACTIVATIONS)} is supported",
            )
            read.refuse(
                config.hidden_size % config.num_attention_heads > 0,
                f"hidden_size = {config.hidden_size} does not divide into "
                f"{config.num_attention_heads} heads",
            )
            read.refuse(
                config.image_size % config.patch_size > 0,
                f"image_size = {config.image_size} does not divide into patches of "
                f"{config.patch_size}",
            )
        read.close()
        return config

    def to_dict(self) -> dict:
        """The inverse of `from_dict`: the content of an `image_encoder/config.json`."""
        return {
            "architectures": ["CLIPVisionModelWithProjection"],
            "model_type": "clip_vision_model",
            "num_channels": 3,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "projection_dim": self.projection_dim,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_act": self.hidden_act,
            "layer_norm_eps": self.layer_norm_eps,
            # transformers would compute in the precision of the file, and diffusers in float32.
            "dtype": "float32",
        }


class CLIPVisionModel(nn.Module):
    """Returns the projected image features float32[B, projection_dim], not normalised.

    Takes pictures float[B, image_size, image_size, 3], normalised as the checkpoint's
    preprocessor says.
    """

    cfg: CLIPVisionConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        cfg, dtype = self.cfg, self.dtype
        patches = (cfg.image_size // cfg.patch_size) ** 2
        side = (cfg.patch_size, cfg.patch_size)
        self.class_embedding = self.param(
            "class_embedding", nn.initializers.normal(0.02), (cfg.hidden_size,)
        )
        self.patch_embedding = nn.Conv(
            cfg.hidden_size, side, side, padding="VALID", use_bias=False, dtype=dtype
        )
        self.position_embedding = nn.Embed(patches + 1, cfg.hidden_size)
        self.pre_layernorm = layer_norm(cfg.layer_norm_eps, jnp.float32)
        self.encoder = CLIPEncoder(cfg, dtype, causal=False)
        self.post_layernorm = layer_norm(cfg.layer_norm_eps, jnp.float32)
        self.visual_projection = nn.Dense(cfg.projection_dim, use_bias=False, dtype=dtype)

    def __call__(self, images: jax.Array) -> jax.Array:
        B, C = images.shape[0], self.cfg.hidden_size
        patches = self.patch_embedding(images).reshape(B, -1, C).astype(jnp.float32)
        first = jnp.broadcast_to(self.class_embedding, (B, 1, C))
        x = jnp.concatenate([first, patches], axis=1) + self.position_embedding.embedding[None]
        x = self.encoder(self.pre_layernorm(x))
        return self.visual_projection(self.post_layernorm(x[:, 0])).astype(jnp.float32)
