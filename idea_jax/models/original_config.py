"""The configs of a checkpoint in one file, by the shapes of its tensors and an original config.

What shapes cannot say (attention heads, what the UNet predicts) is that of Stable Diffusion 1.x or
2.x, unless an original config says it.

Source: the configs v1-inference.yaml and v2-inference-v.yaml of CompVis and Stability AI.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from idea_jax.diffusion import schedule
from idea_jax.diffusion.schedule import ScheduleConfig
from idea_jax.models.clip_text import POOLED, CLIPTextConfig
from idea_jax.models.config_reader import UnsupportedConfig
from idea_jax.models.original import (
    CLIP,
    CLIP_G,
    CLIP_L,
    OPEN_CLIP,
    SIGMAS,
    UNET,
    VAE,
    Original,
)
from idea_jax.models.tensor_files import WeightsError
from idea_jax.models.unet import SIZE_IDS, UNetConfig
from idea_jax.models.vae import VAEConfig

HEAD_WIDTH = 64  # of CLIP's text encoders, and of the UNet of SD 2.x
UNET_HEADS = 8  # of the UNet of SD 1.x
MAX_CONFIG_BYTES = 1_000_000

SCHEDULES = ("alphas_cumprod", SIGMAS)  # tensors that hold the noise schedule

# Step counter in the file of SD 2-base, the only one of 2.x that tells what it predicts.
STEPS_OF_2_BASE = 875_000


class Configs(NamedTuple):
    """The configs of a checkpoint; without that of its autoencoder where another one is taken."""

    text: CLIPTextConfig
    unet: UNetConfig
    vae: VAEConfig | None
    schedule: ScheduleConfig
    text_2: CLIPTextConfig | None = None


def read_configs(
    original: Original,
    config: Path | None = None,
    prediction_type: str | None = None,
    *,
    own_vae: bool = True,
) -> Configs:
    """The configs of a checkpoint in one file, by its shapes and an original config.

    Args:
      config: an original config, such as v2-inference-v.yaml.
      prediction_type: "epsilon" or "v_prediction", before what config and file say.
      own_vae: whether the file's autoencoder is used; otherwise it may lack one.

    Raises: WeightsError if tensors are missing that every Stable Diffusion has; UnsupportedConfig
        if the shapes are of another network, contradict the config, or do not say what is needed.
    """
    is_xl = original.family == "sdxl"
    if is_xl and config:
        raise UnsupportedConfig(
            f"--original_config is for Stable Diffusion 1.x and 2.x; {original.path} is SDXL, and "
            "its config follows from its shapes: leave it out"
        )
    said = read_original_config(config) if config else {}
    predicts = prediction_type or said.get("prediction_type") or _predicts(original)
    # SD 2.x for v-prediction is the one for 768 pixels.
    size = said.get("image_size") or (
        128 if is_xl else 96 if original.family == "sd2" and predicts == "v_prediction" else 64
    )
    text_2 = _clip_config(original, CLIP_G, is_open=True) if is_xl else None
    unet = _unet_config(original, said, size, text_2)
    _check_said(original, config, said, unet)
    # Marked by an empty tensor; its steps must begin where there is noise alone.
    no_signal = "ztsnr" in original.shapes
    plan = ScheduleConfig(
        rescale_betas_zero_snr=no_signal,
        timestep_spacing="trailing" if no_signal else "leading" if is_xl else None,
        beta_start=said.get("linear_start", 0.00085),
        beta_end=said.get("linear_end", 0.012),
        beta_schedule="scaled_linear",
        num_train_timesteps=said.get("timesteps", 1000),
        prediction_type=predicts,
        set_alpha_to_one=False,
        steps_offset=1,
        sampler="euler" if is_xl else "ddim",
    )
    if not no_signal:
        _check_schedule(original, plan)
    if own_vae and not original.has_vae:
        raise WeightsError(
            f"{original.path} has no autoencoder; give one with --vae, or take a file that has one"
        )
    vae = _vae_config(original, said, size) if own_vae else None
    return Configs(_text_config(original), unet, vae, plan, text_2)


def _text_config(original: Original) -> CLIPTextConfig:
    if original.family == "sd2":
        return _clip_config(original, OPEN_CLIP, is_open=True)
    prefix = CLIP if original.family == "sd1" else CLIP_L
    if any(key.startswith(f"{prefix}text_model.") for key in original.shapes):
        prefix = f"{prefix}text_model."
    return _clip_config(original, prefix, is_open=False)


def _clip_config(original: Original, prefix: str, *, is_open: bool) -> CLIPTextConfig:
    """The config of a text encoder whose names are those of OpenCLIP or of transformers."""
    layers, own = original.text_layers, {}
    if is_open:
        tokens, positions = "token_embedding.weight", "positional_embedding"
        wide = "transformer.resblocks.0.mlp.c_fc.weight"
    else:
        tokens = "embeddings.token_embedding.weight"
        positions = "embeddings.position_embedding.weight"
        wide = "encoder.layers.0.mlp.fc1.weight"
    size, width = original.shape(prefix + tokens)
    if prefix == CLIP_G:
        layers = original.count(re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
        pooled = original.shape(f"{prefix}text_projection")[1]
        own = {"architectures": [POOLED], "projection_dim": pooled}
    return CLIPTextConfig.from_dict(
        {
            "vocab_size": size,
            "hidden_size": width,
            "intermediate_size": original.shape(prefix + wide)[0],
            **own,
            "num_hidden_layers": layers,
            "num_attention_heads": max(1, width // HEAD_WIDTH),
            "max_position_embeddings": original.shape(prefix + positions)[0],
            "hidden_act": "gelu" if is_open else "quick_gelu",
        },
        f"{original.path} (text encoder{' 2' if own else ''})",
    )


def _unet_config(
    original: Original, said: dict, size: int, text_2: CLIPTextConfig | None
) -> UNetConfig:
    def first(block: int) -> str:
        return f"{UNET}input_blocks.{block}."

    def has_attention(block: str) -> bool:
        return f"{block}1.norm.weight" in original.shapes

    def depth(block: str) -> int:
        return original.count(re.escape(f"{block}1.") + r"transformer_blocks\.(\d+)\.")

    layers = original.unet_layers
    downs = [
        key for key in original.shapes if re.fullmatch(r".+input_blocks\.\d+\.0\.op\.bias", key)
    ]
    starts = [first(1 + level * (layers + 1)) for level in range(len(downs) + 1)]
    widths = [original.shape(f"{start}0.out_layers.3.weight")[0] for start in starts]
    crossed = [has_attention(start) for start in starts]
    ups = [
        has_attention(f"{UNET}output_blocks.{level * (layers + 1)}.")
        for level in range(len(starts))
    ]
    middle = f"{UNET}middle_block."
    depths = [depth(start) if cross else 1 for start, cross in zip(starts, crossed, strict=True)]
    depths[-1] = depths[-1] if crossed[-1] else depth(middle)
    linear = len(original.shape(f"{middle}1.proj_in.weight")) == 2
    per_head = said.get("num_head_channels") or (HEAD_WIDTH if linear else None)
    heads = said.get("num_heads") or UNET_HEADS
    if per_head and "num_heads" not in said:
        odd = [width for width in widths if width % per_head]
        if odd:
            raise UnsupportedConfig(
                f"{original.path}: {odd[0]} channels of the UNet do not divide into heads of "
                f"{per_head}; give the --original_config that says how many heads there are"
            )
        heads = [width // per_head for width in widths]
    added = {}
    if text_2 is not None:
        total = original.shape(f"{UNET}label_emb.0.0.weight")[1]
        added = {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": total,
            "addition_time_embed_dim": (total - text_2.projection_dim) // SIZE_IDS,
        }
    return UNetConfig.from_dict(
        {
            **added,
            "sample_size": size,
            "in_channels": original.shape(f"{first(0)}0.weight")[1],
            "out_channels": original.shape(f"{UNET}out.2.weight")[0],
            "down_block_types": [f"{'CrossAttn' * cross}DownBlock2D" for cross in crossed],
            "up_block_types": [f"{'CrossAttn' * cross}UpBlock2D" for cross in ups],
            "block_out_channels": widths,
            "layers_per_block": layers,
            "transformer_layers_per_block": depths,
            "attention_head_dim": heads,
            "cross_attention_dim": original.shape(
                f"{middle}1.transformer_blocks.0.attn2.to_k.weight"
            )[1],
            "use_linear_projection": linear,
        },
        f"{original.path} (UNet)",
    )


def scale_of(family: str) -> float:
    """What latents are multiplied by, of all autoencoders of a family."""
    return 0.13025 if family == "sdxl" else 0.18215


def _vae_config(original: Original, said: dict, size: int) -> VAEConfig:
    levels = original.count(re.escape(VAE) + r"encoder\.down\.(\d+)\.")
    widths = [
        original.shape(f"{VAE}encoder.down.{level}.block.0.conv2.weight")[0]
        for level in range(levels)
    ]
    return VAEConfig.from_dict(
        {
            "in_channels": original.shape(f"{VAE}encoder.conv_in.weight")[1],
            "out_channels": original.shape(f"{VAE}decoder.conv_out.weight")[0],
            "block_out_channels": widths,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "layers_per_block": original.count(
                re.escape(VAE) + r"encoder\.down\.0\.block\.(\d+)\."
            ),
            "latent_channels": original.shape(f"{VAE}post_quant_conv.weight")[0],
            "scaling_factor": said.get("scale_factor", scale_of(original.family)),
            "sample_size": size * 2 ** (levels - 1),
        },
        f"{original.path} (autoencoder)",
    )


def _predicts(original: Original) -> str:
    """What the UNet predicts, as far as the file says it.

    Raises: UnsupportedConfig if it does not: both kinds of SD 2.x have the same shapes.
    """
    if "v_pred" in original.shapes:  # an empty tensor, which marks such files
        return "v_prediction"
    stated = original.tensors.metadata.get("modelspec.prediction_type", "").lower()
    if stated in ("epsilon", "v", "v_prediction"):
        return "epsilon" if stated == "epsilon" else "v_prediction"
    if original.family != "sd2":
        return "epsilon"
    steps = original.tensors["global_step"] if original.shapes.get("global_step") == () else 0
    if int(steps) == STEPS_OF_2_BASE:
        return "epsilon"
    raise UnsupportedConfig(
        f"{original.path} is of the family of Stable Diffusion 2.x and does not say what it "
        "predicts: give --prediction_type v_prediction (2.0 and 2.1, of 768 pixels) or "
        "--prediction_type epsilon (2.0-base and 2.1-base, of 512), or its --original_config"
    )


def _check_schedule(original: Original, plan: ScheduleConfig) -> None:
    """Raises UnsupportedConfig if the file holds another noise schedule."""
    name = next((name for name in SCHEDULES if name in original.shapes), "")
    shape, dtype = original.tensors.headers.get(name, ((), ""))
    if shape == (plan.num_train_timesteps,) and dtype in ("F32", "F64", "F16"):
        own = original.tensors[name].astype(np.float64)
        if name == SIGMAS:  # noise over signal
            own = 1 / (1 + own**2)
        apart = np.abs(own - schedule.alphas_cumprod(plan)).max()
        if not apart < 2e-3:  # float16 rounds by 5e-4
            raise UnsupportedConfig(
                f"{original.path} was trained with another noise schedule ({name} is off "
                f"by {apart:.2g}); schedules that end without signal and are not marked ztsnr, or "
                "with other betas than an --original_config says, are not supported"
            )
    elif len(shape) == 1 and shape != (plan.num_train_timesteps,):
        raise UnsupportedConfig(
            f"{original.path} was trained with {shape[0]} noise levels, and the config says "
            f"{plan.num_train_timesteps}; give its --original_config"
        )


# What is read of an original config: our name, where it stands, and its type.
_SAID: tuple[tuple[str, str, type], ...] = (
    ("linear_start", "linear_start", float),
    ("linear_end", "linear_end", float),
    ("timesteps", "timesteps", int),
    ("image_size", "image_size", int),
    ("scale_factor", "scale_factor", float),
    ("num_heads", "unet_config.params.num_heads", int),
    ("num_head_channels", "unet_config.params.num_head_channels", int),
    ("in_channels", "unet_config.params.in_channels", int),
    ("out_channels", "unet_config.params.out_channels", int),
    ("num_res_blocks", "unet_config.params.num_res_blocks", int),
    ("context_dim", "unet_config.params.context_dim", int),
    ("model_channels", "unet_config.params.model_channels", int),
)


def read_original_config(path: Path) -> dict[str, Any]:
    """What an original config says, by the names in `_SAID`, and `prediction_type`.

    Raises: UnsupportedConfig if the file cannot be read or is no such config.
    """
    try:
        content = Path(path).read_bytes()[: MAX_CONFIG_BYTES + 1]
        if len(content) > MAX_CONFIG_BYTES:
            raise UnsupportedConfig(f"{path} is too large for an original config (YAML)")
        params = yaml.safe_load(content)["model"]["params"]
        unet = params["unet_config"]["params"]
    except OSError as error:
        raise UnsupportedConfig(
            f"cannot read --original_config {path}: {error.strerror}"
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UnsupportedConfig(
            f"{path} is no original config of Stable Diffusion: expected YAML with model.params "
            f"and unet_config in it, such as v2-inference-v.yaml ({type(error).__name__})"
        ) from error
    said: dict[str, Any] = {}
    for name, place, kind in _SAID:
        holder, key = (unet, place.rpartition(".")[2]) if "." in place else (params, place)
        value: Any = holder.get(key) if isinstance(holder, dict) else None
        if value is None or value == -1:  # as the original code means "not given"
            continue
        fits = isinstance(value, (kind, int)) and not isinstance(value, bool)
        if not fits or not value > 0:
            raise UnsupportedConfig(f"{path}: {place} = {value!r}, expected one {kind.__name__}")
        said[name] = kind(value)
    parameterization = params.get("parameterization", "eps")
    if parameterization not in ("eps", "v"):
        raise UnsupportedConfig(
            f"{path}: parameterization = {parameterization!r}: only eps or v is supported"
        )
    said["prediction_type"] = "v_prediction" if parameterization == "v" else "epsilon"
    return said


def _check_said(
    original: Original, config: Path | None, said: dict[str, Any], unet: UNetConfig
) -> None:
    pairs = {
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "num_res_blocks": unet.layers_per_block,
        "context_dim": unet.cross_attention_dim,
        "model_channels": unet.block_out_channels[0],
    }
    wrong = [
        f"{name} is {said[name]}, and by the shapes {value}"
        for name, value in pairs.items()
        if said.get(name, value) != value
    ]
    if wrong:
        raise UnsupportedConfig(f"{config} does not belong to {original.path}: {'; '.join(wrong)}")
