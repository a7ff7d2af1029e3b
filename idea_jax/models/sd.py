"""Stable Diffusion as one bundle: configs, frozen weights, and pure functions over both.

Latents are scaled (multiplied by the VAE's scaling factor) everywhere outside `vae.py`.
"""

import functools
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from idea_jax.models import weights
from idea_jax.models.bundle import ENCODERS, PADDING_2, Frozen, StableDiffusion, each_encoder
from idea_jax.models.clip_text import CLIPTextModel
from idea_jax.models.configs import read_configs
from idea_jax.models.lora import Lora, Merging
from idea_jax.models.original import Original
from idea_jax.models.precision import exact
from idea_jax.models.tensor_files import TensorFiles, Tensors, WeightsError, find_weights
from idea_jax.models.unet import (
    SIZE_IDS,
    UNet2DConditionModel,
    cross_kv_shapes,
    project_kv,
)
from idea_jax.models.vae import AutoencoderKL, VAEConfig
from idea_jax.pytrees import flatten, unflatten
from idea_jax.runtime import traces
from idea_jax.runtime.files import atomic_write, write_json

DIFFUSERS_VERSION = "0.42.1"  # whose layout `save` writes


def _exactly(function: Callable) -> Callable:
    """A function of a model, whose products are float32 if the model computes in it."""

    @functools.wraps(function)
    def run(model, *arguments, **named):
        with exact(model.dtype):
            return function(model, *arguments, **named)

    return run


class _Part(NamedTuple):
    folder: str
    stem: str
    table: weights.Table
    trees: tuple[str, ...]
    config: dict


def _parts(model: StableDiffusion) -> Iterator[_Part]:
    """The weight files of a checkpoint and the trees that each fills."""
    stem = "diffusion_pytorch_model"
    unet_table = weights.unet_table(model.unet.use_linear_projection)
    yield _Part("text_encoder", "model", weights.text_table(), ("text",), model.text.to_dict())
    if model.text_2 is not None:
        table, config = weights.text_table("text_2"), model.text_2.to_dict()
        yield _Part("text_encoder_2", "model", table, ("text_2",), config)
    yield _Part("unet", stem, unet_table, ("unet", "cross_kv"), model.unet.to_dict())
    yield _Part("vae", stem, weights.vae_table(), ("vae",), model.vae.to_dict())


def shapes(model: StableDiffusion) -> Frozen:
    """The trees of `Frozen` with a float32 shape in place of each array; allocates nothing.

    Every caller gets the same trees, which are not to be changed.
    """
    own = StableDiffusion(model.text, model.unet, model.vae, model.schedule, text_2=model.text_2)
    return _shapes(own)


@functools.lru_cache(maxsize=4)
def _shapes(model: StableDiffusion) -> Frozen:
    def traced():
        flat = flatten(_traced_shapes(model)._asdict())
        return {name: leaf.shape for name, leaf in flat.items()}

    flat = traces.remembered("shapes", model, traced)
    leaves = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in flat.items()}
    return Frozen(**unflatten(leaves))


