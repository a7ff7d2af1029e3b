"""The configs of a checkpoint's networks: read from its folder, or told from its one file."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from idea_jax.diffusion import schedule
from idea_jax.diffusion.schedule import ScheduleConfig
from idea_jax.models import original_config as original_configs
from idea_jax.models.bundle import StableDiffusion
from idea_jax.models.clip_text import CLIPTextConfig
from idea_jax.models.config_reader import UnsupportedConfig, say_once
from idea_jax.models.original import Original
from idea_jax.models.tensor_files import WeightsError
from idea_jax.models.unet import UNetConfig
from idea_jax.models.vae import VAEConfig
from idea_jax.runtime.files import read_object


def read_configs(
    folder: Path,
    compute_dtype: str = "float32",
    *,
    vae: Path | None = None,
    clip_skip: int = 0,
    prediction_type: str | None = None,
    original_config: str | None = None,
) -> StableDiffusion:
    """Reads the config files of a checkpoint in diffusers layout, or the shapes of one file.

    Of SDXL they are those of its second text encoder, too, whose folder tells the family.

    Args:
      folder: the folder, or the file of a checkpoint in the original layout.
      vae: folder of another autoencoder, instead of the checkpoint's own.
      clip_skip: layers that are left out at the end of the text encoder.
      prediction_type: what the UNet predicts, "epsilon" or "v_prediction", whatever the checkpoint
        says of it.
      original_config: path of the original config of a checkpoint in one file.

    Raises: WeightsError if one is absent or no JSON; UnsupportedConfig or ValueError naming every
    key and value that is not supported.
    """
    folder = Path(folder)
    is_xl = (folder / "text_encoder_2").is_dir()
    if folder.is_file():
        found = original_configs.read_configs(
            Original(folder),
            Path(original_config) if original_config else None,
            prediction_type,
            own_vae=vae is None,
        )
    elif original_config:
        raise UnsupportedConfig(
            f"--original_config is for a checkpoint in one file; {folder} is a folder with configs "
            "of its own"
        )
    else:
        found = original_configs.Configs(
            _read_config(CLIPTextConfig, folder, "text_encoder/config.json"),
            _read_config(UNetConfig, folder, "unet/config.json"),
            _read_config(VAEConfig, folder, "vae/config.json") if vae is None else None,
            _read_schedule(folder, "scheduler/scheduler_config.json", is_xl, prediction_type),
        )
    text, noise = found.text, found.schedule
    if clip_skip >= text.num_hidden_layers:
        raise UnsupportedConfig(
            f"--clip_skip {clip_skip} leaves nothing of the {text.num_hidden_layers} layers of the "
            f"text encoder in {folder}"
        )
    second: dict[str, Any] = {}
    if found.text_2 is not None or is_xl:
        if clip_skip:
            raise UnsupportedConfig(
                f"--clip_skip is for Stable Diffusion 1.x and 2.x; {folder} is SDXL, whose text "
                "encoders are read before their last layer anyway: leave it out"
            )
        second["text_2"] = found.text_2 or _read_config(
            CLIPTextConfig, folder, "text_encoder_2/config.json"
        )
        has_index = (folder / "model_index.json").is_file()
        index = _read_json(folder, "model_index.json") if has_index else {}
        second["zero_negative"] = index.get("force_zeros_for_empty_prompt", True) is True
    other = _read_config(VAEConfig, vae, "config.json") if vae is not None else None
    if other is not None:
        _compare_scales(folder, other, vae, is_xl=bool(second))
    return StableDiffusion(
        **second,
        text=replace(text, num_hidden_layers=text.num_hidden_layers - clip_skip),
        unet=found.unet,
        vae=other or found.vae,
        schedule=replace(noise, prediction_type=prediction_type or noise.prediction_type),
        compute_dtype=compute_dtype,
    )


def _compare_scales(folder: Path, other: VAEConfig, vae: Path, *, is_xl: bool) -> None:
    """Says so if the latents of another autoencoder have another scale than a checkpoint's own: all
    of a family have one scale, and nothing else tells SDXL's from those of 1.x and 2.x."""
    own = original_configs.scale_of("sdxl" if is_xl else "sd1")
    path = folder / "vae" / "config.json"
    with suppress(WeightsError):  # nobody else needs the file
        own = read_object(path, WeightsError).get("scaling_factor", own)
    if other.scaling_factor != own:
        say_once(
            f"--vae {vae} is perhaps that of another family: its latents are scaled by "
            f"{other.scaling_factor:g}, and those of {folder} by {own}. SDXL's (0.13025) and those "
            "of Stable Diffusion 1.x and 2.x (0.18215) do not replace each other"
        )


def _read_schedule(
    folder: Path, name: str, is_xl: bool, prediction_type: str | None
) -> ScheduleConfig:
    values = _read_json(folder, name)
    if prediction_type is not None:  # which must fit what else the file says
        values |= {"prediction_type": prediction_type}
    where = str(folder / name)
    config = ScheduleConfig.from_dict(values, where, believes_offset=is_xl)
    for notice in schedule.notices(values, believes_offset=is_xl):
        say_once(f"{where}: {notice}")
    return config


def _read_config(kind: Any, folder: Path, name: str) -> Any:
    return kind.from_dict(_read_json(folder, name), str(folder / name))


def _read_json(folder: Path, name: str) -> dict:
    file = folder / name
    if not file.is_file():
        present = sorted(x.name for x in folder.glob("*"))
        raise WeightsError(
            f"no {name} in {folder}, which holds {', '.join(present) or 'nothing'}; "
            "expected a Stable Diffusion checkpoint in diffusers layout"
        )
    return read_object(file, WeightsError)
