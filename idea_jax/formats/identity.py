"""The identity file: one learned person, and what is needed to draw them again."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from idea_jax import pytrees
from idea_jax.errors import InputError
from idea_jax.method import condition
from idea_jax.method.modules import FACE_WIDTH
from idea_jax.models import sd
from idea_jax.runtime.files import write_tensors
from idea_jax.runtime.versions import other_versions, versions

FORMAT = "idea_jax.identity"

# 1: everything that draws a person is theirs. 2: they began with a shared ID-Enhancer. 3 and 4: as
# 1 and 2, on SDXL: what belongs to a text encoder is there twice.
FORMAT_VERSIONS = (1, 2, 3, 4)
WITH_ENHANCER, OF_SDXL = (2, 4), (3, 4)

# Constants that belong in the file: sampling depends on them. The regulariser's metric does not;
# it follows from the anchor.
GIVEN_IN_FILE = ("anchor", "id_embed", "enhancer")

# Parts of a method that files of version 1 do not mention.
SINCE_2 = ("enhanced", "shared_adapter", "shared_kv")
OF_TRAINING = ("basis",)  # of a method: where the tokens came to be is what draws


class IdentityError(InputError, ValueError):
    """An identity file is damaged, of another format, or does not fit the model."""


@dataclass(frozen=True)
class Identity:
    """One learned person: arrays, and what they need to draw again.

    base_model is a Hub id or a folder's name (never a whole path: it would tell where the user
    keeps files); revision the commit it had, if known; embeds_only: read from a file of token
    embeddings, without adapter and K/V; enhancer: SHA-256 of the file of the shared ID-Enhancer
    that drawing needs as well, None if it needs none.
    """

    method: condition.Method
    trainable: condition.Trainable
    given: condition.Given
    placeholder: str
    base_model: str
    revision: str | None
    seed: int
    steps: int
    embeds_only: bool = False
    enhancer: str | None = None

    @property
    def needs_enhancer(self) -> bool:
        """Whether a part that draws the person is a shared ID-Enhancer's."""
        return self.method.shared_adapter or self.method.shared_kv

    @property
    def is_of_sdxl(self) -> bool:
        """Whether it was learned with two text encoders."""
        return isinstance(self.trainable["pseudo_tokens"], dict)


def tokens_of_each(tokens: Any) -> list:
    """Pseudo tokens as a list: of the only text encoder, or of each of two in their order."""
    return [tokens[name] for name in sd.ENCODERS] if isinstance(tokens, dict) else [tokens]


def write_identity(path: Path, identity: Identity) -> None:
    """Writes an identity file (safetensors); an earlier file stays whole if anything fails.

    Tensors are named `trainable/...` and `given/...`; the metadata describe the run and never hold
    anything measured from the face. Of a person who began with a shared ID-Enhancer the constants
    are left out: drawing needs neither their face embedding nor their anchor.

    Raises:
      IdentityError: a value is not finite; such an identity is never written.
    """
    is_enhanced = identity.method.enhanced
    trees = {"trainable": identity.trainable}
    if not is_enhanced:
        trees["given"] = {k: v for k, v in identity.given.items() if k in GIVEN_IN_FILE}
    tensors = {name: np.array(leaf, order="C") for name, leaf in pytrees.flatten(trees).items()}
    broken = [name for name, value in tensors.items() if not np.isfinite(value).all()]
    if broken:
        raise IdentityError(
            f"{path.name} was not written, since it would hold values that are not finite "
            f"({', '.join(broken)}); train with a lower learning rate"
        )
    method = {k: v for k, v in asdict(identity.method).items() if k not in OF_TRAINING}
    if not is_enhanced:
        method = {name: value for name, value in method.items() if name not in SINCE_2}
    about = {
        "format_version": 1 + is_enhanced + 2 * identity.is_of_sdxl,
        "method": method,
        "placeholder": identity.placeholder,
        "base_model": identity.base_model,
        "revision": identity.revision,
        "seed": identity.seed,
        "steps": identity.steps,
        "versions": versions(),
        "licence": "the base model's and the face model's terms of use apply",
    }
    if is_enhanced:
        about["enhancer"] = identity.enhancer
    # A face embedding, or what was predicted from one.
    write_tensors(path, tensors, {FORMAT: json.dumps(about)}, private=True)


