"""The file of a shared ID-Enhancer: `enhancer/enhancer.safetensors` in a checkpoint's folder.

Tensors `enhancer/...`, `adapter/...`, `kv/...`, `start`, `scale` and `names` are a shared tree (see
`idea_jax.method.shared`); the metadata say what they are for and how they were made, and never
whose pictures it was made of. For SDXL all but `kv` is there for each text encoder, such as
`start/clip_l` and `start/clip_g`. A file may come from anybody: nothing is believed that can be
seen from the tensors.
"""

import hashlib
import json
import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from idea_jax import pytrees
from idea_jax.errors import InputError
from idea_jax.formats import enhancer_contents as contents
from idea_jax.method import condition, shared
from idea_jax.models import hub, sd
from idea_jax.pytrees import tree_digest
from idea_jax.runtime.files import write_tensors

log = logging.getLogger(__name__)

FILE = Path(hub.ENHANCER)  # inside a checkpoint's folder
FORMAT = "idea_jax.enhancer"
# 2: for SDXL, with most parts twice; 3: with a basis, for whichever.
VERSIONS = (1, 2, 3)
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
WRITTEN_AS = ("float32", "float16", "bfloat16")

# Far above what Stable Diffusion 2.1's needs (50 MB, 100 tensors), far below harm.
MAX_BYTES = 1_000_000_000
MAX_HEADER = 1_000_000
ADVICE = (
    "take one that was trained for this checkpoint, its recogniser (--face_model, or the one that "
    "wrote --face_embeddings) and as many tokens, or --enhancer none"
)


