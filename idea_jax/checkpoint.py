"""What a run leaves on disk: the identity file, and checkpoints to resume from."""

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from idea_jax import __version__, pytrees
from idea_jax.files import cannot_write, write_tensors
from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.train_step import IdentityState

log = logging.getLogger(__name__)

FORMAT = "idea_jax.identity"
# 1: everything that draws a person is theirs. 2: they began with a shared ID-Enhancer.
FORMAT_VERSIONS = (1, 2)
# Constants that belong in the file: sampling depends on them. The regulariser's metric does not;
# it follows from the anchor.
GIVEN_IN_FILE = ("anchor", "id_embed", "enhancer")
# Parts of a method that files of version 1 do not mention.
SINCE_2 = ("enhanced", "shared_adapter", "shared_kv")


class IdentityError(ValueError):
    """An identity file is damaged, of another format, or does not fit the model."""


class CheckpointError(ValueError):
    """A run cannot be resumed from where it was asked to."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written."""


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


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers", "pillow")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"idea_jax": __version__, "python": platform.python_version(), **found}


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
    method = asdict(identity.method)
    if not is_enhanced:
        method = {name: value for name, value in method.items() if name not in SINCE_2}
    about = {
        "format_version": 2 if is_enhanced else 1,
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
                f"{' or '.join(map(str, FORMAT_VERSIONS))}; install the idea_jax that wrote it, or "
                "train again"
            )
        trees = pytrees.unflatten(tensors)
        identity = Identity(
            method=condition.Method(**about["method"]),
            trainable=trees["trainable"],
            given=trees["given"] if version == 1 else {},
            enhancer=about["enhancer"] if version == 2 else None,
            **{k: about[k] for k in ("placeholder", "base_model", "revision", "seed", "steps")},
        )
    # RecursionError: deeply nested JSON; AttributeError: a tensor that is a folder, too.
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, IdentityError):
            raise
        raise IdentityError(f"{path} lacks a part of its description: {error!r}") from error
    problems = wrong_types(identity) + wrong_types(identity.method)
    if identity.method.enhanced != (version == 2) or identity.needs_enhancer != (
        identity.enhancer is not None
    ):
        problems.append("its method is not one of its format version")
    problems += [f"{k} is not finite" for k, v in tensors.items() if not np.isfinite(v).all()]
    if problems:
        raise IdentityError(f"{path} is damaged: {'; '.join(problems[:20])}; train again")
    tokens = identity.trainable.get("pseudo_tokens")
    if getattr(tokens, "ndim", None) != 2 or len(tokens) != identity.method.num_tokens:
        found = "none" if tokens is None else getattr(tokens, "shape", "a folder")
        raise IdentityError(
            f"{path} is damaged: expected pseudo tokens [{identity.method.num_tokens}, width], "
            f"found {found}; train again"
        )
    return identity


def wrong_types(instance: object) -> list[str]:
    """The fields of a dataclass whose values are not of the type that is declared."""
    problems = []
    for spec in fields(instance):
        value = getattr(instance, spec.name)
        kind = spec.type | int if spec.type is float else spec.type
        if not isinstance(value, kind):
            problems.append(f"{spec.name} is a {type(value).__name__}")
    return problems


