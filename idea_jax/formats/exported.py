"""A person as other programs load them: a folder of small safetensors files and `identity.json`.

`learned_embeds.safetensors` are the tokens for diffusers, `embeddings/NAME.safetensors` for
AUTOMATIC1111 and ComfyUI. `loras/*.safetensors` are K/V deltas under kohya's names, which all three
read. `adapter.safetensors` is what the ID-Adapter adds to the text condition; no LoRA can say it.
Of SDXL there are tokens and an adapter for each text encoder (diffusers' are in two files); kohya's
names are those of the original layout, and diffusers has the deltas under its own names besides.
Parts of a shared ID-Enhancer are files of their own, the same for everybody. `identity.json` says
what belongs together. No file holds a face embedding.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from idea_jax.errors import InputError
from idea_jax.formats import learned_embeds
from idea_jax.formats.identity import Identity, IdentityError
from idea_jax.method.modules import NUM_HEADS
from idea_jax.method.portable import Deltas, Portable, PortableAdapter, portable
from idea_jax.models.bundle import ENCODERS
from idea_jax.models.original import unet_name
from idea_jax.runtime.files import file_digest, write_json, write_tensors
from idea_jax.runtime.versions import versions

FORMAT = "idea_jax.export"
FORMAT_VERSIONS = {False: 1, True: 2}  # of SDXL or not
MANIFEST = "identity.json"
ADAPTER = "adapter.safetensors"
LORA = "pytorch_lora_weights.safetensors"  # as diffusers calls it, whose loader looks for it

MAX_MANIFEST = 100_000
MAX_BYTES = 4_000_000_000  # whole K/V deltas of SDXL are 2.2 GB
# The family by the widths of the text encoders.
FAMILIES = {(768,): "SD 1.x", (1024,): "SD 2.x", (768, 1280): "SDXL"}
LAYERS = ("to_q", "to_k", "to_v", "to_out")
_LAYER = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)\.(transformer_blocks\.\d+"
    r"\.attn2\.to_[kv])",
    re.ASCII,
)
# The names of a layer in files: kohya's, and those of diffusers with peft's for the factors.
_KOHYA = re.compile(
    r"lora_unet_(?:(down|up)_blocks_(\d+)|(mid_block))_attentions_(\d+)_transformer_blocks_(\d+)"
    r"_attn2_to_([kv])\.lora_(down|up)\.weight",
    re.ASCII,
)
_PEFT = re.compile(rf"unet\.({_LAYER.pattern})\.lora_([AB])\.weight", re.ASCII)


class ExportError(InputError, ValueError):
    """A person cannot be exported, or an exported folder cannot be used."""


@dataclass(frozen=True)
class Origin:
    """What made an exported folder.

    Attributes:
      name: what is typed for the person, and what files are called; letters, digits, `_` and `-`.
      placeholder: the person's word in training.
      base_model, revision, profile, steps, seed: as of an identity.
      identity: SHA-256 of the identity file.
      enhancer: SHA-256 of the file of the shared ID-Enhancer, if one draws together with it.
    """

    name: str
    placeholder: str
    base_model: str
    revision: str | None
    profile: str
    steps: int
    seed: int
    identity: str
    enhancer: str | None


def write(folder: Path, person: Portable, origin: Origin, clients: Sequence[str]) -> dict:
    """Writes a person's files into an empty folder; returns what is in `identity.json`.

    Args:
      clients: some of "diffusers", "a1111" and "comfyui".

    Raises:
      ExportError: a value is not finite.
      WriteError: the disk is full, or the place cannot be written to.
    """
    about = {k: getattr(origin, k) for k in ("base_model", "revision", "profile", "steps", "seed")}
    own = {FORMAT: json.dumps({**about, "identity": origin.identity, "versions": versions()})}
    theirs = {
        FORMAT: json.dumps(
            {"base_model": origin.base_model, "enhancer": origin.enhancer, "versions": versions()}
        )
    }
    parts: dict[str, Any] = {"tokens": None, "embedding": None, "loras": [], "adapter": []}
    is_xl = person.is_of_sdxl
    if is_xl:
        parts |= {"tokens_2": None, "peft_loras": []}
    if "diffusers" in clients:
        parts["tokens"] = learned_embeds.FILE_NAME
        learned_embeds.write(folder / parts["tokens"], origin.placeholder, person.tokens, own)
        if is_xl:
            parts["tokens_2"] = learned_embeds.second_of(parts["tokens"]).name
    if set(clients) != {"diffusers"}:
        parts["embedding"] = f"embeddings/{origin.name}.safetensors"
        learned_embeds.write_webui(folder / parts["embedding"], person.tokens, own)
    shared_name = f"idea-enhancer-{(origin.enhancer or '')[:8]}"
    # Not called as the embedding: ComfyUI looks for that in sub-folders, too.
    for name, own_name, deltas, note in (
        (f"{origin.name}-kv", LORA, person.own, own),
        (f"{shared_name}-kv", f"{shared_name}-lora.safetensors", person.shared, theirs),
    ):
        if deltas and (not is_xl or set(clients) != {"diffusers"}):
            parts["loras"].append(f"loras/{name}.safetensors")
            write_lora(folder / parts["loras"][-1], deltas, person.widths, note)
        if deltas and is_xl and "diffusers" in clients:
            parts["peft_loras"].append(own_name)
            write_peft(folder / own_name, deltas, note)
    if person.adapter is not None and set(clients) != {"a1111"}:
        face = {f"{of}face": adapter.face for of, adapter in person.adapters.items()}
        rest = {
            f"{of}{name}": value
            for of, adapter in person.adapters.items()
            for name, value in network_tensors(adapter).items()
        }
        parts["adapter"] = [ADAPTER]
        if person.shares_adapter:
            parts["adapter"].append(f"{shared_name}.safetensors")
            write_checked(folder / parts["adapter"][1], rest, theirs)
            rest = {}
        write_checked(folder / ADAPTER, face | rest, own, private=True)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSIONS[is_xl],
        "name": origin.name,
        "placeholder": origin.placeholder,
        "clients": list(clients),
        "family": FAMILIES.get(tuple(person.widths), "other"),
        "text_width": sum(person.widths),
        **({"text_widths": person.widths} if is_xl else {}),
        "num_tokens": len(person.each_tokens[0]),
        **about,
        "identity": origin.identity,
        "enhancer": origin.enhancer,
        "kv_acts_on": "both halves of guidance",
        "parts": parts,
        "sha256": {name: file_digest(folder / name) for name in files_of(parts)},
        "versions": versions(),
        "licence": "the base model's and the face model's terms of use apply",
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def person_of(identity: Identity, shared: Mapping | None, where: Any) -> Portable:
    """What draws the person of an identity file; looks whether the parts belong together.

    Args:
      shared: as of `method.portable.portable`.
      where: the file, for messages.

    Raises:
      IdentityError: a part is missing, or of another shape.
    """
    try:
        person = portable(identity.method, identity.trainable, identity.given, shared)
        check(person, where)
    except Exception as error:  # whatever networks and NumPy say of arrays that are not theirs
        why = str(error).partition("\n")[0][:200]
        raise IdentityError(
            f"{where} is damaged ({type(error).__name__}: {why}); train again"
        ) from error
    return person


def check(person: Portable, where: Any) -> None:
    """Raises ExportError unless the parts of a person belong together, and are of known names."""
    D = sum(person.widths)
    for name, (down, up) in [*person.own.items(), *person.shared.items()]:
        shapes = np.shape(down), np.shape(up)
        if not _LAYER.fullmatch(name):
            raise ExportError(f"{where} changes {name!r:.80}, which is no key or value layer")
        if {*map(len, shapes)} != {2} or shapes[0] != (shapes[1][1], D):
            raise ExportError(f"{where} is damaged at {name}: its two matrices do not fit")
    for adapter, width in zip(person.adapters.values(), person.widths, strict=False):
        adapter_of({"face": adapter.face, **network_tensors(adapter)}, width, where)


def kohya(name: str) -> str:
    """What kohya's LoRAs call a layer of the UNet of SD 1.x and 2.x."""
    return f"lora_unet_{name.replace('.', '_')}"


