"""Checkpoints in one file, in the layout that Stable Diffusion was first published in.

The keys get the names that diffusers gives them, so that the tables of `weights` read them.

Source: the names of modules in the code of CompVis and Stability AI, and in OpenCLIP.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from idea_jax.models.config_reader import UnsupportedConfig
from idea_jax.models.tensor_files import TensorFiles, Tensors, WeightsError

log = logging.getLogger(__name__)

# Where each part stands in the file, by the folder that diffusers keeps it in. The text encoder of
# SD 1.x is CLIP as transformers names it, that of SD 2.x is CLIP as OpenCLIP does; SDXL has both.
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
PREFIXES = {
    "unet": (UNET,),
    "vae": (VAE,),
    "text_encoder": (CLIP, OPEN_CLIP, CLIP_L),
    "text_encoder_2": (CLIP_G,),
}

# What fills prompts up: the end token with CLIP, id 0 with OpenCLIP. (SDXL's second encoder has its
# own: `bundle.PADDING_2`.)
PADDING = {"sd1": "<|endoftext|>", "sd2": "!", "sdxl": "<|endoftext|>"}

VISION_LAYERS = 24  # of the text encoder of OpenCLIP's ViT-H

SIGMAS = "denoiser.sigmas"  # the noise schedule in some files of SDXL, from the least noise on

# Keys that hold nothing that is read, and what they are.
IGNORED = (
    (r"(first_stage_model\.)?model_ema\..+", "averages of the weights (EMA)"),
    (
        rf"\w*(alphas_cumprod\w*|betas|posterior_\w+|lvlb_weights|logvar)|{re.escape(SIGMAS)}",
        "the noise schedule, which is computed",
    ),
    (r"first_stage_model\.loss\..+", "the training of the autoencoder"),
    (
        r"cond_stage_model\.(transformer\.|model\.)?(logit_scale|text_projection(\.weight)?|"
        r"attn_mask|visual\..+)",
        "what ties texts to pictures",
    ),
    (
        r"conditioner\.embedders\.(0\.transformer|1\.model)\.(logit_scale|attn_mask|visual\..+)",
        "what ties texts to pictures",
    ),
)

# How other kinds of file are known, and what to do with them.
OTHERS = (
    (
        r"conditioner\.embedders\.0\.model\..*",
        "SDXL's refiner, which draws nobody by itself: give the base",
    ),
    (r"(.*\.)?(double_blocks|joint_blocks|single_blocks)\..*", "a checkpoint of a transformer"),
    (r"control_model\..*", "a ControlNet"),
    (r"(lora_(unet|te).*|.*\.lora_(A|B|down|up)\..*)", "a LoRA: give it with --lora"),
    (r"(emb_params|clip_l|string_to_param.*)", "pseudo tokens, for --learned_embedding_path"),
    (
        r"(down_blocks|up_blocks|mid_block|encoder|decoder|text_model|embeddings)\..*",
        "one part of a checkpoint in diffusers layout: give the folder that holds all parts",
    ),
)


TURNED = "T"  # of a tensor that is read with its axes the other way round
Part = slice | str | None  # rows of a tensor, `TURNED`, or all as it is


class Renamed(Tensors):
    """Tensors of a file under other names, some of them a part of a tensor there."""

    def __init__(self, tensors: Tensors, names: dict[str, tuple[str, Part]]):
        self._tensors, self._names = tensors, names
        self.headers = {}
        for name, (key, part) in names.items():
            shape, dtype = tensors.headers[key]
            if isinstance(part, slice):
                shape = (len(range(shape[0])[part]), *shape[1:])
            self.headers[name] = (shape[::-1] if part == TURNED else shape, dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        key, part = self._names[name]
        tensor = self._tensors[key]
        if part == TURNED:
            return tensor.T
        return tensor[part] if isinstance(part, slice) else tensor


class Original:
    """An open checkpoint in one file.

    Raises: WeightsError if it is no safetensors file; UnsupportedConfig if it is not that of a
        Stable Diffusion 1.x, 2.x or XL.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if self.path.suffix != ".safetensors":
            raise WeightsError(
                f"{path}: a checkpoint in one file is read from .safetensors only, since reading a "
                "pickle (.ckpt, .pt) can run foreign code: convert it, in a program that you trust "
                "with it"
            )
        self.tensors = TensorFiles([self.path])
        self.shapes = {key: shape for key, (shape, _) in self.tensors.headers.items()}
        self._check_kind()

    def _check_kind(self) -> None:
        for pattern, kind in OTHERS:
            found = [key for key in self.shapes if re.fullmatch(pattern, key)]
            if found:
                raise UnsupportedConfig(
                    f"{self.path} is {kind} (it holds {found[0]}); expected a Stable Diffusion "
                    "1.x, 2.x or XL in the original layout"
                )
        optional = ("vae",) if self.family == "sdxl" else ("vae", "text_encoder_2")
        for name, prefixes in PREFIXES.items():
            if name not in optional and not any(key.startswith(prefixes) for key in self.shapes):
                held = ", ".join(sorted({key.split(".")[0] for key in self.shapes})[:5])
                raise UnsupportedConfig(
                    f"{self.path} has no {name}: expected keys {' or '.join(prefixes)}..., as in "
                    f"the original layout of Stable Diffusion; it holds {held or 'nothing'}"
                )
        channels = self.shape(f"{UNET}input_blocks.0.0.weight")[1]
        if channels in (5, 8, 9):
            kind = {5: "a depth", 8: "an instruction", 9: "an inpainting"}[channels]
            raise UnsupportedConfig(
                f"{self.path} is {kind} model: its UNet takes {channels} channels, expected 4, as "
                "in a text-to-image model"
            )

    @property
    def family(self) -> str:
        """ "sd1", "sd2" or "sdxl", by the names of the text encoders."""
        if any(key.startswith("conditioner.") for key in self.shapes):
            return "sdxl"
        return "sd2" if any(key.startswith(OPEN_CLIP) for key in self.shapes) else "sd1"

    @property
    def has_vae(self) -> bool:
        return any(key.startswith(f"{VAE}decoder.") for key in self.shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises: WeightsError if there is none of that name.
        """
        if key not in self.shapes:
            raise WeightsError(
                f"{self.path} lacks {key}, which every Stable Diffusion has; the file is cut, or "
                "of another kind"
            )
        return self.shapes[key]

    def count(self, pattern: str) -> int:
        """How many numbers follow each other from 0 where `pattern` has its group."""
        found = {int(m[1]) for key in self.shapes if (m := re.match(pattern, key))}
        return next(n for n in range(len(found) + 1) if n not in found)

    def part(self, name: str) -> Renamed:
        """The tensors of a part, one of `PREFIXES`, under diffusers' names.

        Keys without such a name keep theirs, so that what reads them says that it knows none.
        """
        rename: Callable[[str], Iterator[tuple[str, Part]]]
        if name == "unet":
            rename = self._unet_names()
        elif name == "vae":
            rename = self._vae_names()
        elif name == "text_encoder_2" or self.family == "sd2":
            rename = self._open_clip_names(CLIP_G if name == "text_encoder_2" else OPEN_CLIP)
        else:
            rename = _clip_names
        names: dict[str, tuple[str, Part]] = {}
        for prefix in PREFIXES[name]:
            for key in self.shapes:
                if key.startswith(prefix) and not _ignored(key) and not self._beyond(key):
                    for new, rows in rename(key.removeprefix(prefix)):
                        names[key if new in names else new] = (key, rows)
        return Renamed(self.tensors, names)

    def check_rest(self, *, vae: bool = True) -> None:
        """Says what is not read.

        Args:
          vae: whether the file's autoencoder is read.

        Raises: WeightsError naming the keys that belong to no part.
        """
        kinds: dict[str, int] = {}
        unknown = []
        for key, shape in self.shapes.items():
            kind = _ignored(key)
            if self._beyond(key):
                kind = "the last layer of the text encoder, which SD 2.x does not use"
            elif key.startswith(VAE) and not vae:
                kind = "the autoencoder, since another one was given"
            elif kind is None and key.startswith(sum(PREFIXES.values(), ())):
                continue
            elif kind is None and math.prod(shape) <= 1:
                kind = "single numbers"
            if kind is None:
                unknown.append(f"{key} {list(shape)}")
            else:
                kinds[kind] = kinds.get(kind, 0) + 1
        if unknown:
            listed = "".join(f"\n  {line}" for line in sorted(unknown)[:20])
            more = f"\n  ... and {len(unknown) - 20} more" if len(unknown) > 20 else ""
            raise WeightsError(
                f"{self.path}: {len(unknown)} keys belong to no part of a Stable Diffusion:"
                f"{listed}{more}"
            )
        if kinds:
            said = "; ".join(f"{number} of {kind}" for kind, number in sorted(kinds.items()))
            log.info("%s: tensors that are not read: %s", self.path, said)

    def _beyond(self, key: str) -> bool:
        """Whether a key is of OpenCLIP's last layer: SD 2.x takes what the one before gives."""
        found = re.match(re.escape(OPEN_CLIP) + r"transformer\.resblocks\.(\d+)\.", key)
        return bool(found) and int(found[1]) >= self.text_layers

    @property
    def text_layers(self) -> int:
        """The layers of the text encoder that are used."""
        if self.family != "sd2":
            prefix = re.escape(CLIP if self.family == "sd1" else CLIP_L)
            return self.count(prefix + r"(?:text_model\.)?encoder\.layers\.(\d+)\.")
        count = self.count(re.escape(OPEN_CLIP) + r"transformer\.resblocks\.(\d+)\.")
        # Conversions from diffusers layout leave the last of ViT-H out.
        return count if count == VISION_LAYERS - 1 else count - 1

    @property
    def unet_layers(self) -> int:
        """ResNet blocks of a level of the UNet, before it changes the resolution."""
        for number in range(1, len(self.shapes)):
            if f"{UNET}input_blocks.{number}.0.op.weight" in self.shapes:
                return number - 1
        return self.count(re.escape(UNET) + r"input_blocks\.(\d+)\.") - 1

    def _unet_names(self) -> Callable:
        layers = self.unet_layers

        def rename(key: str) -> Iterator[tuple[str, Part]]:
            if found := re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", key):
                side, number, child, rest = found[1], int(found[2]), int(found[3]), found[4]
                if side == "input" and number == 0:
                    yield f"conv_in.{rest}", None
                    return
                size = layers + 1
                level, at = divmod(number - (side == "input"), size)
                block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
                if rest.startswith("op."):
                    yield f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}", None
                elif rest.startswith("conv."):
                    yield f"{block}.upsamplers.0.{rest}", None
                else:
                    yield _unet_block(f"{block}.{{}}.{at}", child, rest), None
            elif found := re.fullmatch(r"middle_block\.(\d+)\.(.+)", key):
                at, child = {"0": (0, 0), "1": (0, 1), "2": (1, 0)}.get(found[1], (0, 9))
                yield _unet_block(f"mid_block.{{}}.{at}", child, found[2]), None
            else:
                yield _replaced(key, UNET_ENDS), None

        return rename

    def _vae_names(self) -> Callable:
        levels = self.count(re.escape(VAE) + r"decoder\.up\.(\d+)\.")

        def rename(key: str) -> Iterator[tuple[str, Part]]:
            found = re.fullmatch(r"decoder\.up\.(\d+)\.(.+)", key)
            if found:  # counted from the full resolution
                key = f"decoder.up_blocks.{levels - 1 - int(found[1])}.{found[2]}"
            yield _replaced(key, VAE_NAMES), None

        return rename

    def _open_clip_names(self, prefix: str) -> Callable:
        width = self.shape(f"{prefix}token_embedding.weight")[1]

        def rename(key: str) -> Iterator[tuple[str, Part]]:
            if key == "text_projection":  # multiplied from the other side there
                yield "text_projection.weight", TURNED
                return
            name = _replaced(key, OPEN_CLIP_NAMES)
            if found := re.fullmatch(r"(.+\.)in_proj_(weight|bias)", name):
                for i, layer in enumerate(("q_proj", "k_proj", "v_proj")):
                    rows = slice(i * width, (i + 1) * width)
                    # The last one takes all that is left: rows too many do not go unseen.
                    rows = slice(rows.start, None) if i == 2 else rows
                    yield f"text_model.{found[1]}{layer}.{found[2]}", rows
            else:
                yield f"text_model.{name}", None

        return rename


