"""CLIP as a judge of pictures and texts: both towers, read from files, and unit embeddings.

Two layouts are read: that of transformers' CLIPModel, and a Stable Diffusion checkpoint with an
`image_encoder/` that was trained against its own text encoder, as the mini's was.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from idea_jax.models import weights
from idea_jax.models.clip_text import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)
from idea_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from idea_jax.models.config_reader import UnsupportedConfig
from idea_jax.models.tensor_files import TensorFiles, WeightsError, find_weights
from idea_jax.models.weights import Rule, Table
from idea_jax.runtime.files import read_object

# What the towers' settings are called in `config.json`. Files of earlier transformers repeat there
# dozens of settings of text generation, which say nothing of the network; that the weights fit one
# to one shows that the network is the one described.
_OF_TOWERS = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
)
_OF_TOWERS += "hidden_act layer_norm_eps attention_dropout dropout".split()
_OF_TEXT = [*_OF_TOWERS, "vocab_size", "max_position_embeddings"]
_OF_VISION = [*_OF_TOWERS, "image_size", "patch_size", "num_channels"]


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of a picture before the image tower sees it.

    Attributes:
      shortest_edge: of the picture once it is scaled, in pixels; bicubic.
      side: of the square in its middle that is cut out.
      mean, std: of each channel, for values from 0 to 1.
    """

    shortest_edge: int
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ClipModel:
    """What both towers look like. Hashable, so it can be a static argument of `jax.jit`."""

    text: CLIPTextConfig
    vision: CLIPVisionConfig
    preprocessing: Preprocessing
    has_text_projection: bool = True


def load(folder: Path) -> tuple[ClipModel, dict]:
    """Reads a CLIP: the model, and its float32 weights as {"text": tree, "vision": tree}.

    Raises: WeightsError or UnsupportedConfig (both ValueError), saying which file and what in it.
    """
    folder = Path(folder)
    if (folder / "image_encoder" / "config.json").is_file():
        return _load_beside(folder)
    values = read_object(folder / "config.json", WeightsError)
    if values.get("model_type") != "clip":
        raise UnsupportedConfig(
            f"{folder / 'config.json'} is of a {values.get('model_type')!r}, expected the folder "
            "of a CLIP model, such as openai/clip-vit-large-patch14"
        )
    where = str(folder / "config.json")
    width = values.get("projection_dim", 512)
    text = CLIPTextConfig.from_dict(_part(values, "text_config", _OF_TEXT), f"{where}: text_config")
    own = _part(values, "vision_config", _OF_VISION) | {"projection_dim": width}
    vision = CLIPVisionConfig.from_dict(own, f"{where}: vision_config")
    model = ClipModel(text, vision, _preprocessing(folder, vision))
    paths = find_weights(folder, "model")
    tensors = TensorFiles(paths)
    return model, weights.to_params(_table(), tensors, shapes(model), str(paths[0]))


def _load_beside(folder: Path) -> tuple[ClipModel, dict]:
    """A checkpoint's own text encoder with its image encoder; texts need no projection."""
    parts = folder / "text_encoder", folder / "image_encoder"
    files = [part / "config.json" for part in parts]
    said = [read_object(file, WeightsError) for file in files]
    text = CLIPTextConfig.from_dict(said[0], str(files[0]))
    vision = CLIPVisionConfig.from_dict(said[1], str(files[1]))
    if text.hidden_size != vision.projection_dim:
        raise UnsupportedConfig(
            f"the image encoder of {folder} has outputs of {vision.projection_dim} numbers and its "
            f"text encoder of {text.hidden_size}, so they were not trained together; give a CLIP "
            "model of its own"
        )
    model = ClipModel(text, vision, _preprocessing(parts[1], vision), has_text_projection=False)
    targets, trees = shapes(model), dict[str, dict]()
    tables = {"text": weights.text_table(), "vision": weights.vision_table()}
    for part, (tree, table) in zip(parts, tables.items(), strict=True):
        paths = find_weights(part, "model")
        own = {tree: targets[tree]}
        trees |= weights.to_params(table, TensorFiles(paths), own, str(paths[0]))
    return model, trees