class EnhancerError(InputError, ValueError):
    """A file of a shared ID-Enhancer cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Enhancer:
    """A shared ID-Enhancer and where it comes from.

    Attributes:
      config: what its networks look like.
      shared: the tree of float32 NumPy arrays.
      about: keys of `contents.ABOUT`: the checkpoint (`base_weights` is `tree_digest` of its
        `cross_kv`) and the recogniser (SHA-256 of its file) that it was trained for, on how many
        people and pictures from where, and under what licence.
      sha256: of its file, hexadecimal; None before it is written.
    """

    config: shared.EnhancerConfig
    shared: shared.Shared
    about: dict
    sha256: str | None = None


def find(option: str, checkpoint_folder: Path) -> Path | None:
    """The file that `--enhancer` means: "auto" (the checkpoint's own, if it has one), "none", or
    the path of a file."""
    if option == "none":
        return None
    if option != "auto":
        return Path(option)
    own = Path(checkpoint_folder) / FILE
    return own if own.is_file() else None


def write(
    path: str | Path,
    config: shared.EnhancerConfig,
    tree: shared.Shared,
    about: dict,
    *,
    dtype: str = "float32",
) -> None:
    """Writes a shared tree; an earlier file at `path` stays whole if anything fails.

    Args:
      tree: of `method.shared.init_shared`, trained or not.
      about: keys of `contents.ABOUT`, and more if there is more to say; no paths, no names.
      dtype: float32, float16 or bfloat16, of the tensors in the file.

    Raises:
      EnhancerError: a value is not finite (in that dtype), or a tensor or a key of `about` is
        missing or of another form.
      WriteError: the disk is full, or the place cannot be written to.
    """
    if dtype not in WRITTEN_AS:
        raise EnhancerError(f"an enhancer is written as {', '.join(WRITTEN_AS)}, got {dtype!r}")
    kind = np.dtype(jnp.dtype(dtype))
    with np.errstate(over="ignore"):  # found below, as what is not finite
        tensors = {
            name: np.array(leaf, kind, order="C")
            for name, leaf in pytrees.flatten(tree).items()
            if config.basis or name not in contents.BASES
        }
    problems = contents.wrong_config(config) or [
        *contents.wrong_about(about),
        *contents.wrong_tensors(config, tensors),
    ]
    if problems:
        raise EnhancerError(f"{path} was not written: {contents.listed(problems)}")
    about_config = asdict(config)
    for name in ("dim_2", "basis"):
        if not about_config[name]:  # what files without it do not mention
            del about_config[name]
    description = {"format_version": version_of(config), "config": about_config, "about": about}
    write_tensors(path, tensors, {FORMAT: json.dumps(description)})


def read(path: str | Path) -> Enhancer:
    """Reads what `write` wrote, with float32 arrays.

    Raises:
      EnhancerError: the file is missing, cut, changed, hostile, or of another kind or version.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise EnhancerError(
            f"the ID-Enhancer {path} cannot be read ({error.strerror}); expected a file that "
            "python -m idea_jax.train_enhancer wrote"
        ) from error
    try:
        config, tensors, about = parse(content)
    except EnhancerError as error:
        raise EnhancerError(
            f"{path} cannot be used as an ID-Enhancer: {error}; expected a file that "
            "python -m idea_jax.train_enhancer wrote: download or write it again"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    return Enhancer(config, pytrees.unflatten(tensors), about, digest)


def read_needed(path: Path | None, sha256: str, who: Any, how: str) -> Enhancer:
    """Reads the shared ID-Enhancer that somebody was trained with.

    Args:
      path: where it may be; None where none was found.
      sha256: of its file.
      who: the file of the person; how: the way to name another enhancer. Both for messages.

    Raises:
      EnhancerError: there is none, it cannot be used, or it is another one.
    """
    if path is None:
        raise EnhancerError(
            f"{who} needs the ID-Enhancer that it was trained with (its file has the SHA-256 "
            f"{sha256}), and there is no {FILE} in the folder of this checkpoint, or none was to "
            "be used",
            advice=f"; give its file with {how}",
        )
    enhancer = read(path)
    refuse_another(enhancer, path, sha256, who, how)
    return enhancer


def refuse_another(enhancer: Enhancer, path: Path, sha256: str, who: Any, how: str) -> None:
    """Raises EnhancerError unless an enhancer is the one that somebody was trained with.

    Args:
      path: of the enhancer; the others as of `read_needed`.
    """
    if enhancer.sha256 != sha256:
        raise EnhancerError(
            f"{who} was trained with the ID-Enhancer whose file has the SHA-256 {sha256}, and "
            f"{path} is another one (SHA-256 {enhancer.sha256})",
            advice=f"; give the right file with {how}, or train again with this one",
        )


def parse(content: bytes) -> tuple[shared.EnhancerConfig, dict[str, np.ndarray], dict]:
    """Config, float32 tensors by name, and `about` of the bytes of a file.

    Raises:
      EnhancerError: they are no such file; the message does not name it.
    """
    if len(content) > MAX_BYTES:
        raise EnhancerError(f"it is larger than {MAX_BYTES // 1_000_000} MB")
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(MAX_HEADER, len(content) - 8):
        raise EnhancerError("it is damaged, or no safetensors file")
    try:
        header = json.loads(content[8 : 8 + length], object_pairs_hook=without_repetition)
        description = json.loads(
            header["__metadata__"][FORMAT], object_pairs_hook=without_repetition
        )
        version = description["format_version"]
        if version not in VERSIONS:
            known = ", ".join(map(str, VERSIONS))
            raise EnhancerError(
                f"it has format version {version}, expected {known}, so that another idea_jax "
                "wrote it, which can be installed to read it"
            )
        config, about = shared.EnhancerConfig(**description["config"]), description["about"]
        if version != version_of(config):
            sizes = f"its dim_2 is {config.dim_2} and its basis has {config.basis} directions"
            raise EnhancerError(f"it has format version {version}, {sizes}")
    except EnhancerError:
        raise
    # RecursionError: deeply nested JSON.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise EnhancerError(
            f"it does not describe itself as one ({type(error).__name__})"
        ) from error
    problems = contents.wrong_config(config) or contents.wrong_about(about)
    if problems:
        raise EnhancerError(contents.listed(problems))
    try:
        entries = dict(safetensors.deserialize(content))
        tensors = {name: to_float32(entry) for name, entry in entries.items()}
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise EnhancerError(f"it is damaged ({error})") from error
    problems = contents.wrong_tensors(config, tensors)
    if problems:
        raise EnhancerError(contents.listed(problems))
    if not config.basis:
        for name, D in zip(
            contents.BASES[1:] if config.dim_2 else contents.BASES[:1], config.widths, strict=True
        ):
            tensors[name] = np.zeros((0, config.num_tokens, D), np.float32)
    return config, tensors, about


def check(
    enhancer: Enhancer,
    model: sd.StableDiffusion,
    where: Any,
    *,
    face_model: str | None,
    num_tokens: int | None = None,
    advice: str = ADVICE,
) -> None:
    """Refuses an enhancer that is for another kind of checkpoint, recogniser, or pseudo tokens.

    Args:
      where: what to call it in messages.
      face_model: SHA-256 of the recogniser that embeds the faces; None if none is embedded.
      num_tokens: that are asked for; None if nothing is.
      advice: what can be done, for the message.

    Raises:
      EnhancerError: with all that differs.
    """
    config, problems = enhancer.config, []
    widths = [text.hidden_size for text in model.encoders]
    if [*config.widths] != widths:
        theirs, ours = (" and ".join(map(str, some)) for some in (config.widths, widths))
        problems.append(f"its text width is {theirs}, this checkpoint's is {ours}")
    else:
        method = shared.person_method(config, kv="low_rank", kv_rank=config.kv_rank)
        wanted = jax.eval_shape(
            lambda key: condition.init_kv(model, method, key), jax.random.key(0)
        )
        want = {name: leaf.shape for name, leaf in pytrees.flatten(wanted).items()}
        got = {name: leaf.shape for name, leaf in pytrees.flatten(enhancer.shared["kv"]).items()}
        if want != got:
            differ = sorted(n for n in want.keys() | got.keys() if want.get(n) != got.get(n))
            problems.append(
                f"{len(differ)} of its keys' and values' deltas do not fit the UNet of this "
                f"checkpoint, such as {differ[0]}: {got.get(differ[0])}, expected "
                f"{want.get(differ[0])}"
            )
    own = enhancer.about["face_model"]
    if face_model is not None and face_model != own:
        problems.append(
            f"it knows the faces of the recogniser with the SHA-256 {own}, and the one used here "
            f"has {face_model}"
        )
    if num_tokens is not None and num_tokens != config.num_tokens:
        problems.append(
            f"it predicts {config.num_tokens} pseudo tokens, and {num_tokens} are asked for"
        )
    if problems:
        raise EnhancerError(
            f"the ID-Enhancer {where} (for {enhancer.about['base_model']}) does not fit: "
            f"{contents.listed(problems)}",
            advice=f"; {advice}",
        )


def is_for_weights(enhancer: Enhancer, digests: Collection[str]) -> bool:
    """Whether it was trained on these weights; on others of the same kind it can be used, too.

    Args:
      digests: `pytrees.tree_digest` of the `cross_kv`, of each compute type that it may have
        been trained with.
    """
    return enhancer.about["base_weights"] in digests


def version_of(config: shared.EnhancerConfig) -> int:
    """The format version of a file."""
    return 3 if config.basis else 2 if config.dim_2 else 1


def check_about(about: dict) -> None:
    """Raises EnhancerError where `write` would refuse what is said of an enhancer."""
    if problems := contents.wrong_about(about):
        raise EnhancerError(
            f"an ID-Enhancer cannot be described so: {contents.listed(problems)}; a checkpoint's "
            "folder can be renamed, and --data prepared again"
        )


def to_float32(entry: dict) -> np.ndarray:
    """One entry of `safetensors.deserialize` as float32.

    Raises:
      ValueError: it is of another type.
    """
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"it has values of type {entry['dtype']}, expected {', '.join(DTYPES)}")
    values = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
    return values.astype(np.float32).reshape(entry["shape"])


def without_repetition(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object; a key that stands in it twice is an error."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is repeated")
    return values


def introduce(path: Path, enhancer: Enhancer) -> str:
    """What a user should know of a shared ID-Enhancer, in a line."""
    about = enhancer.about
    return (
        f"shared ID-Enhancer: {path}, trained on {about['people']} people for "
        f"{about['base_model']}; {about['licence']}"
    )


def warn_of_weights(enhancer: Enhancer, frozen: sd.Frozen, name: str) -> None:
    """Says if a shared ID-Enhancer was trained on other weights than these.

    Args:
      frozen: in bfloat16 nothing is said, as its digest may be that of the float32 weights.
      name: of the checkpoint.
    """
    kernels = jax.device_get(frozen.cross_kv)
    if jax.tree.leaves(kernels)[0].dtype != np.float32:
        return
    types = (kernels, pytrees.cast(kernels, jnp.bfloat16))
    if not is_for_weights(enhancer, [tree_digest(tree) for tree in types]):
        log.warning(
            "the shared ID-Enhancer was trained for %s, on other weights than those of %s: people "
            "may be less like themselves",
            enhancer.about["base_model"],
            name,
        )