def _clip_names(key: str) -> Iterator[tuple[str, Part]]:
    yield key, None


# Names of the original layout and of diffusers, in the order in which they are replaced.
UNET_ENDS = (
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^label_emb\.0\.0\.", "add_embedding.linear_1."),
    (r"^label_emb\.0\.2\.", "add_embedding.linear_2."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
)
RESNET = (
    (r"^in_layers\.0\.", "norm1."),
    (r"^in_layers\.2\.", "conv1."),
    (r"^emb_layers\.1\.", "time_emb_proj."),
    (r"^out_layers\.0\.", "norm2."),
    (r"^out_layers\.3\.", "conv2."),
    (r"^skip_connection\.", "conv_shortcut."),
)
VAE_NAMES = (
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"((?:down|up)_blocks\.\d+)\.block\.", r"\1.resnets."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.q\.", ".mid_block.attentions.0.query."),
    (r"\.mid\.attn_1\.k\.", ".mid_block.attentions.0.key."),
    (r"\.mid\.attn_1\.v\.", ".mid_block.attentions.0.value."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.proj_attn."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)
OPEN_CLIP_NAMES = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def _replaced(key: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, new in names:
        key = re.sub(pattern, new, key, count=1)
    return key


def unet_name(name: str, layers: int, *, crosses: bool = True) -> str:
    """What a layer of a UNet is called here that diffusers calls `name`: the way back from
    `Original.part`, of a name without a prefix and `.weight`.

    Args:
      layers: ResNet blocks of a level on the way down (`layers_per_block`).
      crosses: whether the layer's level has attentions, which an upsampler stands behind.
    """
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)", name)
    if not found:
        return {"conv_in": "input_blocks.0.0"}.get(name) or _named_back(name, UNET_ENDS)
    way, level, kind, at, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    first, is_sampler = (layers + 1) * level + (way == "down"), kind.endswith("samplers")
    rest = _named_back(rest, RESNET) if kind == "resnets" else rest
    if way is None:
        return f"middle_block.{1 if kind == 'attentions' else 2 * at}.{rest}"
    if is_sampler and way == "down":
        return f"input_blocks.{first + layers}.0.op"
    if is_sampler:
        return f"output_blocks.{first + layers}.{1 + crosses}.conv"
    side = "input" if way == "down" else "output"
    return f"{side}_blocks.{first + at}.{int(kind == 'attentions')}.{rest}"


def _named_back(name: str, names: tuple[tuple[str, str], ...]) -> str:
    """`_replaced` from its end to its beginning; a name may be that of a layer, without a dot
    behind it."""
    for pattern, new in names:
        if f"{name}.".startswith(new):
            old = pattern.removeprefix("^").replace("\\.", ".")
            return (old + f"{name}.".removeprefix(new)).removesuffix(".")
    return name


def _unet_block(block: str, child: int, rest: str) -> str:
    if child == 0:
        return f"{block.format('resnets')}.{_replaced(rest, RESNET)}"
    kind = "attentions" if child == 1 else f"child_{child}"
    return f"{block.format(kind)}.{rest}"


def _ignored(key: str) -> str | None:
    if key.endswith(".position_ids"):
        return "counts of positions"
    return next((kind for pattern, kind in IGNORED if re.fullmatch(pattern, key)), None)
