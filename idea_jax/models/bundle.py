"""What a Stable Diffusion looks like: the configs of its networks as one, and the trees of weights.

A checkpoint has one text encoder (1.x, 2.x) or two (SDXL). What belongs to a text encoder, such as
the pseudo tokens of a person, is one tree for one encoder. For two it is a dict of a tree for each,
by the names of `ENCODERS`. `each_encoder` maps over both forms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from idea_jax.diffusion.schedule import ScheduleConfig
from idea_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from idea_jax.models.config_reader import UnsupportedConfig
from idea_jax.models.unet import UNet2DConditionModel, UNetConfig
from idea_jax.models.vae import AutoencoderKL, VAEConfig

COMPUTE_DTYPES = ("float32", "bfloat16")

# SDXL's text encoders, as files of token embeddings call them: `text_encoder`, `text_encoder_2`.
ENCODERS = ("clip_l", "clip_g")
PADDING_2 = 0  # the id of "!", which fills up what SDXL's second encoder reads


class Frozen(NamedTuple):
    """The weights that personalising never changes: nested dicts of arrays.

    `shared` is what an ID-Enhancer that was trained over many people adds for all of them
    (`method.shared.frozen_part`); empty without one, and no part of a checkpoint. `text_2` is
    SDXL's second text encoder; empty without one.
    """

    text: dict
    unet: dict
    cross_kv: dict
    vae: dict
    shared: dict = {}
    text_2: dict = {}


@dataclass(frozen=True)
class StableDiffusion:
    """What the networks look like. Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
      text_2: SDXL's second text encoder; None for 1.x and 2.x.
      zero_negative: of SDXL, an empty negative prompt is a condition of zeros (`force_zeros_for_
        empty_prompt` in model_index.json) instead of the encoded empty text.
      attention: kernel of the UNet's long self-attentions, see `flash`.
      remat: the backward pass computes the inside of the UNet's blocks again instead of keeping it.
    """

    text: CLIPTextConfig
    unet: UNetConfig
    vae: VAEConfig
    schedule: ScheduleConfig
    compute_dtype: str = "float32"
    attention: str = "xla"
    text_2: CLIPTextConfig | None = None
    zero_negative: bool = False
    remat: bool = False

    def __post_init__(self):
        text, unet, vae = self.text, self.unet, self.vae
        latents, rgb = ("VAE's latent_channels", vae.latent_channels), ("RGB's", 3)
        width = ("text encoder's hidden_size", text.hidden_size)
        if self.text_2 is not None:
            width = ("sum of the text encoders' hidden_size", self.context_dim)
        pairs = [
            (("UNet's cross_attention_dim", unet.cross_attention_dim), width),
            (("UNet's in_channels", unet.in_channels), latents),
            (("UNet's out_channels", unet.out_channels), latents),
            (("VAE's in_channels", vae.in_channels), rgb),
            (("VAE's out_channels", vae.out_channels), rgb),
        ]
        if self.text_2 is not None:
            two = self.text_2
            first = "first text encoder's"
            pairs += [
                (
                    ("second text encoder's vocab_size", two.vocab_size),
                    (f"{first} vocab_size", text.vocab_size),
                ),
                (
                    ("second text encoder's positions are", two.max_position_embeddings),
                    (f"{first} are", text.max_position_embeddings),
                ),
                (
                    ("pooled output that the UNet adds", unet.pooled_dim),
                    ("second text encoder's projection_dim", two.projection_dim),
                ),
            ]
        problems = [f"{a} is {x}, but the {b} is {y}" for (a, x), (b, y) in pairs if x != y]
        problems += self._misplaced()
        if self.compute_dtype not in COMPUTE_DTYPES:
            options = " or ".join(COMPUTE_DTYPES)
            problems.append(f"compute dtype is {self.compute_dtype!r}, expected {options}")
        if problems:
            raise UnsupportedConfig(
                "not a text-to-image Stable Diffusion 1.x, 2.x or XL: " + "; ".join(problems)
            )

    def _misplaced(self) -> list[str]:
        """What is wrong with where the encoder with a projection stands."""
        if self.text.projection_dim:
            swapped = " (are the two swapped?)" if self.text_2 is not None else ""
            return [f"text_encoder is a CLIPTextModelWithProjection, expected none{swapped}"]
        if self.text_2 is not None and not self.text_2.projection_dim:
            return ["text_encoder_2 is a CLIPTextModel, expected a CLIPTextModelWithProjection"]
        if self.text_2 is None and self.unet.addition_embed_dim:
            return ["the UNet is SDXL's (addition_embed_type), and there is no text_encoder_2"]
        return []

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def encoders(self) -> tuple[CLIPTextConfig, ...]:
        """The text encoders, one or two."""
        return (self.text,) if self.text_2 is None else (self.text, self.text_2)

    @property
    def context_dim(self) -> int:
        """Width of the text condition: that of all encoders together."""
        return sum(config.hidden_size for config in self.encoders)

    @property
    def text_model(self) -> CLIPTextModel:
        return CLIPTextModel(self.text, self.dtype)

    @property
    def unet_model(self) -> UNet2DConditionModel:
        return UNet2DConditionModel(self.unet, self.dtype, self.attention, self.remat)

    @property
    def vae_model(self) -> AutoencoderKL:
        return AutoencoderKL(self.vae, self.dtype)


def rematerialises(remat: str, model: StableDiffusion) -> bool:
    """What the setting `--remat` says of a model: whether the backward pass computes the inside of
    the UNet's blocks again. By itself ("auto") it does so on SDXL."""
    return remat == "blocks" or (remat == "auto" and model.text_2 is not None)


def remat_choices(remat: str) -> tuple[bool, ...]:
    """What `--remat` leaves to whoever knows how much memory there is, the faster one first."""
    return {"none": (False,), "blocks": (True,)}.get(remat, (False, True))


def each_encoder(model: StableDiffusion, function: Callable, *trees: Any) -> Any:
    """`function(config, *trees)` of the only text encoder; of two, what it is of each, as a dict.

    Args:
      function: of the config of an encoder and its part of each of the trees.
      trees: of two encoders, each a dict by the names of `ENCODERS`.
    """
    if model.text_2 is None:
        return function(model.text, *trees)
    return {
        name: function(config, *(tree[name] for tree in trees))
        for name, config in zip(ENCODERS, model.encoders, strict=True)
    }
