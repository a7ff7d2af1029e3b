"""Samples of the training, read through grain: a face on one picture, and another picture of the
same person with its text.

Sample n of a run is a pure function of the seed and n. So a run is resumed by beginning at another
n, however many processes read; each reads every p-th.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idea_jax.enhancer import shards
from idea_jax.enhancer.shards import Faces, Index, Pictures, ShardsError

AHEAD = 3  # batches that are read while one is learned from
READERS = 8  # threads
MEAN_OF = 4  # pictures at most whose faces are averaged


class EnhancerBatch(NamedTuple):
    """Samples of a step, or the part of them that a process or a device has.

    Attributes:
      row: int32[B], their places in the step's batch over all processes.
      face: float32[B, 512] of unit norm.
      mean, std: float16[B, h, w, C], moments of the scaled latents.
      token_ids: int32[B, T].
      size_ids: int32[B, 6], what SDXL is told of the sizes of each picture; None for others.
    """

    row: np.ndarray
    face: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    token_ids: np.ndarray
    size_ids: np.ndarray | None = None


class FaceBatch(NamedTuple):
    """People of a step who are drawn, or the part of them that a process or a device has.

    Attributes:
      row: int32[B], as of `EnhancerBatch`.
      face: float32[B, 512] of unit norm, of one picture; others: the mean of the person's others.
      token_ids: int32[B, T].
    """

    row: np.ndarray
    face: np.ndarray
    others: np.ndarray
    token_ids: np.ndarray


class Folder:
    """A prepared folder, open.

    Attributes:
      index, faces: what is in it.
      people: numbers of each person's records.
      pictures: the records.
    """

    def __init__(self, path: Path, index: Index):
        self.path, self.index = path, index
        self.faces: Faces = shards.read_faces(path, index)
        self.pictures = Pictures(path, index)
        order = np.argsort(self.faces.person, kind="stable")
        starts = np.flatnonzero(np.diff(self.faces.person[order], prepend=-1))
        self.people = np.split(order, starts[1:])
        self.texts = np.array(index.texts, np.int32)


def open_folder(path: str | Path) -> Folder:
    """Opens a prepared folder.

    Raises:
      ShardsError: it is missing, damaged, or its preparation has not ended.
    """
    path = Path(path)
    index = shards.read_index(path)
    if not index.is_complete:
        raise ShardsError(
            f"the preparation of {path} has not ended: {index.people} people are in it so far; "
            "give the same --prepare command once more"
        )
    return Folder(path, index)


def read_weights(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Folders and their weights of `FOLDER` or `FOLDER=WEIGHT` each.

    Raises:
      ShardsError: a weight is no number above zero.
    """
    found = []
    for said in texts:
        folder, is_weighted, weight = said.rpartition("=")
        try:
            value = float(weight) if is_weighted else 1.0
        except ValueError:
            value = -1.0
        if not 0 < value < 1e6:
            raise ShardsError(f"--data is FOLDER or FOLDER=WEIGHT, such as out=0.5, got {said!r}")
        found.append((folder if is_weighted else said, value))
    return found