def kohya_of_sdxl(name: str, layers_per_block: int) -> str:
    """What kohya's LoRAs call a layer of SDXL's UNet: by the blocks of the original layout, which
    are counted through all levels.

    AUTOMATIC1111 knows no other names than these. Source: kohya-ss/sd-scripts networks/lora.py.
    """
    return f"lora_unet_{unet_name(name, layers_per_block).replace('.', '_')}"


def layers_per_block_of(names: Iterable[str]) -> int:
    """Of the UNet whose cross-attentions have these names; a block of the way up has one more."""
    found = [_LAYER.fullmatch(name).groups() for name in names]
    return max(int(number) + (way == "down") for way, _, number, _ in found if way)


def files_of(parts: Mapping[str, Any]) -> list[str]:
    """The files that `parts` of an `identity.json` names."""
    single = [parts.get(name) for name in ("tokens", "tokens_2", "embedding")]
    several = [*parts["loras"], *parts.get("peft_loras", []), *parts["adapter"]]
    return [*filter(None, single), *several]


def write_lora(
    path: Path, deltas: Deltas, widths: Sequence[int], metadata: Mapping[str, str]
) -> None:
    """Writes K/V deltas as a LoRA under kohya's names, without `.alpha`: programs then take it as
    the rank, and add `up @ down` as it is.

    AUTOMATIC1111 tells the model family by the metadata.

    Args:
      widths: of the text encoders.
    """
    about = {"ss_network_module": "networks.lora", "format": "pt"}
    if len(widths) == 1:
        about["ss_v2"] = str(FAMILIES.get(tuple(widths)) == "SD 2.x")
        names = {name: kohya(name) for name in deltas}
    else:
        about["ss_base_model_version"] = "sdxl_base_v1-0"
        layers = layers_per_block_of(deltas)
        names = {name: kohya_of_sdxl(name, layers) for name in deltas}
    tensors = {}
    for name, (down, up) in deltas.items():
        tensors[f"{names[name]}.lora_down.weight"] = down
        tensors[f"{names[name]}.lora_up.weight"] = up
    write_checked(path, tensors, {**metadata, **about})


