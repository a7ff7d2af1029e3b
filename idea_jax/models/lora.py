"""LoRA files of others, merged into the weights of a checkpoint while they are read.

A weight W becomes W + scale * alpha / rank * up @ down, in float32, before it is cast. Three ways
of naming are read: kohya's, peft's and those of diffusers before it used peft. kohya's names for
the UNet of SDXL are those of the original layout.

Source: arXiv 2106.09685; for the names kohya-ss/sd-scripts' networks/lora.py and diffusers.
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from idea_jax.models.original import unet_name
from idea_jax.models.tensor_files import FLOAT_TYPES, TensorFiles, Tensors, WeightsError
from idea_jax.runtime.files import file_digest

log = logging.getLogger(__name__)

PARTS = ("unet", "text_encoder", "text_encoder_2")

# The beginning of a key, and the part of a checkpoint that it means.
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
OF_TEXT = ("text_model.", "encoder.layers.")  # without a prefix, what is no UNet's

# The end of a key, and which factor it is. In peft's own files the adapter has a name.
DOWN = r"(?:[._]lora[._](?:down|A)|[._]lora_linear_layer\.down)(?:\.\w+)?\.weight"
UP = r"(?:[._]lora[._](?:up|B)|[._]lora_linear_layer\.up)(?:\.\w+)?\.weight"
ENDS = ((DOWN, "down"), (UP, "up"), (r"(?:_lora|\.lora)?\.alpha", "alpha"))

# Tensors of methods that are more than two factors, and what they are.
OTHER_METHODS = (
    (r"dora_scale|lora_magnitude_vector", "DoRA"),
    (r"hada_\w+", "LoHa"),
    (r"lokr_\w+", "LoKr"),
    (r"lora_mid", "a LoRA of three factors"),
    (r"oft_\w+", "OFT"),
    (r"diff|diff_b|w_norm|b_norm", "whole differences of weights"),
)
FIRST_LEVEL = r"down_blocks\.0\.resnets\.(\d+)\."  # counts the ResNet blocks of a level

TOKENS = "bundle_emb."  # pseudo tokens that web UIs put into the same file

METADATA = "lora_adapter_metadata"  # of diffusers: the config of peft as JSON
LISTED = 10


class LoraError(WeightsError):
    """A LoRA file cannot be used; the message names it and says why."""


class Lora(NamedTuple):
    """A LoRA file and how strongly it acts; 0 is not at all, and negative numbers turn it round."""

    path: Path
    scale: float = 1.0


class Module(NamedTuple):
    """The keys of one layer in a LoRA file."""

    down: str
    up: str
    alpha: float | None  # None for the rank


def named(texts: Sequence[str] | None) -> tuple[Lora, ...]:
    """Reads what `--lora` was given: FILE or FILE:SCALE each.

    Raises: LoraError if a file does not exist, or a scale is no finite number.
    """
    found = []
    for text in texts or ():
        name, scale = text, 1.0
        head, colon, tail = text.rpartition(":")
        if colon and not Path(os.path.expanduser(text)).exists():
            try:
                name, scale = head, float(tail)
            except ValueError as error:
                raise LoraError(
                    f"--lora {text}: there is no such file, and {tail!r} is no number; give FILE "
                    "or FILE:SCALE, such as style.safetensors:0.8"
                ) from error
        path = Path(os.path.expanduser(name))
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise LoraError(f"--lora {text}: expected a LoRA file, and {path} {what}")
        if not math.isfinite(scale):
            raise LoraError(f"--lora {text}: expected a finite scale, got {scale}")
        found.append(Lora(path, scale))
    return tuple(found)


def about(loras: Sequence[Lora]) -> list[dict]:
    """What is written of LoRA files beside a result: names, never paths."""
    return [
        {"file": path.name, "scale": scale, "sha256": file_digest(path)} for path, scale in loras
    ]


class LoraFile:
    """An open LoRA file: `modules` is {(part, name with `_` for every `.`): keys}.

    Raises: LoraError if it is no LoRA of two factors a layer for Stable Diffusion.
    """

    def __init__(self, lora: Lora):
        self.path, self.scale = lora
        if self.path.suffix != ".safetensors":
            raise LoraError(
                f"{self.path}: LoRA files are read from .safetensors only; convert it, in a "
                "program that you trust with it"
            )
        self.tensors = TensorFiles([self.path])
        self.modules: dict[tuple[str, str], Module] = {}
        factors, self.tokens = self._sorted_keys()
        said = self._said_alphas()
        for (part, name), keys in factors.items():
            lacks = {"down", "up"} - keys.keys()
            if lacks:
                present = next(iter(keys.values()))
                raise LoraError(f"{self.path}: {present} has no {' and no '.join(sorted(lacks))}")
            alpha = float(self._read(keys["alpha"]).reshape(())) if "alpha" in keys else None
            self.modules[part, _squashed(name)] = Module(
                keys["down"], keys["up"], said(part, name) if alpha is None else alpha
            )
        if not self.modules:
            held = ", ".join(sorted(self.tensors)[:3]) or "nothing"
            raise LoraError(
                f"{self.path} is no LoRA: expected keys such as lora_unet_....lora_down.weight or "
                f"unet.....lora_A.weight, it holds {held}"
            )

    def _sorted_keys(self) -> tuple[dict[tuple[str, str], dict[str, str]], list[str]]:
        """Returns {(part, module): {factor: key}}, and the keys of pseudo tokens."""
        factors: dict[tuple[str, str], dict[str, str]] = {}
        tokens, unknown = [], []
        for key in self.tensors:
            for pattern, kind in OTHER_METHODS:
                if re.search(rf"\.({pattern})(\.\w+)*$", key):
                    raise LoraError(
                        f"{self.path} holds {kind} ({key}), which is not supported; merge it in "
                        "the program that made it, or take a plain LoRA"
                    )
            if key.startswith(TOKENS):
                tokens.append(key)
                continue
            for pattern, factor in ENDS:
                if found := re.fullmatch(rf"(.+?){pattern}", key):
                    own = factors.setdefault(_module_of(found[1]), {})
                    if factor in own:
                        raise LoraError(f"{self.path}: {key} and {own[factor]} are the same")
                    own[factor] = key
                    break
            else:
                unknown.append(key)
        if unknown and factors:
            raise LoraError(
                f"{self.path}: {len(unknown)} keys of no LoRA: {', '.join(unknown[:LISTED])}"
            )
        return factors, tokens

    def _said_alphas(self) -> Callable[[str, str], float | None]:
        """Returns what gives alpha by part and module, as the file's metadata say it."""
        text = self.tensors.metadata.get(METADATA)
        beside = self.path.with_name("adapter_config.json")
        if text is None and self.path.name == "adapter_model.safetensors" and beside.is_file():
            text = beside.read_text(encoding="utf-8", errors="replace")
        if text is None:
            return lambda part, name: None
        try:
            values = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise LoraError(f"{self.path}: its metadata are no config of peft: {error}") from error

        def alpha_of(part: str, name: str) -> float | None:
            own = {k.removeprefix(f"{part}."): v for k, v in values.items()}
            alpha, patterns = own.get("lora_alpha"), own.get("alpha_pattern") or {}
            if own.get("use_dora"):
                raise LoraError(f"{self.path} holds DoRA, which is not supported")
            if isinstance(patterns, dict):
                for ending, value in patterns.items():
                    if name == ending or name.endswith(f".{ending}"):
                        alpha = value
            if alpha is not None and not isinstance(alpha, int | float):
                raise LoraError(f"{self.path}: lora_alpha = {alpha!r}, expected a number")
            if alpha is not None and own.get("use_rslora"):  # divided by the root of the rank
                down = next(
                    key for key in self.tensors if name in key and re.search(f"{DOWN}$", key)
                )
                alpha = alpha * math.sqrt(self.tensors.headers[down][0][0])
            return alpha

        return alpha_of

    def _read(self, key: str) -> np.ndarray:
        dtype = self.tensors.headers[key][1]
        if dtype not in FLOAT_TYPES:
            kinds = ", ".join(FLOAT_TYPES)
            raise LoraError(f"{self.path}: {key} is {dtype}, expected one of {kinds}")
        values = self.tensors[key].astype(np.float32)
        if not np.isfinite(values).all():
            raise LoraError(f"{self.path}: {key} holds values that are not finite")
        return values

    def problem(self, module: Module, shape: tuple[int, ...]) -> str | None:
        """What is wrong with a module for a weight of that shape; None if it fits."""
        down, up = (self.tensors.headers[key][0] for key in (module.down, module.up))
        fits = (
            len(shape) >= 2
            and len(down) in (2, 4)
            and len(up) in (2, 4)
            and down[0] > 0
            and up[:2] == (shape[0], down[0])
            and math.prod(up) == up[0] * up[1]
            and math.prod(down[1:]) == math.prod(shape[1:])
            and (down[1:] == shape[1:] or math.prod(down[2:]) == math.prod(shape[2:]) == 1)
        )
        if fits:
            return None
        return f"{module.down} {list(down)} and up {list(up)} for a weight {list(shape)}"

    def change(self, module: Module, shape: tuple[int, ...]) -> np.ndarray:
        """What is added to a weight of that shape, float32."""
        down, up = self._read(module.down), self._read(module.up)
        rank = len(down)
        alpha = rank if module.alpha is None else module.alpha
        product = up.reshape(len(up), rank) @ down.reshape(rank, -1)
        return (np.float32(self.scale * alpha / rank) * product).reshape(shape)


