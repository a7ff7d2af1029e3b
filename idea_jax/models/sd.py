"""Stable Diffusion as one bundle: configs, frozen weights, and pure functions over both.

Latents are scaled (multiplied by the VAE's scaling factor) everywhere outside `vae.py`.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from idea_jax.diffusion import schedule
from idea_jax.diffusion.schedule import ScheduleConfig
from idea_jax.models import original_config as original_configs
from idea_jax.models import weights
from idea_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from idea_jax.models.config_reader import UnsupportedConfig, say_once
from idea_jax.models.lora import Lora, Merging
from idea_jax.models.original import Original
from idea_jax.models.precision import exact
from idea_jax.models.tensor_files import TensorFiles, Tensors, WeightsError, find_weights
from idea_jax.models.unet import UNet2DConditionModel, UNetConfig, cross_kv_shapes
from idea_jax.models.vae import AutoencoderKL, VAEConfig
from idea_jax.pytrees import flatten, unflatten
from idea_jax.runtime import traces
from idea_jax.runtime.files import atomic_write, write_json

COMPUTE_DTYPES = ("float32", "bfloat16")
DIFFUSERS_VERSION = "0.42.1"  # whose layout `save` writes


class Frozen(NamedTuple):
    """The weights that personalising never changes: nested dicts of arrays.

    `shared` is what an ID-Enhancer that was trained over many people adds for all of them
    (`method.shared.frozen_part`); empty without one, and no part of a checkpoint.
    """

    text: dict
    unet: dict
    cross_kv: dict
    vae: dict
    shared: dict = {}


@dataclass(frozen=True)
class StableDiffusion:
    """What the networks look like. Hashable, so it can be a static argument of `jax.jit`."""

    text: CLIPTextConfig
    unet: UNetConfig
    vae: VAEConfig
    schedule: ScheduleConfig
    compute_dtype: str = "float32"
    attention: str = "xla"  # kernel of the UNet's long self-attentions, see `flash`

    def __post_init__(self):
        text, unet, vae = self.text, self.unet, self.vae
        latents, rgb = ("VAE's latent_channels", vae.latent_channels), ("RGB's", 3)
        width = ("text encoder's hidden_size", text.hidden_size)
        pairs = (
            (("UNet's cross_attention_dim", unet.cross_attention_dim), width),
            (("UNet's in_channels", unet.in_channels), latents),
            (("UNet's out_channels", unet.out_channels), latents),
            (("VAE's in_channels", vae.in_channels), rgb),
            (("VAE's out_channels", vae.out_channels), rgb),
        )
        problems = [f"{a} is {x}, but the {b} is {y}" for (a, x), (b, y) in pairs if x != y]
        if self.compute_dtype not in COMPUTE_DTYPES:
            options = " or ".join(COMPUTE_DTYPES)
            problems.append(f"compute dtype is {self.compute_dtype!r}, expected {options}")
        if problems:
            raise UnsupportedConfig(
                "not a text-to-image Stable Diffusion 1.x or 2.x: " + "; ".join(problems)
            )

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute_dtype)

    @property
    def text_model(self) -> CLIPTextModel:
        return CLIPTextModel(self.text, self.dtype)

    @property
    def unet_model(self) -> UNet2DConditionModel:
        return UNet2DConditionModel(self.unet, self.dtype, self.attention)

    @property
    def vae_model(self) -> AutoencoderKL:
        return AutoencoderKL(self.vae, self.dtype)


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
    yield _Part("unet", stem, unet_table, ("unet", "cross_kv"), model.unet.to_dict())
    yield _Part("vae", stem, weights.vae_table(), ("vae",), model.vae.to_dict())


def read_configs(
    folder: Path,
    compute_dtype: str = "float32",
    *,
    vae: Path | None = None,
    clip_skip: int = 0,
    prediction_type: str | None = None,
    original_config: str | None = None,
) -> StableDiffusion:
    """Reads the four config files of a checkpoint in diffusers layout, or the shapes of one file.

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
            _read_config(ScheduleConfig, folder, "scheduler/scheduler_config.json"),
        )
    text, noise = found.text, found.schedule
    if clip_skip >= text.num_hidden_layers:
        raise UnsupportedConfig(
            f"--clip_skip {clip_skip} leaves nothing of the {text.num_hidden_layers} layers of the "
            f"text encoder in {folder}"
        )
    return StableDiffusion(
        text=replace(text, num_hidden_layers=text.num_hidden_layers - clip_skip),
        unet=found.unet,
        vae=found.vae or _read_config(VAEConfig, vae, "config.json"),
        schedule=replace(noise, prediction_type=prediction_type or noise.prediction_type),
        compute_dtype=compute_dtype,
    )


