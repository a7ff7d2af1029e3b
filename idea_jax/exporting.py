"""Exporting a person: an identity in, a folder for other programs out, and perhaps an upload."""

import argparse
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from idea_jax import publish
from idea_jax.data.tokenizer import word_check
from idea_jax.formats import enhancer as enhancers
from idea_jax.formats import exported, learned_embeds
from idea_jax.formats.exported import ExportError, Origin
from idea_jax.formats.identity import Identity, check_identity, read_identity
from idea_jax.method import shared
from idea_jax.method.portable import Portable
from idea_jax.models import hub, sd
from idea_jax.runtime.files import WriteError, atomic_write, file_digest, write_together

log = logging.getLogger(__name__)

README = publish.CARD
TAGS = ("textual_inversion", "lora")


def export(args: argparse.Namespace) -> Path:
    """Exports a person as the command line says; returns the folder.

    Args:
      args: of `idea_jax.export`; `to` are the programs.

    Raises:
      InputError: the identity, the checkpoint or the enhancer cannot be used, the folder holds
        something else, or an upload failed.
      FileNotFoundError: there is no identity.
    """
    path = Path(args.identity)
    if path.is_dir():
        path = path / "identity.safetensors"
    identity = read_identity(path)
    digest = file_digest(path)
    folder, out = checkpoint_of(args, identity, path), Path(args.out)
    earlier = occupant(out, digest, overwrite=args.overwrite)
    enhancer = None
    if identity.needs_enhancer:
        file = Path(args.enhancer) if args.enhancer else folder and enhancers.find("auto", folder)
        enhancer = enhancers.read_needed(file, identity.enhancer, path, "--enhancer FILE")
    elif args.enhancer:
        log.warning("--enhancer has no effect: %s needs no shared ID-Enhancer", path)
    ours = shared.frozen_part(enhancer.shared) if enhancer else None
    person = exported.person_of(identity, ours, path)
    origin = Origin(
        name=name_of(identity, path, folder),
        placeholder=identity.placeholder,
        base_model=identity.base_model,
        revision=identity.revision,
        profile=identity.method.profile,
        steps=identity.steps,
        seed=identity.seed,
        identity=digest,
        enhancer=identity.enhancer,
    )
    with write_together(out) as temporary:
        manifest = exported.write(temporary, person, origin, args.to)
        text = readme(manifest, person, out.resolve().name)
        with atomic_write(temporary / README) as file:
            file.write_text(text, encoding="utf-8")
    written = [*exported.files_of(manifest["parts"]), exported.MANIFEST, README]
    remove_others(out, earlier, written)
    log.info("%s: what to type is in %s", identity.placeholder, out / README)
    if args.push_to_hub:
        upload(args, out, text, written)
    return out


def checkpoint_of(args: argparse.Namespace, identity: Identity, path: Path) -> Path | None:
    """The folder of the checkpoint that a person is exported for, if it is known; looks whether the
    person fits it.

    Raises:
      CheckpointNotFound: there is none of the name that was given.
      IdentityError: the person was learned on another kind of checkpoint.
    """
    name = args.pretrained_model_name_or_path
    if name is None and identity.base_model != hub.MINI:
        return None
    found = hub.resolve(name or hub.MINI)
    check_identity(identity, sd.read_configs(found.folder, "float32"), path)
    if identity.base_model != found.name:
        log.warning(
            "the identity was learned on %s, and --pretrained_model_name_or_path is %s",
            identity.base_model,
            found.name,
        )
    return found.folder


def name_of(identity: Identity, path: Path, folder: Path | None) -> str:
    """What is typed for a person in programs where it is the name of a file: as their training
    chose it, or as it would have.

    Without a checkpoint, whose vocabulary is not known, the name is one that is no word.
    """
    beside = list((path.parent / "webui").glob("*.safetensors"))
    if len(beside) == 1 and re.fullmatch(r"[\w-]+", beside[0].stem):
        return beside[0].stem
    is_word = word_check(folder / "tokenizer") if folder else lambda text: True
    return learned_embeds.trigger_of(identity.placeholder, is_word)


def occupant(out: Path, digest: str, *, overwrite: bool) -> list[str]:
    """Files of an earlier export in a folder, which the next one replaces.

    Args:
      digest: SHA-256 of the identity file.
      overwrite: whether another person may be replaced.

    Raises:
      ExportError: it holds another person, or something that is no export.
    """
    if not out.exists():
        return []
    if not out.is_dir():
        raise ExportError(f"{out} is a file; --out names a folder")
    try:
        there = [entry.name for entry in out.iterdir()]
    except OSError as error:
        raise WriteError(f"{out} cannot be used ({error.strerror}); name another --out") from error
    if not there:
        return []
    if exported.MANIFEST not in there:
        raise ExportError(
            f"{out} holds other files ({sorted(there)[0]} is one of {len(there)}); --out names a "
            "new or empty folder, or one of an earlier export of the same person"
        )
    try:
        about = exported.read_manifest(out)
    except ExportError:
        if overwrite:
            return []
        raise
    if about["identity"] != digest and not overwrite:
        raise ExportError(
            f"{out} holds another identity ({about['name']}, SHA-256 {about['identity'][:12]}..., "
            f"and this is {digest[:12]}...): choose another --out, or replace it with --overwrite"
        )
    return exported.files_of(about["parts"])


