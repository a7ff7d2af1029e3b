"""The file of a shared ID-Enhancer: `enhancer/enhancer.safetensors` in a checkpoint's folder.

Tensors `enhancer/...`, `adapter/...`, `kv/...`, `start`, `scale` and `names` are a shared tree (see
`idea_jax.method.shared`); the metadata say what they are for and how they were made, and never
whose pictures it was made of. For SDXL all but `kv` is there for each text encoder, such as
`start/clip_l` and `start/clip_g`. A file may come from anybody: nothing is believed that can be
seen from the tensors.
"""

import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from idea_jax import pytrees
from idea_jax.errors import InputError
from idea_jax.method import condition, shared
from idea_jax.method.modules import FACE_WIDTH, IDAdapter
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
LIMITS = {"dim": 8192, "num_tokens": 75, "width": 65_536, "kv_rank": 1024}
BASES = ("basis", *(f"basis/{of}" for of in sd.ENCODERS))  # which files without one do not hold
LISTED = 20  # an error that lists hundreds of tensors hides the interesting ones

# What `about` holds at least.
ABOUT = {
    "base_model": str,
    "revision": str | None,
    "base_weights": str,
    "face_model": str,
    "people": int,
    "pictures": int,
    "steps": int,
    "sources": list,
    "licence": str,
    "versions": dict,
}


class EnhancerError(InputError, ValueError):
    """A file of a shared ID-Enhancer cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Enhancer:
    """A shared ID-Enhancer and where it comes from.

    Attributes:
      config: what its networks look like.
      shared: the tree of float32 NumPy arrays.
      about: keys of `ABOUT`: the checkpoint (`base_weights` is `pytrees.tree_digest` of its
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
      about: keys of `ABOUT`, and more if there is more to say. No paths, no names of people.
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
            if config.basis or name not in BASES
        }
    problems = wrong_config(config) or [*wrong_about(about), *wrong_tensors(config, tensors)]
    problems += [f"about has a path: {text!r}" for text in texts(about) if is_path(text)]
    if problems:
        raise EnhancerError(f"{path} was not written: {listed(problems)}")
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
    problems = wrong_config(config) or wrong_about(about)
    if problems:
        raise EnhancerError(listed(problems))
    try:
        entries = dict(safetensors.deserialize(content))
        tensors = {name: to_float32(entry) for name, entry in entries.items()}
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise EnhancerError(f"it is damaged ({error})") from error
    problems = wrong_tensors(config, tensors)
    if problems:
        raise EnhancerError(listed(problems))
    if not config.basis:
        for name, D in zip(BASES[1:] if config.dim_2 else BASES[:1], config.widths, strict=True):
            tensors[name] = np.zeros((0, config.num_tokens, D), np.float32)
    return config, tensors, about