def _module_of(name: str) -> tuple[str, str]:
    """Returns the part and the name of a module, without what older files put into it."""
    name = name.removeprefix("base_model.model.")
    part = "text_encoder" if name.startswith(OF_TEXT) else "unet"
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    part, name = PREFIXES.get(prefix, part), name.removeprefix(prefix).replace(".processor.", ".")
    # The output of attention is a list of a layer and a dropout.
    name = re.sub(r"\.to_out$", ".to_out.0", name)
    return part, name


def _squashed(name: str) -> str:
    """A name as kohya writes it: there, `.` and `_` are the same."""
    return name.replace(".", "_").removeprefix("text_model_")


def _original_names(keys: Iterable[str]) -> dict[str, str]:
    """The weights of a UNet by what the original layout calls their layers, squashed."""
    names = [key.removesuffix(".weight") for key in keys]
    crossed = {name.partition(".attentions.")[0] for name in names if ".attentions." in name}
    first = {found[1] for name in names if (found := re.match(FIRST_LEVEL, name))}
    return {
        _squashed(
            unet_name(name, len(first), crosses=name.partition(".upsamplers.")[0] in crossed)
        ): f"{name}.weight"
        for name in names
    }


class Merged(Tensors):
    """Tensors with what LoRA files add to some of them."""

    def __init__(self, tensors: Tensors, changes: dict[str, list[tuple[LoraFile, Module]]]):
        self._tensors, self._changes = tensors, changes
        self.headers = tensors.headers

    def __getitem__(self, key: str) -> np.ndarray:
        value = self._tensors[key]
        for file, module in self._changes.get(key, ()):
            value = value.astype(np.float32) + file.change(module, value.shape)
        return value