def _table() -> Table:
    """The table of transformers' CLIPModel: both towers in one file."""
    text = [
        rule._replace(target=rule.target.replace("text/", "text/text_model/", 1))
        for rule in weights.text_table().rules
        if not rule.legacy
    ]
    projection = Rule("text_projection.weight", "text/text_projection/kernel", "linear")
    skipped = [f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")]
    return Table((*text, projection, *weights.vision_table().rules), (*skipped, "logit_scale"))


def _part(values: dict, name: str, known: Sequence[str]) -> dict:
    """The settings of a tower, without those that say nothing of the network."""
    own = values.get(name)
    return {key: value for key, value in (own or {}).items() if key in known}


def _preprocessing(folder: Path, vision: CLIPVisionConfig) -> Preprocessing:
    """What `preprocessor_config.json` says; whatever it leaves out is as in OpenAI's CLIP."""
    file = folder / "preprocessor_config.json"
    values = read_object(file, WeightsError)
    edge, crop = values.get("size", 224), values.get("crop_size", 224)
    edge = edge.get("shortest_edge") if isinstance(edge, dict) else edge
    crop = crop.get("height") if isinstance(crop, dict) else crop
    mean = values.get("image_mean", (0.48145466, 0.4578275, 0.40821073))
    std = values.get("image_std", (0.26862954, 0.26130258, 0.27577711))
    bicubic = values.get("resample", 3) == 3
    steps = [f"do_{step}" for step in ("resize", "center_crop", "rescale", "normalize")]
    fits = all(isinstance(x, int) for x in (edge, crop)) and len(mean) == len(std) == 3
    if not (fits and bicubic and all(values.get(step, True) for step in steps)):
        raise UnsupportedConfig(
            f"{file} describes another preprocessing than CLIP's: expected a bicubic resize of the "
            "shortest edge, the central square, and a mean and a deviation for each channel"
        )
    if crop != vision.image_size:
        raise UnsupportedConfig(
            f"{file} cuts out squares of {crop} pixels, and the image encoder reads "
            f"{vision.image_size}"
        )
    return Preprocessing(edge, crop, tuple(map(float, mean)), tuple(map(float, std)))


def shapes(model: ClipModel) -> dict:
    """The trees of both towers, as shapes."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    side = model.vision.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    key = jax.random.key(0)
    ends = [jax.ShapeDtypeStruct((1,), jnp.int32)] if model.has_text_projection else []
    text = jax.eval_shape(_text_tower(model).init, key, ids, *ends)["params"]
    vision = jax.eval_shape(CLIPVisionModel(model.vision).init, key, images)["params"]
    return {"text": text, "vision": vision}


def _text_tower(model: ClipModel) -> CLIPTextModel | CLIPTextModelWithProjection:
    if model.has_text_projection:
        return CLIPTextModelWithProjection(model.text, model.vision.projection_dim)
    return CLIPTextModel(model.text)


@functools.partial(jax.jit, static_argnums=0)
def embed_texts(model: ClipModel, params: dict, token_ids: jax.Array, ends: jax.Array) -> jax.Array:
    """Returns float32[B, projection_dim] of unit norm.

    Args:
      token_ids: int32[B, T] with begin, end and padding.
      ends: int32[B], where the first end token of each text is.
    """
    tower, tree = _text_tower(model), {"params": params["text"]}
    if model.has_text_projection:
        return unit(tower.apply(tree, token_ids, ends))
    states = tower.apply(tree, token_ids)
    return unit(jnp.take_along_axis(states, ends[:, None, None], axis=1)[:, 0])


@functools.partial(jax.jit, static_argnums=0)
def embed_images(model: ClipModel, params: dict, pixels: jax.Array) -> jax.Array:
    """Returns float32[B, projection_dim] of unit norm for preprocessed pictures float32[B, side,
    side, 3]."""
    return unit(CLIPVisionModel(model.vision).apply({"params": params["vision"]}, pixels))


def unit(x: jax.Array) -> jax.Array:
    """Returns float[..., D] scaled to unit norm."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
