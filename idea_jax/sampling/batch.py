"""Drawing many rows: `idea-batch`."""

import functools
import json
import logging
import shutil
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from idea_jax import jobs
from idea_jax.data import images
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.formats import enhancer as enhancers
from idea_jax.method import shared
from idea_jax.models import hub, lora, sd
from idea_jax.runtime import compile_cache, devices, memory, signals
from idea_jax.runtime.files import check_writable, file_digest, json_digest
from idea_jax.runtime.versions import versions
from idea_jax.sampling import engine
from idea_jax.sampling.plan import open_model, said_of_levels
from idea_jax.sampling.rows import Job, Roster, RowsError, make_jobs
from idea_jax.sampling.settings import BatchConfig
from idea_jax.sampling.store import INDEX, Held, Store, StoreError, write_index

log = logging.getLogger(__name__)

BACKLOG = 8  # pictures for each thread that wait to be encoded, at most
SAID = 5  # lines of the job file whose trouble is told; the index has all
SECONDS = 30  # between two lines of progress where nobody looks at a terminal


@dataclass(frozen=True)
class BatchPlan:
    """What is to be drawn, before any weights are read.

    Attributes:
      loading: what `sd.load` takes besides the folder.
      jobs: the rows of all processes, each picture once, in the order in which they are drawn:
        rows that share a program together, and in these the rows of one person.
      lines: (line, hash) of all rows of the job file that can be drawn.
      bad: what is wrong with the other lines.
    """

    cfg: BatchConfig
    found: hub.Checkpoint
    model: sd.StableDiffusion
    loading: dict
    enhancer: enhancers.Enhancer | None
    texts: engine.Texts
    jobs: list[Job]
    lines: list[tuple[int, str]]
    bad: dict[int, str]


def run(cfg: BatchConfig) -> list:
    """Draws all rows of a job file; returns the path of the index, or what would be done.

    Raises:
      RowsError: some rows could not be drawn; all others are.
      StoreError: the folder has pictures already.
      Interrupted: SIGINT or SIGTERM; the same command with --resume goes on.
    """
    with devices.joined() if cfg.distributed else nullcontext():
        if cfg.dry_run:
            return foretell(plan_batch(cfg))
        out = Path(cfg.out)
        with jobs.only_run(out, jax.process_index(), "--out"):
            return fill(cfg, out)


def fill(cfg: BatchConfig, out: Path) -> list[Path]:
    """`run`, for the only run into a folder."""
    store = Store(out, cfg.format, cfg.picture, jax.process_index())
    # Process 0 alone: another one may come late, and find the first pictures of this very run.
    if not cfg.resume and jax.process_index() == 0 and not store.is_empty():
        raise StoreError(
            f"{out} has pictures of an earlier run: --resume keeps those whose rows are the same; "
            "or choose another --out"
        )
    check_writable(out)
    if jax.process_count() == 1:  # what a kill left half-written
        for path in out.rglob(".tmp-*"):
            path.unlink(missing_ok=True)
    batch = plan_batch(cfg)
    rows = [job.digest for job in batch.jobs]
    devices.check_same(rows, "rows", "the job file, the identities and the checkpoint")
    held = store.held()
    store.drop_packed(held)
    own = range_of(batch.jobs)
    left = [job for job in own if job.digest not in held]
    log.info("%d of %d pictures are there", len(own) - len(left), len(own))
    if jax.process_index() == 0 and (others := len(held.keys() - set(rows))):
        log.warning(
            "%s has %d pictures of rows that are not asked for now: they stay, and are not in %s",
            out,
            others,
            INDEX,
        )
    lost = draw_left(batch, store, held, own, left)
    if jax.process_index() > 0:
        failed = [{"line": line, "error": why} for line, why in lost.values()]
        told(cfg, out, failed, len(own))
        return []
    devices.await_others()
    if jax.process_count() > 1:
        held = store.held()
    lines = index_lines(batch, held, lost)
    write_index(out, lines)
    return told(cfg, out, [line for line in lines if "error" in line], len(lines))


def told(cfg: BatchConfig, out: Path, failed: Sequence[dict], rows: int) -> list[Path]:
    """The path of the index; raises RowsError where rows failed."""
    if failed:
        place = place_of(cfg)
        reasons = "; ".join(f"{place} {one['line']}: {one['error']}" for one in failed[:SAID])
        raise RowsError(
            f"{len(failed)} of {rows} rows could not be drawn, the others are; {out / INDEX} has "
            f"the reason of each. {reasons}"
        )
    return [out / INDEX]