def _traced_shapes(model: StableDiffusion) -> Frozen:
    """What the networks themselves say; it traces all of them, which takes half a second."""
    cfg = model.unet
    cross_kv = cross_kv_shapes(cfg)

    def parameters(network, *inputs, **named):
        traced = functools.partial(network.init, **named)
        return jax.eval_shape(traced, jax.random.key(0), *inputs)["params"]

    def zeros(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    size = 2 ** (len(cfg.block_out_channels) - 1)
    kv = jax.tree.map(lambda kernel: zeros(1, 1, kernel.shape[1]), cross_kv)
    latents, times = zeros(1, size, size, cfg.in_channels), zeros(1, dtype=jnp.int32)
    text_2, size_ids, ids = {}, None, zeros(1, 1, dtype=jnp.int32)
    if model.text_2 is not None:
        kv["pooled"], size_ids = zeros(1, cfg.pooled_dim), zeros(1, SIZE_IDS, dtype=jnp.int32)
        second = CLIPTextModel(model.text_2, model.dtype)
        text_2 = parameters(second, ids, method=CLIPTextModel.penultimate)
    images = zeros(1, model.vae.downscale, model.vae.downscale, model.vae.in_channels)
    return Frozen(
        text=parameters(model.text_model, ids),
        text_2=text_2,
        unet=parameters(model.unet_model, latents, times, kv, size_ids),
        cross_kv=cross_kv,
        vae=parameters(model.vae_model, images),
    )


def load(
    folder: Path,
    *,
    variant: str | None = None,
    compute_dtype: str = "float32",
    vae: Path | None = None,
    clip_skip: int = 0,
    prediction_type: str | None = None,
    original_config: str | None = None,
    loras: Sequence[Lora] = (),
) -> tuple[StableDiffusion, Frozen]:
    """Reads a checkpoint in diffusers layout from a local folder, or one in a file.

    Returns the model and its weights in `compute_dtype` ("float32" or "bfloat16"). `variant`
    ("fp16") chooses among weight files; `loras` are merged into the weights; the others as of
    `read_configs`.

    Raises: WeightsError or UnsupportedConfig (both ValueError), saying which file and what in it.
    """
    folder = Path(folder)
    model = read_configs(
        folder,
        compute_dtype,
        vae=vae,
        clip_skip=clip_skip,
        prediction_type=prediction_type,
        original_config=original_config,
    )
    targets = shapes(model)._asdict()
    original = Original(folder) if folder.is_file() else None
    trees: dict[str, dict] = {}
    problems: list[str] = []
    merging = Merging(loras)
    for part in _parts(model):
        try:
            own = vae if vae is not None and part.folder == "vae" else folder / part.folder
            if original is not None and own != vae:
                where = f"{folder} ({part.folder}, by the names of diffusers)"
                tensors: Tensors = original.part(part.folder)
            else:
                paths = find_weights(own, part.stem, None if own == vae else variant)
                where = str(paths[0]) if len(paths) == 1 else f"{own} ({len(paths)} files)"
                tensors = TensorFiles(paths)
            wanted = {tree: targets[tree] for tree in part.trees}
            tensors = merging.merged(part.folder, tensors)
            trees |= weights.to_params(part.table, tensors, wanted, where, model.dtype)
        except WeightsError as error:  # those of the other files belong into the same message
            problems.append(str(error))
    try:
        if original is not None:
            original.check_rest(vae=vae is None)
        merging.check_rest()
    except WeightsError as error:
        problems.append(str(error))
    if problems:
        raise WeightsError("\n".join(problems))
    return model, Frozen(**trees)


def save(
    folder: Path,
    model: StableDiffusion,
    frozen: Frozen,
    *,
    variant: str | None = None,
    dtype: str = "float32",
    parts: Collection[str] = ("text_encoder", "text_encoder_2", "unet", "vae"),
) -> None:
    """Writes a checkpoint that `load` and torch's diffusers read; the tokenizer is not part of it.

    Weights are written as `dtype` ("float32", "float16" or "bfloat16"), under the names of
    `variant` if given, and those of `parts` only. Each file is replaced only once it is complete.
    """
    folder = Path(folder)
    trees = frozen._asdict()
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    for part in _parts(model):
        if part.folder not in parts:
            continue
        params = {tree: trees[tree] for tree in part.trees}
        tensors = weights.to_tensors(part.table, params, jnp.dtype(dtype))
        infix = f".{variant}" if variant else ""
        with atomic_write(folder / part.folder / f"{part.stem}{infix}.safetensors") as path:
            save_file(tensors, path, metadata={"format": "pt"})
        config = part.config if part.folder.startswith("text") else part.config | version
        write_json(folder / part.folder / "config.json", config, sort_keys=True)

    schedule = model.schedule.to_dict() | version
    write_json(folder / "scheduler" / "scheduler_config.json", schedule, sort_keys=True)
    # An image encoder is no part of Stable Diffusion, but may lie beside it (adapters use it).
    has_image_encoder = (folder / "image_encoder" / "config.json").is_file()
    image_encoder = ["transformers", "CLIPVisionModelWithProjection"]
    index = {
        "_class_name": "StableDiffusionPipeline",
        **version,
        "feature_extractor": [None, None],
        "image_encoder": image_encoder if has_image_encoder else [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", schedule["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if model.text_2 is not None:
        for name in ("requires_safety_checker", "safety_checker"):
            del index[name]
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": model.zero_negative,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    write_json(folder / "model_index.json", index, sort_keys=True)


def init(model: StableDiffusion, key: jax.Array) -> Frozen:
    """Random float32 weights, for training from scratch or a random checkpoint.

    Kernels are normal with variance 1 / fan-in, CLIP's tables as in OpenAI's CLIP, norms the
    identity and biases zero. Drawn by numpy on the host, seeded by the key and the leaf's path:
    compiling a draw for each shape would take minutes.
    """
    words = [int(word) for word in jax.random.key_data(key).ravel()]
    table_std = {"token_embedding": 0.02, "position_embedding": 0.01}

    def draw(path, shape):
        *_, owner, name = path.split("/")
        if name == "scale":
            return jnp.ones(shape)
        if name == "bias":
            return jnp.zeros(shape)
        digest = hashlib.sha256(path.encode()).digest()
        rng = np.random.default_rng([*words, int.from_bytes(digest[:8], "big")])
        std = table_std[owner] if name == "embedding" else np.prod(shape[:-1]) ** -0.5
        values = rng.standard_normal(shape, dtype=np.float32)
        return jnp.array(values * np.float32(std))

    flat = flatten(shapes(model)._asdict())
    with ThreadPoolExecutor() as pool:  # numpy draws without holding the interpreter
        leaves = pool.map(lambda item: draw(item[0], item[1].shape), flat.items())
        return Frozen(**unflatten(dict(zip(flat, leaves, strict=True))))


def encoder_params(model: StableDiffusion, frozen: Frozen) -> dict:
    """The weights of the text encoders, for `each_encoder`."""
    if model.text_2 is None:
        return frozen.text
    return dict(zip(ENCODERS, (frozen.text, frozen.text_2), strict=True))


@_exactly
def encode_text(
    model: StableDiffusion, frozen: Frozen, token_ids: jax.Array, pseudo_tokens: Any = None
) -> Any:
    """The text condition of int32[B, T]; see `CLIPTextModel.__call__` for ids of pseudo tokens.

    Returns: float32[B, T, D]; of SDXL a dict of what each encoder says, by the names of `ENCODERS`,
      and "pooled" float32[B, pooled_dim].

    Args:
      pseudo_tokens: float32[N, D]; of SDXL a dict of those of each encoder.
    """
    if model.text_2 is None:
        return model.text_model.apply({"params": frozen.text}, token_ids, pseudo_tokens)
    # Both have one vocabulary; only what comes after the end differs.
    is_over = jnp.cumsum(token_ids == model.text.end, axis=1) - (token_ids == model.text.end) > 0
    ids = {"clip_l": token_ids, "clip_g": jnp.where(is_over, PADDING_2, token_ids)}

    def encode(config, params, ids, own):
        network = CLIPTextModel(config, model.dtype)
        return network.apply({"params": params}, ids, own, method=CLIPTextModel.penultimate)

    pseudo = dict.fromkeys(ENCODERS) if pseudo_tokens is None else pseudo_tokens
    found = each_encoder(model, encode, encoder_params(model, frozen), ids, pseudo)
    states = {name: state for name, (state, _) in found.items()}
    return states | {"pooled": found["clip_g"][1]}


def encode_negative(
    model: StableDiffusion, frozen: Frozen, token_ids: jax.Array, pseudo_tokens: Any = None
) -> Any:
    """`encode_text` of a negative prompt; of SDXL zeros, where all chunks int32[B, T] are empty."""
    text = encode_text(model, frozen, token_ids, pseudo_tokens)
    if not model.zero_negative:
        return text
    says_something = (token_ids[:, 1] != model.text.end).any()
    return jax.tree.map(lambda leaf: jnp.where(says_something, leaf, 0), text)


def context_of(model: StableDiffusion, text: Any) -> jax.Array:
    """What keys and values are made of, float32[B, T, context_dim], of what `encode_text` gives."""
    if model.text_2 is None:
        return text
    return jnp.concatenate([text[name] for name in ENCODERS], axis=-1)


def text_keys_values(model: StableDiffusion, frozen: Frozen, text: Any) -> dict:
    """How a text condition enters the UNet: `project_kv`, and in SDXL the pooled output beside."""
    kv = project_kv(frozen.cross_kv, context_of(model, text), model.dtype)
    return kv if model.text_2 is None else kv | {"pooled": text["pooled"]}


@_exactly
def encode_token_embeds(model: StableDiffusion, frozen: Frozen, token_embeds: Any) -> Any:
    """The last hidden state float32[B, T, D], after the final LayerNorm, of input embeddings
    [B, T, D] without positions; of SDXL each a dict of those of each encoder."""

    def encode(config, params, embeds):
        network = CLIPTextModel(config, model.dtype)
        return network.apply({"params": params}, embeds, method=CLIPTextModel.encode_embeds)

    return each_encoder(model, encode, encoder_params(model, frozen), token_embeds)


def embed_tokens(model: StableDiffusion, frozen: Frozen, token_ids: jax.Array) -> Any:
    """Input embeddings float32[..., D] of int32[...] token ids; of SDXL a dict of those of each
    encoder."""

    def embed(config, params):
        network = CLIPTextModel(config, model.dtype)
        return network.apply({"params": params}, token_ids, method=CLIPTextModel.embed)

    return each_encoder(model, embed, encoder_params(model, frozen))


@_exactly
def encode_image(
    model: StableDiffusion, frozen: Frozen, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance of the scaled latents, each float32[B, H/8, W/8, C].

    Images are float[B, H, W, 3] in [-1, 1]; the factor 8 is that of Stable Diffusion's VAE.
    """
    mean, logvar = model.vae_model.apply(
        {"params": frozen.vae}, images, method=AutoencoderKL.encode
    )
    scale = model.vae.scaling_factor
    if model.vae.latents_std is None:
        return mean * scale, logvar + 2 * np.log(scale)
    middle, std = _moments(model.vae)
    return (mean - middle) * (scale / std), logvar + 2 * np.log(scale / std)


@_exactly
def predict(
    model: StableDiffusion,
    frozen: Frozen,
    latents: jax.Array,
    timesteps: jax.Array,
    kv: dict,
    size_ids: jax.Array | None = None,
) -> jax.Array:
    """The UNet's prediction float32[B, h, w, C]; see `UNet2DConditionModel.__call__`."""
    return model.unet_model.apply({"params": frozen.unet}, latents, timesteps, kv, size_ids)


@_exactly
def embed_times(
    model: StableDiffusion,
    frozen: Frozen,
    timesteps: jax.Array,
    pooled: jax.Array | None = None,
    size_ids: jax.Array | None = None,
) -> dict:
    """What the UNet adds at timesteps [N], each leaf [N, width]: for `denoise`, row by row; see
    `UNet2DConditionModel.embed_times`."""
    return model.unet_model.apply(
        {"params": frozen.unet},
        timesteps,
        pooled,
        size_ids,
        method=UNet2DConditionModel.embed_times,
    )


@_exactly
def denoise(
    model: StableDiffusion, frozen: Frozen, latents: jax.Array, times: dict, kv: dict
) -> jax.Array:
    """`predict`, of a timestep that is embedded already: leaves of `times` [B or 1, width]."""
    return model.unet_model.apply(
        {"params": frozen.unet}, latents, times, kv, method=UNet2DConditionModel.denoise
    )


def _moments(vae: VAEConfig) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each latent channel, float32[1, 1, 1, C]."""
    return tuple(
        np.float32(values)[None, None, None] for values in (vae.latents_mean, vae.latents_std)
    )


@_exactly
def decode(model: StableDiffusion, frozen: Frozen, latents: jax.Array) -> jax.Array:
    """Images float32[B, H, W, 3], about [-1, 1], of scaled latents [B, h, w, C]."""
    latents = latents / model.vae.scaling_factor
    if model.vae.latents_std is not None:
        middle, std = _moments(model.vae)
        latents = latents * std + middle
    return model.vae_model.apply({"params": frozen.vae}, latents, method=AutoencoderKL.decode)
