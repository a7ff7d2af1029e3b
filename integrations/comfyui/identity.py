"""What `idea-export` wrote, read with torch and safetensors alone."""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

FORMAT, FORMAT_VERSIONS = "idea_jax.export", (1, 2)
MANIFEST = "identity.json"
ENCODERS = ("clip_l", "clip_g")  # of SDXL
HEADS = 8  # of the ID-Adapter's attention
MAX_MANIFEST = 100_000


@dataclass(frozen=True)
class Identity:
    """A person in a folder.

    Attributes:
      embedding: file of the token embeddings.
      loras: files of the changes of keys and values.
      adapters: tensors of the ID-Adapter of each text encoder by name; none for a person without.
      widths: of the text encoders, one or SDXL's two.
    """

    folder: Path
    embedding: str
    loras: list[Path]
    adapters: list[dict]
    widths: list[int]


def people(root: Path) -> list[str]:
    """Names of the folders below `root` that hold a person; those that a text can say."""
    names = (path.parent.name for path in root.glob(f"*/{MANIFEST}"))
    return sorted(name for name in names if re.fullmatch(r"[\w.-]+", name))


def read(folder: Path) -> Identity:
    """Reads a person; raises ValueError if the folder holds none that can be used here."""
    try:
        content = (folder / MANIFEST).read_bytes()
        about = json.loads(content) if len(content) <= MAX_MANIFEST else {}
        parts = about["parts"]
        is_ours = about["format"] == FORMAT and about["format_version"] in FORMAT_VERSIONS
        names = [*filter(None, [parts["embedding"]]), *parts["loras"], *parts["adapter"]]
        # Names that lead nowhere else.
        is_ours &= all(re.fullmatch(r"(?:[\w-]+/)?[\w-]+\.safetensors", name) for name in names)
        digests = dict(about["sha256"])
        widths = [int(width) for width in about.get("text_widths", [about["text_width"]])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read: {error!r}") from error
    if not is_ours:
        raise ValueError(f"{folder} was not written by this version of idea-export")
    if "comfyui" not in about["clients"] or not parts["embedding"]:
        raise ValueError(f"{folder} was exported for other programs: use --to comfyui or --to all")
    for name in names:
        path = folder / name
        if not path.is_file() or sha256(path) != digests.get(name):
            raise ValueError(f"{path} is missing or another file: copy the whole folder again")
    tensors = {}
    for name in parts["adapter"]:
        tensors |= load_file(folder / name)
    loras = [folder / name for name in parts["loras"]]
    adapters = adapters_of(tensors, widths, folder) if parts["adapter"] else []
    return Identity(folder, parts["embedding"], loras, adapters, widths)


def adapters_of(tensors: dict, widths: list[int], folder: Path) -> list[dict]:
    """The adapters of one text encoder, or of SDXL's two, whose names begin with the encoder's."""
    found = [tensors]
    if len(widths) > 1:
        found = [
            {k.removeprefix(f"{of}."): v for k, v in tensors.items() if k.startswith(f"{of}.")}
            for of in ENCODERS
        ]
    for adapter, width in zip(found, widths, strict=True):
        check_adapter(adapter, width, folder)
    return found


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_adapter(adapter: dict, width: int, folder: Path) -> None:
    """Raises ValueError unless an adapter has all tensors, for texts of this width."""
    want = {"scale": ()}
    for layer in ("to_q", "to_k", "to_v", "to_out"):
        want |= {f"attention.{layer}.weight": (width, width), f"attention.{layer}.bias": (width,)}
    got = {name: tuple(value.shape) for name, value in adapter.items()}
    face = got.pop("face", ())
    if got != want or len(face) != 2 or face[1] != width or width % HEADS:
        raise ValueError(f"the adapter of {folder} is damaged: export again")


def contribution(adapter: dict, context: torch.Tensor) -> torch.Tensor:
    """What the ID-Adapter adds to a text condition [B, T, D]: attention over the text and the face,
    read at the text's positions."""
    tensors = {name: value.to(context.device, torch.float32) for name, value in adapter.items()}
    text = context.to(torch.float32)

    def layer(name, x):
        weight, bias = (tensors[f"attention.{name}.{kind}"] for kind in ("weight", "bias"))
        return torch.nn.functional.linear(x, weight, bias)

    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)

    face = tensors["face"].expand(len(text), *tensors["face"].shape)
    joined = torch.cat([text, face], dim=1)
    query = heads(layer("to_q", text))
    key, value = heads(layer("to_k", joined)), heads(layer("to_v", joined))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(text.shape)
    return (tensors["scale"] * layer("to_out", mixed)).to(context.dtype)