def remove_others(out: Path, earlier: Sequence[str], written: Sequence[str]) -> None:
    """Removes what an earlier export left that this one has no file for.

    Raises:
      WriteError: something cannot be removed.
    """
    for name in set(earlier) - set(written):
        try:
            (out / name).unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"cannot remove {out / name} of an earlier export") from error
    for folder in ("embeddings", "loras"):
        path = out / folder
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def upload(args: argparse.Namespace, out: Path, text: str, written: Sequence[str]) -> None:
    """Uploads an exported folder, unless the Hub's library is told to use no network.

    Raises:
      PublishError: the upload failed.
    """
    if publish.is_offline():
        log.warning(
            "HF_HUB_OFFLINE is set, so that nothing was uploaded; to do it later: %s",
            publish.by_hand(out, args.push_to_hub, written),
        )
        return
    where = publish.push(out, text, args.push_to_hub, args.hub_token, written)
    log.info("uploaded to %s", where)


def readme(manifest: dict, person: Portable, folder: str) -> str:
    """What to type in each program, as the card of a repository.

    Args:
      manifest: what `identity.json` holds; folder: the name of the export's folder.
    """
    name, parts, clients = manifest["name"], manifest["parts"], manifest["clients"]
    head = publish.head(manifest["base_model"], name, *TAGS)
    revision = f" at `{manifest['revision']}`" if manifest["revision"] else ""
    said = [
        f"# {name}",
        f"One person, learned with idea_jax ([ID-EA](https://arxiv.org/abs/2507.11990), profile "
        f"`{manifest['profile']}`, {manifest['steps']} steps) for `{manifest['base_model']}`"
        f"{revision} ({manifest['family']}, text width {' + '.join(map(str, person.widths))}).",
        "**These files make pictures of a real person.** Use them only if this person agreed to "
        "it, and for nothing that the person would not want. No file holds a face embedding. What "
        "is here was learned from a face: treat it as biometric data.",
    ]
    if "diffusers" in clients:
        said.append(DIFFUSERS.format(folder=folder))
        if person.is_of_sdxl:
            said.append(diffusers_lines(manifest, folder))
    if "a1111" in clients:
        said.append(a1111_lines(name, parts, person))
    if "comfyui" in clients:
        said.append(comfyui_lines(name, parts))
    said += [what_is_lost(clients, person), publish.terms(manifest["base_model"])]
    return head + "\n\n".join(filter(None, said)) + "\n"


DIFFUSERS = """\
## diffusers

`pip install` idea_jax beside diffusers. `pipe` is a pipeline of the base model, `{folder}` is the
path of this folder, and in prompts `{{}}` is the person:

```
from idea_jax.diffusers import load_identity; load_identity(pipe, "{folder}")
pipe("a photo of {{}} on the beach").images[0].save("picture.png")
```"""

A1111 = """\
## AUTOMATIC1111, Forge

Copy `embeddings/` into `embeddings/`{loras}. Then type:

```
a photo of {word} on the beach
```"""

# SDXL's pipeline has two text encoders, whose tokens are in two files.
DIFFUSERS_ALONE = """\
Without idea_jax beside it, diffusers draws the whole person but the adapter:

```
for file, suffix in (("learned_embeds.safetensors", ""), ("learned_embeds_2.safetensors", "_2")):
    pipe.load_textual_inversion(
        "{folder}", weight_name=file, token="{placeholder}",
        text_encoder=getattr(pipe, "text_encoder" + suffix),
        tokenizer=getattr(pipe, "tokenizer" + suffix),
    )
pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id{loras}
```

With the line about `eos_token_id` the second text encoder sums up a text at its end; without it,
at the person's last token."""

COMFYUI = """\
## ComfyUI

Copy `integrations/comfyui` of idea_jax into `custom_nodes/idea_jax`, and this folder to
`models/identities/{name}`. The node *Load identity* takes model, clip, `{name}`, and the text:

```
a photo of {{}} on the beach
```

Without the node: `embeddings/` into `models/embeddings/`, and type `embedding:{name}`{loras}."""


def tags_of(parts: dict) -> str:
    """What loads the LoRAs in a prompt of AUTOMATIC1111."""
    return "".join(f" <lora:{Path(name).stem}:1>" for name in parts["loras"])


def a1111_lines(name: str, parts: dict, person: Portable) -> str:
    loras = " and `loras/` into `models/Lora/`" if parts["loras"] else ""
    return A1111.format(loras=loras, word=name + tags_of(parts))


def diffusers_lines(manifest: dict, folder: str) -> str:
    files = manifest["parts"]["peft_loras"]
    loras = [f'\npipe.load_lora_weights("{folder}", weight_name="{name}")' for name in files]
    placeholder = manifest["placeholder"]
    return DIFFUSERS_ALONE.format(folder=folder, placeholder=placeholder, loras="".join(loras))


def comfyui_lines(name: str, parts: dict) -> str:
    loras = (
        "; `loras/` into `models/loras/`, each through *LoraLoaderModelOnly*: the whole person but "
        "the adapter"
    )
    return COMFYUI.format(name=name, loras=loras if parts["loras"] else "")


def what_is_lost(clients: Sequence[str], person: Portable) -> str:
    """Where pictures of other programs differ from those of idea_jax."""
    has_kv, has_adapter = bool(person.own or person.shared), person.adapter is not None
    if not has_kv and not has_adapter:
        return (
            "This person draws with the tokens alone, so nothing is lost in any program but the "
            "ways in which programs differ themselves (weights of words, samplers)."
        )
    said = ["## What other programs leave out", ""]
    if "diffusers" in clients:
        said.append("* diffusers with `load_identity`: nothing.")
    if "comfyui" in clients:
        said.append("* ComfyUI with the node: nothing; without it, the ID-Adapter.")
    if "a1111" in clients:
        lost = "the ID-Adapter; no LoRA can say it" if has_adapter else "nothing"
        said.append(f"* AUTOMATIC1111: {lost}.")
    return "\n".join(said)
