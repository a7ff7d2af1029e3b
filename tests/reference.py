"""Random torch models to compare with, and the configs of the published checkpoints.

The small models have the structure of SD 1.x and SD 2.x; `write_checkpoint` saves them in diffusers
layout. All their parameters are random: with torch's own initialisation every norm is the identity,
and a mix-up among norms or biases would go unseen.
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel

from idea_jax.diffusion.schedule import ScheduleConfig
from idea_jax.models import sd
from idea_jax.models.clip_text import CLIPTextConfig
from idea_jax.models.unet import UNetConfig
from idea_jax.models.vae import VAEConfig

# The config files of the published checkpoints, word for word but for paths.
SD15_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": [
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    ],
}
SD15_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD15_TEXT = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
SD21_UNET = {
    **SD15_UNET,
    "_diffusers_version": "0.10.0.dev0",
    "_name_or_path": "stable-diffusion-2-1-base/unet",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
# stable-diffusion-2-1 (v-prediction, 768 pixels) and files saved by later diffusers
SD21_V_UNET = {
    **SD21_UNET,
    "_diffusers_version": "0.13.0",
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": None,
    "resnet_time_scale_shift": "default",
    "sample_size": 96,
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": True,
}
SD21_VAE = {
    **SD15_VAE,
    "_diffusers_version": "0.10.0.dev0",
    "_name_or_path": "stable-diffusion-2-1-base/vae",
    "sample_size": 768,
}
# as diffusers 0.31 and later save it
NEW_VAE = {
    **SD15_VAE,
    "_diffusers_version": "0.31.0",
    "force_upcast": True,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
SD21_TEXT = {
    **SD15_TEXT,
    "_name_or_path": "stable-diffusion-2-1-base/text_encoder",
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
    "torch_dtype": "float16",
    "transformers_version": "4.26.0.dev0",
}
SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.19.0.dev0",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 2048,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "sample_size": 128,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
SDXL_VAE = {
    **SD15_VAE,
    "_diffusers_version": "0.20.0.dev0",
    "_name_or_path": "../sdxl-vae/",
    "force_upcast": True,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
SDXL_TEXT = {**SD15_TEXT, "torch_dtype": "float16", "transformers_version": "4.32.0.dev0"}
SDXL_TEXT_2 = {
    **SDXL_TEXT,
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.10.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

SDXL_SCHEDULER = {
    **SCHEDULER,
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}

# Small models of the two families: (UNet, VAE, text).
TINY = {
    "sd1": (
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 2,
            "attention_head_dim": 4,
            "cross_attention_dim": 24,
            "norm_num_groups": 8,
            "sample_size": 16,
        },
        {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 2,
            "norm_num_groups": 8,
        },
        {
            "vocab_size": 100,
            "hidden_size": 24,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "hidden_act": "quick_gelu",
        },
    ),
    "sd2": (
        {
            "block_out_channels": (16, 32, 48),
            "down_block_types": (*("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2),
            "layers_per_block": 1,
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (1, 2, 3),
            "cross_attention_dim": 32,
            "norm_num_groups": 16,
            "use_linear_projection": True,
            "sample_size": 16,
        },
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "norm_num_groups": 16,
            "scaling_factor": 0.3,
        },
        {
            "vocab_size": 120,
            "hidden_size": 32,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_act": "gelu",
        },
    ),
}


class TorchModels(NamedTuple):
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: transformers.CLIPTextModel


def unet_from(config: dict) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(config)


def text_from(config: dict) -> transformers.CLIPPreTrainedModel:
    ids = {"bos_token_id": 0, "eos_token_id": 2}
    kind = getattr(transformers, config.get("architectures", ["CLIPTextModel"])[0])
    return kind(transformers.CLIPTextConfig(**{**config, **ids}))


# Layers whose outputs enter a residual stream, hence norms.
INTO_STREAM = r"(conv_in|proj_in|proj_out|conv2|to_out\.0|net\.2|out_proj|fc2|embedding)\.weight$"


def randomise(module: torch.nn.Module, seed: int, quiet: bool = False) -> None:
    """Fills every parameter; activations keep about unit size, and nothing is a special value.

    `quiet` makes what enters the norms a thousand times smaller, so that their epsilons show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2 and "embedding." not in name:
                noise = noise / math.sqrt(parameter[0].numel())
            elif parameter.ndim >= 2:
                noise = 0.3 * noise
            elif name.endswith("weight"):
                noise = 1 + 0.3 * noise
            else:
                noise = (2e-4 if quiet else 0.2) * noise
            if quiet and re.search(INTO_STREAM, name):
                noise = 1e-3 * noise
            parameter.copy_(noise)
    module.eval().requires_grad_(False)


def models(kind: str, quiet: bool = False, sizes: dict = TINY) -> TorchModels:
    """The small random models of kind "sd1" or "sd2"."""
    unet, vae, text = sizes[kind]
    built = TorchModels(unet_from(unet), AutoencoderKL.from_config(vae), text_from(text))
    for i, module in enumerate(built):
        randomise(module, i, quiet)
    return built


def write_checkpoint(
    folder: Path, kind: str, quiet: bool = False, sizes: dict = TINY
) -> TorchModels:
    """Saves small random models in diffusers layout, without a tokenizer, and returns them."""
    built = models(kind, quiet, sizes)
    built.unet.save_pretrained(folder / "unet")
    built.vae.save_pretrained(folder / "vae")
    built.text.save_pretrained(folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return built


def published_xl() -> sd.StableDiffusion:
    """The model that the published config files of SDXL 1.0-base describe."""
    return sd.StableDiffusion(
        CLIPTextConfig.from_dict(SDXL_TEXT, "text"),
        UNetConfig.from_dict(SDXL_UNET, "unet"),
        VAEConfig.from_dict(SDXL_VAE, "vae"),
        ScheduleConfig.from_dict(SDXL_SCHEDULER, "scheduler"),
        text_2=CLIPTextConfig.from_dict(SDXL_TEXT_2, "text_2"),
        zero_negative=True,
    )


def published(unet: dict, vae: dict, text: dict) -> sd.StableDiffusion:
    """The model that published config files describe."""
    return sd.StableDiffusion(
        CLIPTextConfig.from_dict(text, "text"),
        UNetConfig.from_dict(unet, "unet"),
        VAEConfig.from_dict(vae, "vae"),
        ScheduleConfig.from_dict(SCHEDULER, "scheduler"),
    )
