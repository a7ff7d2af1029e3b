"""A learned person on the Hugging Face Hub: the card, and the upload that a user asked for."""

import logging
from pathlib import Path

from idea_jax.errors import InputError
from idea_jax.runtime.files import atomic_write

log = logging.getLogger(__name__)

# What is uploaded. Not the settings, which hold paths, and not what is said of the run, which has
# the names of photos.
PATTERNS = (
    "README.md",
    "identity.safetensors",
    "learned_embeds.safetensors",
    "webui/*.safetensors",
)
CARD = "README.md"
_TEXT = """\
# {token}

One person, learned with idea_jax ([ID-EA](https://arxiv.org/abs/2507.11990), profile `{profile}`,
{steps} steps) for `{base_model}`.

**These files make pictures of a real person.** They were uploaded by somebody who said that this
person agreed to it. Use them for nothing that the person would not want. {face}

| file | what for |
|---|---|
| `identity.safetensors` | all that was learned, for idea_jax |
| `learned_embeds.safetensors` | the words `{token}`, for diffusers' `load_textual_inversion` |
| `webui/` | the same for AUTOMATIC1111 and ComfyUI; the file's name is what to type |

The terms of the base model and of the face model apply, on top of this person's rights.
"""
_FACE = {
    True: "`identity.safetensors` holds a face embedding, which is biometric data.",
    False: "They hold no face embedding.",
}


class PublishError(InputError, ValueError):
    """An upload did not succeed; all results are on the disk."""


def card(token: str, base_model: str, profile: str, steps: int, *, holds_face: bool) -> str:
    """Returns the model card of a person.

    Args:
      token: the placeholder.
      base_model: Hub id or name of the checkpoint.
      holds_face: whether the identity file holds a face embedding.
    """
    from huggingface_hub import ModelCardData

    is_id = base_model.count("/") == 1
    about = ModelCardData(
        base_model=base_model if is_id else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license="other",
        license_name="terms-of-the-base-model",
        license_link=f"https://huggingface.co/{base_model}" if is_id else None,
        tags=["text-to-image", "stable-diffusion", "textual_inversion", "id-ea", "idea_jax"],
        instance_prompt=token,
    )
    said = _TEXT.format(
        token=token, base_model=base_model, profile=profile, steps=steps, face=_FACE[holds_face]
    )
    return f"---\n{about.to_yaml()}\n---\n\n{said}"


def push(folder: Path, text: str, repository: str, token: str | None = None) -> str:
    """Writes the card of a person and uploads their files to a private repository; returns its
    address.

    Args:
      folder: with a person's results.
      text: of the card.
      repository: NAME or OWNER/NAME; it is made if there is none.
      token: of the Hub; None for the one that `hf auth login` keeps.

    Raises:
      WriteError: the card cannot be written.
      PublishError: the upload failed.
    """
    import huggingface_hub

    with atomic_write(folder / CARD) as path:
        path.write_text(text, encoding="utf-8")
    api = huggingface_hub.HfApi(token=token)
    try:
        made = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=list(PATTERNS),
            commit_message="A person learned with idea_jax",
        )
    except Exception as error:  # of the Hub's library and of the HTTP library under it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PublishError(
            f"uploading to {repository} failed ({reason[0][:300]}). All results are in {folder}; "
            f"see whether the network and `hf auth whoami` are as they should be, then upload with "
            f"`hf upload {repository} {folder} --include {' '.join(PATTERNS)}`"
        ) from error
    return str(made)