def check_identity(identity: Identity, model: sd.StableDiffusion, where) -> None:
    """Raises IdentityError, listing all differences, unless the identity fits the model.

    Every array is compared with what a new identity of the same method would have on this model.
    """
    tokens = identity.trainable["pseudo_tokens"]
    width = tokens.shape[-1]
    if width != model.text.hidden_size:
        raise IdentityError(
            f"{where} was learned for a text width of {width}, this checkpoint has "
            f"{model.text.hidden_size}: it belongs to another model family (base model "
            f"{identity.base_model}); sample with that one, or train again on this one"
        )

    def fresh(key):
        start = np.zeros(tokens.shape, np.float32)
        return condition.init_trainable(identity.method, model, key, start)

    expected = {"trainable": jax.eval_shape(fresh, jax.random.key(0))}
    if identity.method.keeps_face and not identity.embeds_only:
        expected["given"] = {
            "anchor": tokens,
            "id_embed": np.zeros(512, np.float32),
        }
        if not identity.method.train_enhancer:
            expected["given"]["enhancer"] = jax.eval_shape(
                lambda key: condition.init_enhancer(identity.method, model, key),
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


def tree_digest(tree: dict) -> str:
    """SHA-256 of the names and values of all leaves, hexadecimal."""
    digest = hashlib.sha256()
    for name, leaf in pytrees.flatten(tree).items():
        digest.update(name.encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def refuse_checkpoints(folder: Path) -> None:
    """Raises CheckpointError if an earlier run left checkpoints: a new one would mix with them."""
    if any(path.name.isdigit() for path in folder.glob("*")):
        raise CheckpointError(
            f"{folder} holds checkpoints of an earlier run; go on from there with "
            "--resume_from_checkpoint latest, choose another --output_dir, or delete that folder"
        )


class Checkpoints:
    """Checkpoints of a run in `folder/STEP`, written by orbax in the background.

    A checkpoint holds the trainables, the optimiser's state, the step and what early stopping
    knows. All else follows from the settings and the photos; their fingerprint is kept with it and
    must match on resume. SHA-256 digests of all of it, taken before it was handed over, are kept as
    well and must match what is read: orbax itself restores most flipped bits without a word.
    """

    def __init__(self, folder: Path, fingerprint: dict, *, limit: int | None = None):
        self.folder = folder.resolve()
        self.fingerprint = fingerprint
        self.limit = limit

    @functools.cached_property
    def ocp(self):
        import orbax.checkpoint

        return orbax.checkpoint

    @functools.cached_property
    def manager(self):
        """orbax's manager; made when first needed, since making it makes the folder."""
        ours = {}
        if jax.process_count() > 1:
            # Each process has people of its own; orbax takes a checkpoint for that of all of them.
            own = jax.process_index()
            self.folder.mkdir(parents=True, exist_ok=True)
            ours["create"] = False
            ours["multiprocessing_options"] = self.ocp.options.MultiprocessingOptions(
                primary_host=own,
                active_processes={own},
                barrier_sync_key_prefix=hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:16],
            )
        options = self.ocp.CheckpointManagerOptions(
            max_to_keep=self.limit, cleanup_tmp_directories=True, **ours
        )
        return self.ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: IdentityState) -> None:
        """Starts writing a checkpoint of this state, which must be later than all there are.

        Raises:
          WriteError: it cannot be written.
          CheckpointError: there is one of this or of a later step.
        """
        # Host copies: the caller's next step may reuse the device buffers while orbax still writes.
        tree = jax.tree.map(np.array, resumable(state))
        items = self.ocp.args.Composite(
            state=self.ocp.args.StandardSave(tree),
            run=self.ocp.args.JsonSave(self.fingerprint),
            sha256=self.ocp.args.JsonSave(digests(tree, self.fingerprint)),
        )
        with self.writing():
            is_saved = self.manager.save(int(state.step), args=items, force=True)
        if not is_saved:
            raise CheckpointError(
                f"checkpoint {int(state.step)} was not written: {self.folder} already holds "
                f"{', '.join(map(str, self.manager.all_steps()))}"
            )

    def restore(self, state: IdentityState, which: str) -> IdentityState | None:
        """Returns `state` as it was at a checkpoint; None if "latest" finds no whole one.

        Checkpoints of later steps are removed: the run goes on from this one. "latest" passes over
        damaged ones, which get another name, and says so.

        Args:
          which: "latest" or the path of a checkpoint's folder.

        Raises:
          CheckpointError: no such checkpoint, a damaged one that was asked for by its path, one of
            a run with other settings, or one that cannot be read for a reason outside of it.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        if which != "latest":
            path = Path(which).resolve()
            if path not in [self.folder / str(step) for step in steps]:
                found = ", ".join(str(step) for step in reversed(steps)) or "none"
                raise CheckpointError(
                    f"no checkpoint at {which}; in {self.folder} there are: {found}"
                )
            try:
                tree = self._read(int(path.name), state)
            except DamagedCheckpoint as error:
                raise CheckpointError(f"{error}; name another one, or take latest") from error
            self._remove(step for step in steps if step > int(path.name))
            return state._replace(**tree)
        for place, step in enumerate(steps):
            try:
                tree = self._read(step, state)
            except DamagedCheckpoint as error:
                log.warning("%s; going back to an earlier one", error)
                continue
            self._set_aside(steps[:place])
            return state._replace(**tree)
        self._set_aside(steps)
        if steps:
            log.warning("no whole one is left in %s: starting from the first step", self.folder)
        return None

    def _read(self, step: int, state: IdentityState) -> dict:
        """What a checkpoint holds of a state, verified.

        Raises:
          DamagedCheckpoint: it is not what was written.
          CheckpointError: it is of a run with other settings, or the disk cannot be read.
        """
        args = self.ocp.args
        target = jax.tree.map(np.asarray, jax.device_get(resumable(state)))
        try:
            about = self.manager.restore(
                step, args=args.Composite(run=args.JsonRestore(), sha256=args.JsonRestore())
            )
            if about.sha256["run"] != digests({}, about.run)["run"]:
                raise ValueError("its settings were changed")
            changed = [k for k, v in self.fingerprint.items() if about.run.get(k) != v]
            if changed:
                was = ", ".join(
                    f"{k}: {about.run.get(k)} -> {self.fingerprint[k]}" for k in changed
                )
                raise CheckpointError(
                    f"checkpoint {step} belongs to a run with other settings ({was}); resume with "
                    "the same ones, or train into another --output_dir"
                )
            restored = self.manager.restore(
                step, args=args.Composite(state=args.StandardRestore(target))
            ).state
            tree = jax.tree.map(np.asarray, restored)
            expected = digests(tree, about.run)
            wrong = [name for name, value in expected.items() if about.sha256.get(name) != value]
            if wrong:
                raise ValueError(f"{len(wrong)} of its arrays were changed")
        except CheckpointError:
            raise
        except Exception as error:  # orbax and tensorstore raise whatever their readers raise
            reason = str(error) if type(error) is ValueError else type(error).__name__
            gone = FileNotFoundError, NotADirectoryError, IsADirectoryError
            if isinstance(error, OSError | MemoryError) and not isinstance(error, gone):
                # Of the machine, which may have a bad moment; the checkpoint may be good.
                raise CheckpointError(
                    f"checkpoint {step} in {self.folder} cannot be read ({error or reason}); it "
                    "was left as it is"
                ) from error
            raise DamagedCheckpoint(
                f"checkpoint {step} in {self.folder} cannot be read, or is not what was written "
                f"({reason.splitlines()[0][:200]})"
            ) from error
        return tree

    def _remove(self, steps: Iterable[int]) -> None:
        with self.writing():
            for step in steps:
                self.manager.delete(step)

    def _set_aside(self, steps: Iterable[int]) -> None:
        """Renames damaged checkpoints, so that the steps can be written again."""
        with self.writing():
            for step in steps:
                aside = self.folder / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self.folder / str(step), aside)
            self.manager.reload()

    def close(self) -> None:
        """Waits until every checkpoint is on disk; does nothing the second time.

        Raises:
          WriteError: one could not be written.
        """
        manager = self.__dict__.get("manager")
        if manager is None:
            return
        with self.writing():
            manager.wait_until_finished()
            manager.close()
        del self.manager

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Gives the errors of orbax's writers, which have no common type, one that is known."""
        try:
            yield
        except Exception as error:
            raise cannot_write(self.folder, error) from error


def resumable(state: IdentityState) -> dict:
    """The part of a state that a checkpoint holds."""
    return {name: leaf for name, leaf in state._asdict().items() if name != "given"}


def digests(tree: dict, run: dict) -> dict[str, str]:
    """SHA-256 of each array, its type and shape included, and of the run's fingerprint."""
    found = {"run": hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest = hashlib.sha256(f"{leaf.dtype} {leaf.shape} ".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
        found[jax.tree_util.keystr(path)] = digest.hexdigest()
    return found