def write_peft(path: Path, deltas: Deltas, metadata: Mapping[str, str]) -> None:
    """Writes K/V deltas as a LoRA under diffusers' names, which adds `up @ down` as it is."""
    tensors = {}
    for name, (down, up) in deltas.items():
        tensors[f"unet.{name}.lora_A.weight"] = down
        tensors[f"unet.{name}.lora_B.weight"] = up
    write_checked(path, tensors, {**metadata, "format": "pt"})


def network_tensors(adapter: PortableAdapter) -> dict[str, np.ndarray]:
    """All of an adapter but the face."""
    attention = {f"attention.{name}": value for name, value in adapter.attention.items()}
    return {"scale": np.float32(adapter.scale).reshape(()), **attention}


def write_checked(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    private: bool = False,
) -> None:
    """Writes float32 tensors.

    Raises:
      ExportError: a value is not finite.
    """
    arrays = {name: np.array(value, np.float32, order="C") for name, value in tensors.items()}
    broken = [name for name, value in arrays.items() if not np.isfinite(value).all()]
    if broken:
        raise ExportError(f"{path.name} would hold values that are not finite: {broken[0]}")
    write_tensors(path, arrays, metadata, private=private)


def read_manifest(folder: Path) -> dict:
    """What `identity.json` of an exported folder says.

    Raises:
      ExportError: there is none, it is damaged, of another version, or names files elsewhere.
    """
    path = folder / MANIFEST
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise ExportError(
            f"{folder} is no exported person: {MANIFEST} cannot be read ({error.strerror}); "
            "idea-export writes one"
        ) from error
    try:
        about = json.loads(content[:MAX_MANIFEST])
        if about["format"] != FORMAT:
            raise ExportError(f"{path} is of another program")
        known = [*FORMAT_VERSIONS.values()]
        if about["format_version"] not in known:
            raise ExportError(
                f"{path} has format version {about['format_version']}, expected "
                f"{' or '.join(map(str, known))}; export again with this idea_jax, or install the "
                "one that wrote it"
            )
        for name in files_of(about["parts"]):
            if not re.fullmatch(r"(?:[\w-]+/)?[\w-]+\.safetensors", name):
                raise ExportError(f"{path} names the file {name!r:.80}, which is no part of it")
        if not re.fullmatch(r"[\w-]+", about["name"]) or type(about["text_width"]) is not int:
            raise ExportError(f"{path} is damaged: export again")
        if not re.fullmatch(r"[0-9a-f]{64}", about["identity"]) or not about["sha256"].keys():
            raise ExportError(f"{path} is damaged: export again")
    # RecursionError: deeply nested JSON.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{path} is damaged ({type(error).__name__}): export again") from error
    return about


