"""The CLIP text encoders of Stable Diffusion: 1.x (CLIP-L), 2.x (CLIP-H), XL (CLIP-L and -bigG)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from idea_jax.models.config_reader import ConfigReader
from idea_jax.models.layers import attention, gelu, layer_norm


def quick_gelu(x: jax.Array) -> jax.Array:
    """OpenAI CLIP's approximation of GELU, part of the weights' definition in SD 1.x."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}

POOLED = "CLIPTextModelWithProjection"  # transformers' name of an encoder with a pooled output


@dataclass(frozen=True)
class CLIPTextConfig:
    """Sizes of the text encoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 0  # of the pooled output; 0 for an encoder without a projection

    @property
    def end(self) -> int:
        """The id of `<|endoftext|>`, the last one of CLIP's vocabulary.

        SD's files say `eos_token_id: 2`, for which transformers pools at the largest id of a text:
        the same position, unless a pseudo token, whose id is larger, is in it.
        """
        return self.vocab_size - 1

    @classmethod
    def from_dict(cls, values: dict, where: str) -> "CLIPTextConfig":
        """Reads transformers' `text_encoder/config.json`.

        The width of a projection counts where the architecture has one (SDXL's second encoder).

        Raises: UnsupportedConfig, naming every key with an unsupported value and every unknown key.
        """
        read = ConfigReader(values, where)
        pools = values.get("architectures") == [POOLED]
        # Defaults are those of transformers' CLIPTextConfig: its files may leave them out.
        config = cls(
            vocab_size=read.take("vocab_size", int, 49408),
            hidden_size=read.take("hidden_size", int, 512),
            intermediate_size=read.take("intermediate_size", int, 2048),
            num_hidden_layers=read.take("num_hidden_layers", int, 12),
            num_attention_heads=read.take("num_attention_heads", int, 8),
            max_position_embeddings=read.take("max_position_embeddings", int, 77),
            hidden_act=read.take("hidden_act", str, "quick_gelu"),
            layer_norm_eps=read.take("layer_norm_eps", float, 1e-5),
            projection_dim=read.take("projection_dim", int, 512) if pools else 0,
        )
        read.expect("model_type", "clip_text_model")
        read.expect("architectures", [POOLED] if pools else ["CLIPTextModel"], None)
        read.expect("attention_dropout", 0.0)
        read.expect("dropout", 0.0)
        # Origin, initialisation, ids that only the pooled output needs (see `end`), and the width
        # of a projection that is not there.
        read.ignore(
            "_name_or_path",
            "_commit_hash",
            "_attn_implementation_autoset",
            "transformers_version",
            "torch_dtype",
            "dtype",
            "return_dict",
            "initializer_factor",
            "initializer_range",
            "projection_dim",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
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
        read.close()
        return config

    def to_dict(self) -> dict:
        """The inverse of `from_dict`: the content of a `text_encoder/config.json`."""
        return {
            "architectures": [POOLED if self.projection_dim else "CLIPTextModel"],
            "model_type": "clip_text_model",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "hidden_act": self.hidden_act,
            "layer_norm_eps": self.layer_norm_eps,
            "projection_dim": self.projection_dim or self.hidden_size,
            # The last two ids of CLIP's vocabulary; transformers refuses ids outside of it.
            "bos_token_id": self.vocab_size - 2,
            "eos_token_id": self.vocab_size - 1,
            # transformers would compute in the precision of the file, and diffusers in float32.
            "dtype": "float32",
        }


class CLIPAttention(nn.Module):
    """Self-attention; `causal` in the text encoder, over all positions in the image encoder."""

    cfg: CLIPTextConfig
    dtype: jnp.dtype
    causal: bool = True

    def setup(self):
        width = self.cfg.hidden_size
        self.q_proj = nn.Dense(width, dtype=self.dtype)
        self.k_proj = nn.Dense(width, dtype=self.dtype)
        self.v_proj = nn.Dense(width, dtype=self.dtype)
        self.out_proj = nn.Dense(width, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attention(q, k, v, self.cfg.num_attention_heads, self.causal))


class CLIPMLP(nn.Module):
    """The feed-forward part of a layer."""

    cfg: CLIPTextConfig
    dtype: jnp.dtype

    def setup(self):
        self.fc1 = nn.Dense(self.cfg.intermediate_size, dtype=self.dtype)
        self.fc2 = nn.Dense(self.cfg.hidden_size, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.cfg.hidden_act](self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """Attention and feed-forward, each with a LayerNorm before it.

    The residual stream stays float32 whatever the compute dtype, so that the trained pseudo
    tokens enter unrounded; it is a small part of the work.
    """

    cfg: CLIPTextConfig
    dtype: jnp.dtype
    causal: bool = True

    def setup(self):
        self.layer_norm1 = layer_norm(self.cfg.layer_norm_eps, self.dtype)
        self.self_attn = CLIPAttention(self.cfg, self.dtype, self.causal)
        self.layer_norm2 = layer_norm(self.cfg.layer_norm_eps, self.dtype)
        self.mlp = CLIPMLP(self.cfg, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x)).astype(jnp.float32)
        return x + self.mlp(self.layer_norm2(x)).astype(jnp.float32)


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    cfg: CLIPTextConfig
    dtype: jnp.dtype
    causal: bool = True

    def setup(self):
        self.layers = [
            CLIPEncoderLayer(self.cfg, self.dtype, self.causal)
            for _ in range(self.cfg.num_hidden_layers)
        ]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[-1](self.penultimate(x))

    def penultimate(self, x: jax.Array) -> jax.Array:
        """What the last layer is given."""
        for layer in self.layers[:-1]:
            x = layer(x)
        return x

    def last(self, x: jax.Array) -> jax.Array:
        """The last layer alone, of what `penultimate` returns."""
        return self.layers[-1](x)


class CLIPTextEmbeddings(nn.Module):
    """The table of input embeddings and that of positions."""

    cfg: CLIPTextConfig

    def setup(self):
        cfg = self.cfg
        self.token_embedding = nn.Embed(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embed(cfg.max_position_embeddings, cfg.hidden_size)

    def tokens(self, token_ids: jax.Array) -> jax.Array:
        # An id outside the table gives NaN, where clipping would hide the mistake.
        table = self.token_embedding.embedding
        return jnp.take(table, token_ids, axis=0, mode="fill").astype(jnp.float32)

    def positions(self, length: int) -> jax.Array:
        return self.position_embedding.embedding[:length].astype(jnp.float32)


class CLIPTextModel(nn.Module):
    """Returns the last hidden state after the final LayerNorm, float32.

    It is the text condition of SD 1.x and 2.x; that of SDXL is `penultimate`.
    """

    cfg: CLIPTextConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.embeddings = CLIPTextEmbeddings(self.cfg)
        self.encoder = CLIPEncoder(self.cfg, self.dtype)
        self.final_layer_norm = layer_norm(self.cfg.layer_norm_eps, jnp.float32)
        if self.cfg.projection_dim:
            self.text_projection = nn.Dense(
                self.cfg.projection_dim, use_bias=False, dtype=self.dtype
            )

    def __call__(self, token_ids: jax.Array, pseudo_tokens: jax.Array | None = None) -> jax.Array:
        """Encodes int32[B, T] to float32[B, T, D].

        An id of at least `vocab_size` stands for row id - vocab_size of `pseudo_tokens`
        float32[N, D]: the table itself is neither copied nor changed. T is at most
        `max_position_embeddings`.
        """
        return self.encode_embeds(self.embed_with(token_ids, pseudo_tokens))

    def penultimate(
        self, token_ids: jax.Array, pseudo_tokens: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """What SDXL takes of a text: float32[B, T, D] before the last layer, without the final
        LayerNorm, and the pooled output float32[B, projection_dim], None without a projection.

        The output after the last layer and the LayerNorm is pooled at the first `end` of each text.
        """
        x = self.encoder.penultimate(self.placed(self.embed_with(token_ids, pseudo_tokens)))
        if not self.cfg.projection_dim:
            return x, None
        ends = jnp.argmax(token_ids == self.cfg.end, axis=1)
        # The last layer mixes positions, so all of them go through it, and one through the norm.
        last = jnp.take_along_axis(self.encoder.last(x), ends[:, None, None], axis=1)[:, 0]
        return x, self.text_projection(self.final_layer_norm(last)).astype(jnp.float32)

    def embed_with(self, token_ids: jax.Array, pseudo_tokens: jax.Array | None) -> jax.Array:
        """Input embeddings float32[B, T, D], those of pseudo tokens included; see `__call__`."""
        if pseudo_tokens is None:
            return self.embed(token_ids)
        first = self.cfg.vocab_size
        is_pseudo = token_ids >= first
        table = self.embed(jnp.minimum(token_ids, first - 1))
        row = jnp.where(is_pseudo, token_ids - first, 0)
        pseudo = jnp.take(pseudo_tokens.astype(jnp.float32), row, axis=0, mode="fill")
        return jnp.where(is_pseudo[..., None], pseudo, table)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """Input embeddings float32[..., D] of ids below `vocab_size`, without positions."""
        return self.embeddings.tokens(token_ids)

    def encode_embeds(self, token_embeds: jax.Array) -> jax.Array:
        """Encodes input embeddings [B, T, D] (without positions) to float32[B, T, D]."""
        return self.final_layer_norm(self.encoder(self.placed(token_embeds)))

    def placed(self, token_embeds: jax.Array) -> jax.Array:
        """Input embeddings [B, T, D] with those of their positions, float32."""
        length, limit = token_embeds.shape[1], self.cfg.max_position_embeddings
        if length > limit:
            raise ValueError(f"expected at most {limit} tokens, got {length}; shorten the prompt")
        return token_embeds.astype(jnp.float32) + self.embeddings.positions(length)[None]


class CLIPTextModelWithProjection(nn.Module):
    """The text tower of CLIP: what a text is compared with pictures by, float32[B, width]."""

    cfg: CLIPTextConfig
    width: int
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.text_model = CLIPTextModel(self.cfg, self.dtype)
        self.text_projection = nn.Dense(self.width, use_bias=False, dtype=self.dtype)

    def __call__(self, token_ids: jax.Array, ends: jax.Array) -> jax.Array:
        """Embeds int32[B, T], each text by its output at its end token, `ends` int32[B]; not
        normalised."""
        states = self.text_model(token_ids)
        pooled = jnp.take_along_axis(states, ends[:, None, None], axis=1)[:, 0]
        return self.text_projection(pooled).astype(jnp.float32)