def check(
    enhancer: Enhancer,
    model: sd.StableDiffusion,
    where: Any,
    *,
    face_model: str | None,
    num_tokens: int | None = None,
) -> None:
    """Refuses an enhancer that is for another kind of checkpoint, recogniser, or pseudo tokens.

    Args:
      where: what to call it in messages.
      face_model: SHA-256 of the recogniser that embeds the faces; None if none is embedded.
      num_tokens: that are asked for; None if nothing is.

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
            f"has {face_model} (--face_model, or the recogniser that wrote --face_embeddings)"
        )
    if num_tokens is not None and num_tokens != config.num_tokens:
        problems.append(
            f"it predicts {config.num_tokens} pseudo tokens, and --n_pseudo_tokens is {num_tokens}"
        )
    if problems:
        raise EnhancerError(
            f"the ID-Enhancer {where} (for {enhancer.about['base_model']}) does not fit: "
            f"{listed(problems)}; take one that was trained for this checkpoint, or --enhancer none"
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


def wrong_config(config: shared.EnhancerConfig) -> list[str]:
    """What cannot be in a config."""
    problems = []
    if config.kind not in shared.KINDS:
        problems.append(f"its kind is {config.kind!r}, expected {', '.join(shared.KINDS)}")
    for name, most in LIMITS.items():
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= most:
            problems.append(f"its {name} is {value!r}, expected 1 to {most}")
    for name, most in {"dim_2": LIMITS["dim"], "basis": shared.LARGEST_BASIS}.items():
        value = getattr(config, name)
        if type(value) is not int or not 0 <= value <= most:
            problems.append(f"its {name} is {value!r}, expected 0 to {most}")
    for name in ("dim", "dim_2"):
        if not problems and getattr(config, name) % 8:
            problems.append(f"its {name} is {getattr(config, name)}, expected a multiple of 8")
    if type(config.beta) not in (int, float) or not math.isfinite(config.beta):
        problems.append(f"its beta is {config.beta!r}, expected a number")
    if type(config.skip) is not bool:
        problems.append(f"its skip is {config.skip!r}, expected true or false")
    return problems


def wrong_about(about: Any) -> list[str]:
    """What is missing in `about`, or of another type."""
    if not isinstance(about, dict):
        return ["it does not say how it was made"]
    problems = [
        f"it does not say its {name}, or says {about.get(name)!r:.80}"
        for name, kind in ABOUT.items()
        if name not in about or not isinstance(about[name], kind) or about[name] is True
    ]
    for name in ("base_weights", "face_model"):
        if not problems and not re.fullmatch(r"[0-9a-f]{64}", about[name]):
            problems.append(f"its {name} is no SHA-256: {about[name]!r:.80}")
    return problems


def wrong_tensors(config: shared.EnhancerConfig, tensors: dict[str, np.ndarray]) -> list[str]:
    """What is missing, too much, of another shape or not finite."""
    names = tensors.get("names/clip_l" if config.dim_2 else "names")
    count = len(names) if names is not None and names.ndim else 0
    deltas = {name: value for name, value in tensors.items() if name.startswith("kv/")}
    want, got = expected(config, count), {k: v.shape for k, v in tensors.items() if k not in deltas}
    problems = [f"{name} is missing" for name in want if name not in got]
    problems += [f"{name} is unexpected" for name in got if name not in want]
    problems += [
        f"{name} is {got[name]}, expected {want[name]}"
        for name in want
        if name in got and got[name] != want[name]
    ]
    if (count > 0) != (config.kind == "names"):
        problems.append(f"it has {count} names, and is of kind {config.kind}")
    problems += wrong_deltas(config, {name: value.shape for name, value in deltas.items()})
    problems += [
        f"{name} is not finite"
        for name, value in tensors.items()
        if not np.isfinite(value.astype(np.float32)).all()
    ]
    scales = [value for name, value in tensors.items() if name.partition("/")[0] == "scale"]
    if not problems and not all(scale > 0 for scale in scales):
        problems.append(f"its scale is {min(scales)}, expected more than 0")
    return problems


def expected(config: shared.EnhancerConfig, names: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that follow from the config and the number of names."""
    N = config.num_tokens

    def fresh(D, key):
        known = jnp.zeros((names, N, D))
        network = config.network(D).init(key, jnp.zeros(FACE_WIDTH), jnp.zeros((N, D)), known)
        adapter = IDAdapter(D, config.beta).init(key, jnp.zeros((1, 1, D)), jnp.zeros((N, 2 * D)))
        return {
            "enhancer": network["params"],
            "adapter": adapter["params"],
            "start": jnp.zeros((N, D)),
            "scale": jnp.zeros(()),
            "names": known,
            **({"basis": jnp.zeros((config.basis, N, D))} if config.basis else {}),
        }

    found: dict[str, tuple[int, ...]] = {}
    for D, of in zip(config.widths, sd.ENCODERS, strict=False):
        tree = jax.eval_shape(functools.partial(fresh, D), jax.random.key(0))
        for name, leaf in pytrees.flatten(tree).items():
            part, slash, rest = name.partition("/")
            found[f"{part}/{of}{slash}{rest}" if config.dim_2 else name] = leaf.shape
    return found


def wrong_deltas(config: shared.EnhancerConfig, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with K/V deltas as far as their config tells; `check` compares with a UNet."""
    D, rank = sum(config.widths), config.kv_rank
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer, _, part = name.rpartition("/")
        if not re.fullmatch(r"kv(/(?!(?:down|up)/)\w+)+/(down|up)", name, re.ASCII):
            return [f"{name!r:.80} is unexpected"]
        layers.setdefault(layer, {})[part] = shape
    if not layers:
        return ["kv is missing"]
    return [
        f"{layer} is {parts}, expected down [{D}, {rank}] and up [{rank}, width]"
        for layer, parts in layers.items()
        if parts.get("down") != (D, rank) or len(parts.get("up", ())) != 2 or parts["up"][0] != rank
    ]


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


def texts(values: Any) -> Iterator[str]:
    """All texts in nested dicts and lists."""
    if isinstance(values, dict):
        values = [*values.keys(), *values.values()]
    if isinstance(values, str):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from texts(value)


def is_path(text: str) -> bool:
    """Whether a text is an absolute path, which would tell where somebody keeps files."""
    return bool(re.match(r"[/~\\]|[A-Za-z]:\\", text))


def listed(problems: list[str]) -> str:
    more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "; ".join(problems[:LISTED]) + more


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