def read(folder: Path) -> tuple[Portable, dict]:
    """The person in an exported folder, and what `identity.json` says of them.

    Raises:
      ExportError: it was not exported for diffusers, or a file is missing, damaged or another one.
    """
    about = read_manifest(folder)
    parts = about["parts"]
    if not parts["tokens"]:
        raise ExportError(
            f"{folder} was exported for {', '.join(about['clients'])} alone; export again with "
            "--to diffusers or --to all"
        )
    for name in files_of(parts):
        path = folder / name
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ExportError(f"{path} is missing, or larger than {MAX_BYTES // 1_000_000} MB")
        if file_digest(path) != about["sha256"].get(name):
            raise ExportError(
                f"{path} is not the file that {MANIFEST} belongs to: copy the whole folder again, "
                "or export again"
            )
    (tokens,) = learned_embeds.read(folder / parts["tokens"]).values()
    if parts.get("tokens_2"):
        (second,) = learned_embeds.read(folder / parts["tokens_2"]).values()
        tokens = dict(zip(ENCODERS, (tokens, second), strict=True))
    files = parts.get("peft_loras") or parts["loras"]
    loras = {name: read_lora(folder / name) for name in files}
    deltas: Deltas = {}
    for name, own in loras.items():
        check(Portable(tokens, own), folder / name)
        for layer, pair in own.items():
            deltas[layer] = beside(deltas[layer], pair) if layer in deltas else pair
    adapter = None
    if parts["adapter"]:
        tensors: dict[str, np.ndarray] = {}
        for name in parts["adapter"]:
            tensors |= read_tensors(folder / name)
        adapter = adapters_of(tensors, Portable(tokens), folder)
    return Portable(tokens, deltas, adapter=adapter), about


def beside(first: tuple, second: tuple) -> tuple[np.ndarray, np.ndarray]:
    """The sum of two deltas."""
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]], axis=1)


def read_lora(path: Path) -> Deltas:
    """What `write_lora` wrote for SD 1.x and 2.x, or `write_peft`.

    Raises:
      ExportError: it is another file.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in read_tensors(path).items():
        if named := _PEFT.fullmatch(key):
            name, part = named[1], {"A": "down", "B": "up"}[named.groups()[-1]]
        elif named := _KOHYA.fullmatch(key):
            way, level, middle, attention, layer, letter, part = named.groups()
            block = middle or f"{way}_blocks.{level}"
            name = f"{block}.attentions.{attention}.transformer_blocks.{layer}.attn2.to_{letter}"
        else:
            raise ExportError(f"{path} has {key!r:.80}, which is no K/V delta of this project")
        found.setdefault(name, {})[part] = value
    for name, pair in found.items():
        if len(pair) < 2:
            raise ExportError(f"{path} is damaged at {name}: it lacks one of its two matrices")
    return {name: (pair["down"], pair["up"]) for name, pair in found.items()}


def adapters_of(tensors: Mapping[str, np.ndarray], person: Portable, where: Any) -> Any:
    """The adapter that an exported folder's tensors make for a person; of SDXL a dict.

    Raises:
      ExportError: one is missing, or of another shape.
    """
    if not person.is_of_sdxl:
        return adapter_of(tensors, person.widths[0], where)
    parts: dict[str, dict[str, np.ndarray]] = {name: {} for name in ENCODERS}
    for name, value in tensors.items():
        encoder, _, rest = name.partition(".")
        parts.setdefault(encoder, {})[rest] = value
    if [*parts] != [*ENCODERS]:
        raise ExportError(f"the adapter of {where} is damaged: {[*parts][-1]!r:.80}; export again")
    return {
        name: adapter_of(own, width, f"{where} ({name})")
        for (name, own), width in zip(parts.items(), person.widths, strict=True)
    }


def adapter_of(tensors: Mapping[str, np.ndarray], D: int, where: Any) -> PortableAdapter:
    """The adapter that an exported folder's tensors make.

    Raises:
      ExportError: one is missing, or of another shape.
    """
    want: dict[str, tuple] = {"scale": ()}
    for name in LAYERS:
        want |= {f"attention.{name}.weight": (D, D), f"attention.{name}.bias": (D,)}
    got = {name: value.shape for name, value in tensors.items()}
    face = got.get("face", ())
    wrong = sorted(
        name for name in want.keys() | got.keys() - {"face"} if want.get(name) != got.get(name)
    )
    if wrong or len(face) != 2 or face[1] != D or D % NUM_HEADS:
        raise ExportError(
            f"the adapter of {where} is damaged: {', '.join([*wrong, f'face {face}'][:5])}, "
            f"expected width {D}; export again"
        )
    attention = {name: tensors[f"attention.{name}"] for name in names_of_attention()}
    return PortableAdapter(tensors["face"], float(tensors["scale"]), attention)


def names_of_attention() -> list[str]:
    return [f"{name}.{kind}" for name in LAYERS for kind in ("weight", "bias")]


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, as float32.

    Raises:
      ExportError: it is damaged, or a value is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = {name: np.asarray(v, np.float32) for name, v in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ExportError(f"{path} is damaged or no safetensors file ({error})") from error
    broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        raise ExportError(f"{path} is damaged: {broken[0]} is not finite")
    return tensors
