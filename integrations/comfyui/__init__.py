"""A node for ComfyUI that draws a person whom `idea-export` wrote: see README.md."""

from pathlib import Path

import comfy.sd
import comfy.utils
import folder_paths
import torch

from . import identity as identities

ROOT = Path(folder_paths.models_dir) / "identities"

ROOT.mkdir(parents=True, exist_ok=True)
# The words of a person are found below their own folder, by `embedding:NAME/embeddings/NAME`.
folder_paths.add_model_folder_path("embeddings", str(ROOT))


class LoadIdentity:
    """Model, text encoder, person and text in; model and conditioning out."""

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "clip": ("CLIP",),
                "identity": (identities.people(ROOT), {"tooltip": f"folders in {ROOT}"}),
                # Without dynamic prompts: ComfyUI would take {} for an empty choice.
                "text": ("STRING", {"multiline": True, "default": "a photo of {}"}),
                "strength": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05}),
            }
        }

    RETURN_TYPES = ("MODEL", "CONDITIONING")
    FUNCTION = "load"
    CATEGORY = "conditioning"
    DESCRIPTION = "Draws the person where the text says {}. The conditioning is the positive one."

    @classmethod
    def IS_CHANGED(cls, identity, **_):
        return identities.sha256(ROOT / identity / identities.MANIFEST)

    def load(self, model, clip, identity, text, strength):
        if identity not in identities.people(ROOT):
            raise ValueError(f"there is no person {identity!r} in {ROOT}")
        person = identities.read(ROOT / identity)
        conditioning = encode(clip, person, text, strength)
        if not strength:
            return model, conditioning
        for path in person.loras:
            lora = comfy.utils.load_torch_file(str(path), safe_load=True)
            model, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
        return model, conditioning


def encode(clip, person, text, strength):
    """The conditioning of a text that names the person with {}."""
    if "{}" not in text:
        raise ValueError("write {} where the text names the person")
    # Spaces around it: ComfyUI takes what follows up to a space for the name.
    word = f" embedding:{person.folder.name}/{Path(person.embedding).with_suffix('').as_posix()} "
    tokens = clip.tokenize(text.replace("{}", word))
    widths = person.widths
    if len(tokens) != len(widths):
        raise ValueError(
            f"{person.folder.name} was learned with {len(widths)} text encoders, and this "
            f"checkpoint has {len(tokens)} ({', '.join(tokens)}): it is of another model family"
        )
    chunks = next(iter(tokens.values()))
    if not any(isinstance(entry[0], torch.Tensor) for chunk in chunks for entry in chunk):
        raise ValueError(
            f"the words of {person.folder.name} were not found; load the checkpoint again, or copy "
            f"{person.folder / person.embedding} into models/embeddings"
        )
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    for entry in conditioning:
        condition = entry[0]
        if condition.shape[-1] != sum(widths):
            raise ValueError(
                f"{person.folder.name} was learned for a text width of {sum(widths)}, and this "
                f"checkpoint has {condition.shape[-1]}: it is of another model family"
            )
        if person.adapters:
            # Each chunk of a long text is seen by itself, as the text encoder saw it. ComfyUI puts
            # what the encoders say side by side.
            parts = condition.reshape(len(chunks), -1, sum(widths)).split(widths, dim=-1)
            added = [
                identities.contribution(adapter, part)
                for adapter, part in zip(person.adapters, parts, strict=True)
            ]
            entry[0] = condition + strength * torch.cat(added, dim=-1).reshape(condition.shape)
    return conditioning


NODE_CLASS_MAPPINGS = {"IdeaJaxLoadIdentity": LoadIdentity}
NODE_DISPLAY_NAME_MAPPINGS = {"IdeaJaxLoadIdentity": "Load identity (idea_jax)"}