def read_identity(path: Path) -> Identity:
    """Reads an identity file.

    Raises:
      IdentityError: not an identity file, damaged, or written by a newer format.
      FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no identity file at {path}; training writes one into output_dir")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise IdentityError(f"{path} is damaged or no safetensors file: {error}") from error
    if FORMAT not in metadata:
        raise IdentityError(
            f"{path} is no identity file of this project; for a file of token embeddings use "
            "--learned_embedding_path"
        )
    try:
        about = json.loads(metadata[FORMAT])
        version = about["format_version"]
        if version not in FORMAT_VERSIONS:
            raise IdentityError(
                f"{path} has format version {version}, expected "
                f"{' or '.join(map(str, FORMAT_VERSIONS))}{other_versions(about)}; install the "
                "idea_jax that wrote it, or train again"
            )
        trees = pytrees.unflatten(tensors)
        identity = Identity(
            method=condition.Method(**about["method"]),
            trainable=trees["trainable"],
            given={} if version in WITH_ENHANCER else trees["given"],
            enhancer=about["enhancer"] if version in WITH_ENHANCER else None,
            **{k: about[k] for k in ("placeholder", "base_model", "revision", "seed", "steps")},
        )
    # RecursionError: deeply nested JSON; AttributeError: a tensor that is a folder, too.
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, IdentityError):
            raise
        raise IdentityError(f"{path} lacks a part of its description: {error!r}") from error
    problems = wrong_types(identity) + wrong_types(identity.method)
    if identity.method.enhanced != (version in WITH_ENHANCER) or identity.needs_enhancer != (
        identity.enhancer is not None
    ):
        problems.append("its method is not one of its format version")
    problems += [f"{k} is not finite" for k, v in tensors.items() if not np.isfinite(v).all()]
    if problems:
        raise IdentityError(f"{path} is damaged: {'; '.join(problems[:20])}; train again")
    check_tokens(identity.trainable.get("pseudo_tokens"), identity.method.num_tokens, version, path)
    return identity


def check_tokens(tokens: Any, count: int, version: int, where: Any) -> None:
    """Raises IdentityError unless tokens are [count, width], of SDXL for each encoder."""
    each, is_two = [tokens], isinstance(tokens, dict) and set(tokens) == set(sd.ENCODERS)
    if version in OF_SDXL:
        each = tokens_of_each(tokens) if is_two else [None]
    for own in each:
        if getattr(own, "ndim", None) != 2 or len(own) != count:
            found = "none" if own is None else getattr(own, "shape", "a folder")
            of_each = f" of {' and '.join(sd.ENCODERS)}" if version in OF_SDXL else ""
            raise IdentityError(
                f"{where} is damaged: expected pseudo tokens [{count}, width]{of_each}, found "
                f"{found}; train again"
            )


def wrong_types(instance: Any) -> list[str]:
    """The fields of a dataclass whose values are not of the type that is declared."""
    problems = []
    for spec in fields(instance):
        value = getattr(instance, spec.name)
        kind: Any = int | float if spec.type is float else spec.type
        if not isinstance(value, kind):
            problems.append(f"{spec.name} is a {type(value).__name__}")
    return problems


def check_identity(identity: Identity, model: sd.StableDiffusion, where) -> None:
    """Raises IdentityError, listing all differences, unless the identity fits the model.

    Every array is compared with what a new identity of the same method would have on this model.
    """
    tokens = identity.trainable["pseudo_tokens"]
    widths = [own.shape[-1] for own in tokens_of_each(tokens)]
    wanted = [config.hidden_size for config in model.encoders]
    if widths != wanted:
        theirs, ours = (" and ".join(map(str, some)) for some in (widths, wanted))
        raise IdentityError(
            f"{where} was learned for a text width of {theirs}, this checkpoint has "
            f"{ours}: it belongs to another model family (base model "
            f"{identity.base_model}); sample with that one, or train again on this one"
        )

    def fresh(key):
        start = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), tokens)
        return condition.init_trainable(model, identity.method, key, start)

    expected = {"trainable": jax.eval_shape(fresh, jax.random.key(0))}
    if identity.method.keeps_face and not identity.embeds_only:
        expected["given"] = {
            "anchor": tokens,
            "id_embed": np.zeros(FACE_WIDTH, np.float32),
        }
        if not identity.method.train_enhancer:
            expected["given"]["enhancer"] = jax.eval_shape(
                lambda key: condition.init_enhancer(model, identity.method, key),
                jax.random.key(0),
            )
    want = {k: v.shape for k, v in pytrees.flatten(expected).items()}
    got_trees = {"trainable": identity.trainable, "given": identity.given}
    got = {k: v.shape for k, v in pytrees.flatten(got_trees).items()}
    problems = [f"missing {k} {want[k]}" for k in want if k not in got]
    problems += [
        f"{k} is {got[k]}, expected {want[k]}" for k in want if k in got and got[k] != want[k]
    ]
    problems += [f"unexpected {k}" for k in got if k not in want and k.startswith("trainable/")]
    if problems:
        raise IdentityError(f"{where} does not fit this checkpoint: " + "; ".join(problems[:20]))