def plan_batch(cfg: BatchConfig) -> BatchPlan:
    """Reads the job file, the people and all of the model but its weights.

    Raises:
      RowsError: no row can be drawn.
    """
    found, model, loading = open_model(cfg)
    path, enhancer = enhancers.find(cfg.enhancer, found.folder), None
    if path is not None:
        enhancer = enhancers.read(path)
        enhancers.check(enhancer, model, path, face_model=None)
    length = model.text.max_position_embeddings
    plain = load_tokenizer(found.tokenizer, model.text.vocab_size, length, found.padding)
    texts = engine.Texts(plain)
    casting = Roster(model, cfg.identities, enhancer.sha256 if enhancer else None)
    of_model = about_model(cfg, found, model, loading)
    good, bad = make_jobs(cfg, model, (casting, texts), of_model)
    place = place_of(cfg)
    for line, why in list(bad.items())[:SAID]:
        log.warning("%s %d is left out: %s", place, line, why)
    if not good:
        reasons = "; ".join(f"{place} {line}: {why}" for line, why in list(bad.items())[:SAID])
        raise RowsError(f"none of the {len(bad)} rows can be drawn. {reasons}")
    lines = [(job.line, job.digest) for job in good]
    once = {job.digest: job for job in reversed(good)}
    order = sorted(
        once.values(),
        key=lambda job: (
            repr(texts.kind(job.row)),
            job.row.cast,
            job.row.prompt,
            job.row.seed,
            job.row.number,
            job.digest,
        ),
    )
    return BatchPlan(cfg, found, model, loading, enhancer, texts, order, lines, bad)


def about_model(
    cfg: Any, found: hub.Checkpoint, model: sd.StableDiffusion, loading: dict
) -> dict[str, Any]:
    """What of the model decides a picture, as it is written down with each.

    Args:
      cfg: settings that name a checkpoint, as `open_model` takes them; loading: what that returns.
    """
    return {
        "model": found.name,
        "revision": found.revision,
        "weights": digest_of_weights(found.folder, loading["vae"], cfg.variant),
        "configs": digest_of_configs(found, loading["vae"], cfg.original_config),
        "prediction_type": model.schedule.prediction_type,
        **({"lora": lora.about(loading["loras"])} if loading["loras"] else {}),
        "clip_skip": cfg.clip_skip,
        "mixed_precision": cfg.mixed_precision,
        **said_of_levels(cfg),
    }


def digest_of_weights(folder: Path, vae: Path | None, variant: str | None) -> str:
    """Digest of the files of a checkpoint, a folder or one file, whose weights draw."""
    parts = [folder / "unet", folder / "text_encoder", vae or folder / "vae"]
    infix = f".{variant}" if variant else ""
    files = [folder] if folder.is_file() else []
    files += [
        file
        for part in parts
        for file in sorted([*part.glob("*.safetensors"), *part.glob("*.bin")])
        if part == vae or not infix or infix in file.name
    ]
    return json_digest([[file.parent.name, file.name, file_digest(file)] for file in files])


def digest_of_configs(found: hub.Checkpoint, vae: Path | None, original_config: str | None) -> str:
    """Digest of the files that say how a checkpoint is read: configs, noise schedule, tokenizer."""
    parts = ["unet", "text_encoder", "scheduler"] + ([] if vae else ["vae"])
    files = [file for part in parts for file in sorted((found.folder / part).glob("*.json"))]
    files += [vae / "config.json"] if vae else []
    files += sorted([*found.tokenizer.glob("*.json"), *found.tokenizer.glob("*.txt")])
    files += [Path(original_config)] if original_config else []
    return json_digest([found.padding, *([file.name, file_digest(file)] for file in files)])


def place_of(cfg: BatchConfig) -> str:
    """What the number of a row counts: lines of the job file, or --prompts times people."""
    return "row" if cfg.jobs is None else "line"


