"""Checkpoints of a run, from which it can be resumed."""

import functools
import hashlib
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idea_jax.errors import InputError
from idea_jax.runtime.files import cannot_write, json_digest
from idea_jax.runtime.versions import difference, marks_of, other_versions

log = logging.getLogger(__name__)


class CheckpointError(InputError, ValueError):
    """A run cannot be resumed from where it was asked to."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not what was written."""


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

    def save(self, state: Any) -> None:
        """Starts writing a checkpoint of this state, which must be later than all there are.

        Raises:
          WriteError: it cannot be written.
          CheckpointError: there is one of this or of a later step.
        """
        # Host copies: the caller's next step may reuse the device buffers while orbax still writes.
        tree = jax.tree.map(np.array, resumable(state))
        marks = marks_of(self.fingerprint)
        items = self.ocp.args.Composite(
            state=self.ocp.args.StandardSave(tree),
            run=self.ocp.args.JsonSave(marks),
            sha256=self.ocp.args.JsonSave(digests(tree, marks)),
        )
        with self.writing():
            is_saved = self.manager.save(int(state.step), args=items, force=True)
        if not is_saved:
            raise CheckpointError(
                f"checkpoint {int(state.step)} was not written: {self.folder} already holds "
                f"{', '.join(map(str, self.manager.all_steps()))}"
            )

    def restore(self, state: Any, which: str) -> Any:
        """Returns `state` as it was at a checkpoint; None if "latest" finds no whole one.

        Checkpoints of later steps are removed: the run goes on from this one. "latest" passes over
        damaged ones, which get another name, and says so.

        Args:
          which: "latest" or the path of a checkpoint's folder.

        Raises:
          CheckpointError: no such checkpoint, a damaged one that was asked for by its path, one of
            a run with other settings, or one that cannot be read for a reason outside of it, such
            as another version of a library.
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

    def _read(self, step: int, state: Any) -> dict:
        """What a checkpoint holds of a state, verified.

        Raises:
          DamagedCheckpoint: it is not what was written.
          CheckpointError: it is of a run with other settings, other versions have written it than
            cannot read it, or the disk cannot be read.
        """
        args, others = self.ocp.args, ""
        target = jax.tree.map(np.asarray, jax.device_get(resumable(state)))
        try:
            about = self.manager.restore(
                step, args=args.Composite(run=args.JsonRestore(), sha256=args.JsonRestore())
            )
            if about.sha256["run"] != digests({}, about.run)["run"]:
                raise ValueError("its settings were changed")
            changed = difference(about.run, self.fingerprint)
            if changed:
                raise CheckpointError(
                    f"checkpoint {step} in {self.folder} belongs to a run with other settings "
                    f"({changed}); resume with the same settings, weights, photos and versions, or "
                    "train into another --output_dir"
                )
            others = other_versions(about.run)
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
            if others:  # it may be good for those
                raise CheckpointError(
                    f"checkpoint {step} in {self.folder} cannot be read here "
                    f"({reason.splitlines()[0][:200]}){others}; install these versions to go on "
                    "with it, or delete it to go on from an earlier one, or from the beginning"
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


def resumable(state: Any) -> dict:
    """The part of a state that a checkpoint holds."""
    return {name: leaf for name, leaf in state._asdict().items() if name != "given"}


def digests(tree: dict, run: dict) -> dict[str, str]:
    """SHA-256 of each array, its type and shape included, and of the run's fingerprint."""
    found = {"run": json_digest(run)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest = hashlib.sha256(f"{leaf.dtype} {leaf.shape} ".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
        found[jax.tree_util.keystr(path)] = digest.hexdigest()
    return found