def _read_config(kind: Any, folder: Path, name: str) -> Any:
    file = folder / name
    if not file.is_file():
        present = sorted(x.name for x in folder.glob("*"))
        raise WeightsError(
            f"no {name} in {folder}, which holds {', '.join(present) or 'nothing'}; "
            "expected a Stable Diffusion checkpoint in diffusers layout"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} holds no JSON object")
    config = kind.from_dict(values, str(file))
    for notice in schedule.notices(values) if kind is ScheduleConfig else ():
        say_once(f"{file}: {notice}")
    return config


def shapes(model: StableDiffusion) -> Frozen:
    """The trees of `Frozen` with a float32 shape in place of each array; allocates nothing.

    Every caller gets the same trees, which are not to be changed.
    """
    return _shapes(StableDiffusion(model.text, model.unet, model.vae, model.schedule))


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

    def parameters(network, *inputs):
        return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]

    def zeros(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    size = 2 ** (len(cfg.block_out_channels) - 1)
    kv = jax.tree.map(lambda kernel: zeros(1, 1, kernel.shape[1]), cross_kv)
    latents, times = zeros(1, size, size, cfg.in_channels), zeros(1, dtype=jnp.int32)
    images = zeros(1, model.vae.downscale, model.vae.downscale, model.vae.in_channels)
    return Frozen(
        text=parameters(model.text_model, zeros(1, 1, dtype=jnp.int32)),
        unet=parameters(model.unet_model, latents, times, kv),
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
    parts: Collection[str] = ("text_encoder", "unet", "vae"),
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
        config = part.config if part.folder == "text_encoder" else part.config | version
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


@_exactly
def encode_text(
    model: StableDiffusion,
    frozen: Frozen,
    token_ids: jax.Array,
    pseudo_tokens: jax.Array | None = None,
) -> jax.Array:
    """The text condition float32[B, T, D] of int32[B, T]; see `CLIPTextModel.__call__`."""
    return model.text_model.apply({"params": frozen.text}, token_ids, pseudo_tokens)


@_exactly
def encode_token_embeds(
    model: StableDiffusion, frozen: Frozen, token_embeds: jax.Array
) -> jax.Array:
    """The text condition float32[B, T, D] of input embeddings [B, T, D] without positions."""
    return model.text_model.apply(
        {"params": frozen.text}, token_embeds, method=CLIPTextModel.encode_embeds
    )


def embed_tokens(model: StableDiffusion, frozen: Frozen, token_ids: jax.Array) -> jax.Array:
    """Input embeddings float32[..., D] of int32[...] token ids."""
    return model.text_model.apply({"params": frozen.text}, token_ids, method=CLIPTextModel.embed)


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
    return mean * scale, logvar + 2 * np.log(scale)


@_exactly
def predict(
    model: StableDiffusion, frozen: Frozen, latents: jax.Array, timesteps: jax.Array, kv: dict
) -> jax.Array:
    """The UNet's prediction float32[B, h, w, C]; see `UNet2DConditionModel.__call__`."""
    return model.unet_model.apply({"params": frozen.unet}, latents, timesteps, kv)


@_exactly
def embed_times(model: StableDiffusion, frozen: Frozen, timesteps: jax.Array) -> dict:
    """What the UNet adds at timesteps [N], each leaf [N, width]: for `denoise`, row by row."""
    return model.unet_model.apply(
        {"params": frozen.unet}, timesteps, method=UNet2DConditionModel.embed_times
    )


@_exactly
def denoise(
    model: StableDiffusion, frozen: Frozen, latents: jax.Array, times: dict, kv: dict
) -> jax.Array:
    """`predict`, of a timestep that is embedded already: leaves of `times` [B or 1, width]."""
    return model.unet_model.apply(
        {"params": frozen.unet}, latents, times, kv, method=UNet2DConditionModel.denoise
    )


@_exactly
def decode(model: StableDiffusion, frozen: Frozen, latents: jax.Array) -> jax.Array:
    """Images float32[B, H, W, 3], about [-1, 1], of scaled latents [B, h, w, C]."""
    latents = latents / model.vae.scaling_factor
    return model.vae_model.apply({"params": frozen.vae}, latents, method=AutoencoderKL.decode)