class Plan:
    """Which pictures each sample of a run is made of.

    Args:
      folders: open folders.
      weights: how often each is drawn from.
      people: numbers of the people of each folder to train on.
      size: samples of a step, over all processes.
      small, mean: how often the face is that of a small or turned version, or a mean of several.
      flip: whether every other picture is mirrored.
    """

    def __init__(
        self,
        folders: Sequence[Folder],
        weights: Sequence[float],
        people: Sequence[np.ndarray],
        *,
        size: int,
        seed: int,
        small: float,
        mean: float,
        flip: bool,
    ):
        self.folders, self.people, self.size, self.seed = folders, people, size, seed
        self.weights, self.flip = weights, flip
        self.shares = np.cumsum(weights) / np.sum(weights)
        self.small, self.mean = small, mean
        self.known: dict[int, list] = {}
        self.lock = threading.Lock()

    def of_faces(self, size: int) -> "FacePlan":
        """Of the same people, `size` in each step, who are drawn from a face."""
        return FacePlan(
            self.folders,
            self.weights,
            self.people,
            size=size,
            seed=self.seed + 1,
            small=self.small,
            mean=0.0,
            flip=False,
        )

    def people_of(self, step: int) -> list[tuple[int, int, np.ndarray]]:
        """(folder, person, random numbers [8]) of each sample of a step.

        Everybody is in it once, unless a folder has fewer people than its part of the samples.
        """
        with self.lock:
            if step in self.known:
                return self.known[step]
        rng = np.random.default_rng([self.seed, step, *b"plan"])
        # The parts differ from the shares by less than one sample, in the mean by nothing.
        ends = np.floor(self.shares * self.size + rng.random()).astype(int)
        ends[-1] = self.size
        chosen, start = [], 0
        for number, end in enumerate(np.minimum(ends, self.size)):
            people, count = self.people[number], max(end - start, 0)
            rounds = [rng.permutation(people) for _ in range(-(-count // len(people)))]
            chosen += [(number, int(p)) for p in np.concatenate([[], *rounds])[:count]]
            start = max(start, end)
        order, numbers = rng.permutation(self.size), rng.random((self.size, 8))
        drawn = [(*chosen[place], numbers[row]) for row, place in enumerate(order)]
        with self.lock:
            self.known[step] = drawn
            for old in sorted(self.known)[: -2 * AHEAD]:
                del self.known[old]
        return drawn

    def sample(self, number: int) -> EnhancerBatch:
        """Sample `number` of the run: leaves without the first axis.

        Raises:
          ShardsError: its file is damaged.
        """
        step, row = divmod(number, self.size)
        place, person, u = self.people_of(step)[row]
        folder = self.folders[place]
        records = folder.people[person]
        target = int(u[0] * len(records))
        shown = folder.pictures[int(records[target])]
        face = self.face_of(folder, np.delete(records, target), records[target], u)
        mirror = int(self.flip and u[1] < 0.5)
        texts = shown.token_ids if len(shown.token_ids) else folder.texts
        ids = texts[int(u[2] * len(texts))]
        sizes = folder.faces.size_ids
        return EnhancerBatch(
            np.int32(row),
            face,
            shown.mean[mirror],
            shown.std[mirror],
            ids,
            None if sizes is None else sizes[records[target]],
        )

    def face_of(
        self, folder: Folder, others: np.ndarray, own: np.ndarray, u: np.ndarray
    ) -> np.ndarray:
        """The face float32[512] that a sample begins with.

        Args:
          others: records of the person but the one that is drawn, whose number is `own`.
          u: random numbers.
        """
        faces = folder.faces
        if not len(others):
            others = own[None]
        if u[3] < self.mean and len(others) > 1:
            count = 2 + int(u[4] * (min(MEAN_OF, len(others)) - 1))
            rng = np.random.default_rng(int(u[5] * 2**52))
            total = faces.face[rng.choice(others, count, replace=False)].sum(axis=0)
            norm = np.linalg.norm(total)
            if norm > 1e-3:
                return total / norm
        record = others[int(u[6] * len(others))]
        if u[7] < self.small and faces.turned[record].any():
            return faces.turned[record]
        return faces.face[record]


class FacePlan(Plan):
    """Who is drawn in each step of a run, from which of their pictures."""

    def sample(self, number: int) -> FaceBatch:  # type: ignore[override]
        """Person `number` of the run: leaves without the first axis.

        Raises:
          ShardsError: a file is damaged.
        """
        step, row = divmod(number, self.size)
        place, person, u = self.people_of(step)[row]
        folder, records = self.folders[place], self.folders[place].people[person]
        shown = int(records[int(u[0] * len(records))])
        faces = folder.faces
        face = faces.face[shown]
        if u[7] < self.small and faces.turned[shown].any():
            face = faces.turned[shown]
        others = records[records != shown] if len(records) > 1 else records
        total = faces.face[others].sum(axis=0)
        mean = total / max(float(np.linalg.norm(total)), 1e-3)
        own = folder.pictures[int(records[int(u[1] * len(records))])].token_ids
        texts = own if len(own) else folder.texts
        return FaceBatch(np.int32(row), face, mean, texts[int(u[2] * len(texts))])


class _Source:
    """The samples of a run from a step on, as grain reads them: of process p every n-th."""

    def __init__(self, sample: Callable[[int], NamedTuple], first: int, count: int):
        self.sample, self.first, self.count = sample, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict:
        sample = self.sample(self.first + int(number))._asdict()
        return {name: leaf for name, leaf in sample.items() if leaf is not None}

    def __repr__(self) -> str:
        return f"samples from {self.first}"


class Reader:
    """Batches of a run from a step on, made ahead by threads; says how long it was waited for.

    Args:
      plan: what to read; a `Plan` makes an `EnhancerBatch`, a `FacePlan` a `FaceBatch`.
      steps: first step, counted from 0, and the one behind the last.
      process, processes: whose part is read: rows `process`, `process + processes`, ...
    """

    def __init__(self, plan: Plan, steps: range, process: int = 0, processes: int = 1):
        import grain

        size = plan.size // processes
        source = _Source(plan.sample, steps.start * plan.size, len(steps) * plan.size)
        options = grain.ReadOptions(
            num_threads=READERS, prefetch_buffer_size=max(AHEAD * size, READERS)
        )
        dataset = grain.MapDataset.source(source)[process::processes]
        self.made = FaceBatch if isinstance(plan, FacePlan) else EnhancerBatch
        self.iterator = iter(dataset.to_iter_dataset(options).batch(size))
        self.waited, self.began = 0.0, time.monotonic()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        started = time.monotonic()
        batch = self.made(**next(self.iterator))
        self.waited += time.monotonic() - started
        return batch

    def share_waited(self) -> float:
        """The share of time in `next` since the last question, 0 to 1."""
        now = time.monotonic()
        share = self.waited / max(now - self.began, 1e-9)
        self.waited, self.began = 0.0, now
        return share

    def close(self) -> None:
        """Ends the threads."""
        self.iterator.close()