class Merging:
    """Merges LoRA files into the parts of a checkpoint, one part after the other.

    Raises: LoraError as `LoraFile`.
    """

    def __init__(self, loras: Sequence[Lora]):
        self._files = [LoraFile(lora) for lora in loras]
        self._used: list[set] = [set() for _ in loras]

    def merged(self, part: str, tensors: Tensors) -> Tensors:
        """The tensors of a part, named as in diffusers, with the files' changes.

        Raises: LoraError if layers have other shapes.
        """
        if not self._files or part not in PARTS:
            return tensors
        keys = {
            _squashed(key.removesuffix(".weight")): key
            for key in tensors
            if key.endswith(".weight")
        }
        if part == "unet":
            keys |= _original_names(keys.values())
        changes: dict[str, list[tuple[LoraFile, Module]]] = {}
        for file, used in zip(self._files, self._used, strict=True):
            wrong = []
            for (own, name), module in file.modules.items():
                if own != part or name not in keys:
                    continue
                key = keys[name]
                if problem := file.problem(module, tensors.headers[key][0]):
                    wrong.append(problem)
                used.add((own, name))
                changes.setdefault(key, []).append((file, module))
            if wrong:
                listed = "".join(f"\n  {line}" for line in wrong[:LISTED])
                raise LoraError(
                    f"{file.path} is a LoRA for a model of another width: {len(wrong)} of its "
                    f"layers do not fit the {part}:{listed}\nTake a LoRA that was trained on the "
                    "family of this checkpoint (SD 1.x, SD 2.x or SDXL)"
                )
        return Merged(tensors, changes)

    def check_rest(self) -> None:
        """Says what was merged.

        Raises: LoraError naming layers that the checkpoint does not have.
        """
        for file, used in zip(self._files, self._used, strict=True):
            unused = [module.down for own, module in file.modules.items() if own not in used]
            if unused:
                listed = "".join(f"\n  {key}" for key in sorted(unused)[:LISTED])
                raise LoraError(
                    f"{file.path}: {len(unused)} of {len(file.modules)} layers are not in this "
                    f"checkpoint, so it is for another kind of model:{listed}"
                )
            counts = ", ".join(
                f"{number} layers of the {part}"
                for part in PARTS
                if (number := sum(own == part for own, _ in used))
            )
            log.info("LoRA %s, scale %g: %s", file.path.name, file.scale, counts)
            if file.tokens:
                log.warning(
                    "%s also holds pseudo tokens (%s), which are not read",
                    file.path,
                    ", ".join(file.tokens[:LISTED]),
                )