def range_of(everything: Sequence[Job]) -> Sequence[Job]:
    """The rows of this process: a range of neighbours, as they share programs and people."""
    n, processes, own = len(everything), jax.process_count(), jax.process_index()
    return everything[n * own // processes : n * (own + 1) // processes]


def index_lines(
    batch: BatchPlan, held: dict[str, Held], lost: dict[str, tuple[int, str]]
) -> list[dict]:
    """What the index says of each line of the job file, in order."""
    by_digest = {job.digest: job for job in batch.jobs}
    lines = [{"line": line, "error": why} for line, why in batch.bad.items()]
    for line, digest in batch.lines:
        about = {"line": line, "hash": digest, **by_digest[digest].about}
        if digest in held:
            lines.append({**about, "file": held[digest].file, "sha256": held[digest].sha256})
        else:
            why = lost.get(digest, (line, "another process could not draw it"))[1]
            lines.append({**about, "error": why})
    return sorted(lines, key=lambda one: one["line"])


def open_engine(batch: BatchPlan, rows: Sequence[engine.PictureRow]) -> engine.Engine:
    """An engine for these rows; its first program is compiled while the weights are read."""
    cfg, model = batch.cfg, batch.model
    local = jax.local_devices()
    each = cfg.batch_size
    if local[0].platform != "cpu":
        each = engine.rows_of_each(len(rows), len(local), each)
    # On a CPU a device always has as many rows, however many are left: the bits depend on it.
    local = local[: -(-len(rows) // each)]
    kinds = [batch.texts.kind(row) for row in rows]
    size = engine.size_for(kinds.count(kinds[0]), engine.sizes_on(local, each))
    sd.shapes(model)  # once, before two threads ask for them
    lower = functools.partial(engine.lower_call, model, kinds[0], size, local, each)
    with compile_cache.ahead(lower):
        _, frozen = sd.load(batch.found.folder, **batch.loading)
    ours = None
    if batch.enhancer is not None:
        enhancers.warn_of_weights(batch.enhancer, frozen, batch.found.name)
        ours = shared.frozen_part(batch.enhancer.shared)
    return engine.Engine(model, frozen, batch.texts, each=each, shared=ours, devices=local)


def encoded(job: Job, picture: np.ndarray, kind: str, quality: int = 95) -> bytes:
    """A picture as a file, with its row and the mark of generated pictures.

    Args:
      kind: "png", "webp" or "jpeg"; quality: of the last two.

    Raises:
      ImageError: it is not finite.
    """
    about = {"hash": job.digest, **job.about, "versions": versions()}
    note = {"parameters": json.dumps(about)}
    return images.encode_picture(images.to_uint8(picture), kind, note, quality)


class Desk:
    """Encodes and writes pictures in threads, and packs shards in order.

    Args:
      held: what is there already; grows.
      own: all rows of this process, in order.
    """

    def __init__(self, batch: BatchPlan, store: Store, held: dict[str, Held], own: Sequence[Job]):
        self.batch, self.store, self.held = batch, store, held
        self.lost: dict[str, tuple[int, str]] = {}
        self.pool = ThreadPoolExecutor(batch.cfg.threads)
        self.waiting: deque[tuple[Job, Future]] = deque()
        # Rows of no shard, in order; those that were drawn before a kill among them.
        self.unpacked = deque(
            job.digest
            for job in own
            if job.digest not in held or not held[job.digest].file.startswith("shards/")
        )
        self.numbers = store.free_numbers()

    def take(self, job: Job, picture: np.ndarray) -> None:
        """Has a picture written; waits while too many are under way."""

        def write():
            cfg = self.batch.cfg
            return self.store.put(job.digest, encoded(job, picture, cfg.picture, cfg.quality))

        self.waiting.append((job, self.pool.submit(write)))
        while len(self.waiting) > BACKLOG * self.batch.cfg.threads:
            self._finish()

    def _finish(self) -> None:
        job, future = self.waiting.popleft()
        try:
            self.held[job.digest] = future.result()
        except images.ImageError as error:
            self.lost[job.digest] = job.line, str(error)
            log.warning("%s %d could not be drawn: %s", place_of(self.batch.cfg), job.line, error)
        self.pack(self.batch.cfg.shard_pictures)

    def pack(self, most: int) -> None:
        """Packs shards as long as the next rows in order are there to fill one."""
        if self.store.kind == "folder":
            return
        while self.unpacked:
            ready: list[str] = []
            for digest in self.unpacked:
                if len(ready) == most or (digest not in self.held and digest not in self.lost):
                    break
                ready.append(digest)
            if len(ready) < most:
                return
            for _ in ready:
                self.unpacked.popleft()
            there = [digest for digest in ready if digest in self.held]
            if there:
                self.held |= self.store.pack(there, next(self.numbers))

    def close(self, is_whole: bool) -> None:
        """Waits until all is written, and packs what is left if nothing is missing."""
        try:
            while self.waiting:
                self._finish()
            if is_whole and self.unpacked:
                self.pack(len(self.unpacked))
        finally:
            self.pool.shutdown(cancel_futures=True)


def draw_left(
    batch: BatchPlan, store: Store, held: dict[str, Held], own: Sequence[Job], left: Sequence[Job]
) -> dict[str, tuple[int, str]]:
    """Draws rows and keeps them; `held` grows by them.

    Returns:
      (line, reason) of the rows that could not be drawn, by their hash.

    Raises:
      Interrupted: SIGINT or SIGTERM; what was drawn is on disk.
    """
    desk = Desk(batch, store, held, own)
    if not left:
        desk.close(True)
        return {}
    artist = open_engine(batch, [job.row for job in left])
    is_seen = sys.stderr.isatty()
    progress = tqdm(
        total=len(own),
        initial=len(own) - len(left),
        unit="picture",
        mininterval=0.1 if is_seen else SECONDS,
        leave=False,
    )
    started, drawn = time.monotonic(), 0
    with signals.noted_signals() as noted, progress:
        try:
            for place, picture in artist.draw([job.row for job in left]):
                if noted:
                    break
                desk.take(left[place], picture)
                drawn += 1
                progress.update()
        finally:
            desk.close(is_whole=drawn == len(left))
    seconds = time.monotonic() - started
    log.info("%d pictures in %.1f s, %.2f pictures/s", drawn, seconds, drawn / seconds)
    if noted and drawn < len(left):
        raise signals.Interrupted(
            noted[0],
            f"stopped with {len(left) - drawn} pictures left; the same command with --resume "
            "goes on",
        )
    return desk.lost


def foretell(batch: BatchPlan) -> list[str]:
    """What a batch would do, in lines: counts, programs, space and time.

    One call of the commonest program is drawn, twice, and thrown away.
    """
    cfg, out = batch.cfg, Path(batch.cfg.out)
    held = Store(out, cfg.format, cfg.picture).held(sets_aside=False) if cfg.resume else {}
    left = [job for job in range_of(batch.jobs) if job.digest not in held]
    people = {name for job in batch.jobs for name in job.row.cast}
    lines = [
        f"{len(batch.lines)} rows can be drawn, {len(batch.bad)} cannot; {len(batch.jobs)} "
        f"different pictures of {len(people)} people, {len(left)} left for this process"
    ]
    if not left:
        return lines
    kinds = [batch.texts.kind(job.row) for job in left]
    common = max(set(kinds), key=kinds.count)
    chosen = [job for job, kind in zip(left, kinds, strict=True) if kind == common]
    artist = open_engine(batch, [job.row for job in chosen])
    size = engine.size_for(len(chosen), artist.sizes)
    rows = [job.row for job in chosen[:size]]
    engine.fetch(range(size), artist.launch(rows, size))
    started = time.monotonic()
    drawn = engine.fetch(range(size), artist.launch(rows, size))
    seconds = time.monotonic() - started
    form = batch.cfg.picture, batch.cfg.quality
    sizes = [len(encoded(chosen[place], picture, *form)) for place, picture in drawn]
    each = sum(sizes) / len(rows)
    whole, space = 0.0, 0.0
    for kind in dict.fromkeys(kinds):
        count = kinds.count(kind)
        calls = -(-count // engine.size_for(count, artist.sizes))
        own = work_of(kind) / work_of(common)
        whole += calls * seconds * own
        space += count * each * pixels_of(kind) / pixels_of(common)
        height, width = kind.sampling.size
        lines.append(
            f"{count} pictures of {width} x {height}, {kind.sampling.steps} steps of "
            f"{kind.sampling.scheduler}, {'' if kind.is_guided else 'un'}guided, text of "
            f"{kind.chunks} x {batch.model.text.max_position_embeddings} tokens: {calls} calls of "
            "one program"
        )
    free = shutil.disk_usage(next(p for p in (out, *out.absolute().parents) if p.exists())).free
    return [
        *lines,
        f"about {memory.gigabytes(space)} on the disk ({each / 1024:.0f} KiB a picture), of "
        f"which {memory.gigabytes(free)} are free",
        f"about {jobs.duration(whole)}, and the time to start ({len(left) / whole:.2f} "
        f"pictures/s: {seconds:.2f} s for a call of {size})",
    ]


def pixels_of(kind: engine.Kind) -> int:
    """Of a picture of a kind."""
    return kind.sampling.size[0] * kind.sampling.size[1]


def work_of(kind: engine.Kind) -> int:
    """Work of a picture of a kind, as far as it can be told: passes of the network, by pixels."""
    return kind.sampling.steps * (1 + kind.is_guided) * pixels_of(kind)
