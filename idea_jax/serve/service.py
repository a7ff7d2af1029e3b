"""Everything behind the routes: one engine, one thread that owns it, the shelf and the album."""

import asyncio
import base64
import functools
import hashlib
import io
import logging
import shutil
import threading
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastapi.responses import Response

from idea_jax import exporting
from idea_jax.data import images
from idea_jax.formats import enhancer as enhancers
from idea_jax.models import hub, sd
from idea_jax.sampling.batch import encoded
from idea_jax.sampling.engine import Kind
from idea_jax.sampling.rows import Job
from idea_jax.serve import metrics
from idea_jax.serve.album import MEDIA, Album
from idea_jax.serve.line import Line, QueuedRow, Ticket
from idea_jax.serve.painter import Enrolled, Painter, as_problem
from idea_jax.serve.photos import Sights
from idea_jax.serve.problems import HttpProblem, busy, stopping
from idea_jax.serve.reception import Reception
from idea_jax.serve.school import Lesson, Pupil, School
from idea_jax.serve.settings import ServeConfig
from idea_jax.serve.shelf import Resident, Shelf, files_of, moment
from idea_jax.serve.tasks import Task, Tasks

log = logging.getLogger(__name__)

PORTRAIT = "a photo of {}"  # of covers, and of pictures on the way
UNKEPT = {"Cache-Control": "no-store"}


class Wants(NamedTuple):
    """What is to be done with the pictures of a request.

    picture: "png", "webp" or "jpeg"; task: that they are of; cover: of whom they are the cover.
    """

    picture: str
    has_likeness: bool
    is_kept: bool
    task: Task | None
    cover: str | None = None


@dataclass
class Service:
    """What the routes work with.

    Attributes:
      looks: the thread that looks at photos; desk: the one that looks at rows; small: those for
        files.
      looking: the looks at photos that are not done yet, by the jobs that wait for them.
      broken: why the server cannot go on; at_failure is called then.
      connections: how many clients have one open.
    """

    cfg: ServeConfig
    found: hub.Checkpoint
    model: sd.StableDiffusion
    enhancer: enhancers.Enhancer | None
    sights: Sights
    shelf: Shelf
    album: Album
    reception: Reception
    school: School
    line: Line
    painter: Painter
    meters: metrics.Meters
    tasks: Tasks = field(default_factory=Tasks)
    is_stopping: threading.Event = field(default_factory=threading.Event)
    looks: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "eyes"))
    desk: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "desk"))
    small: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "small"))
    broken: BaseException | None = None
    at_failure: Callable[[], None] = lambda: None
    connections: Callable[[], int] = lambda: 0
    looking: dict[str, Future] = field(default_factory=dict)
    deleting: asyncio.Lock = field(default_factory=asyncio.Lock)
    finishing: threading.Lock = field(default_factory=threading.Lock)
    has_finished: bool = False
    lookers: int = 0

    async def aside(
        self, pool: ThreadPoolExecutor, work: Callable[..., Any], *arguments: Any
    ) -> Any:
        """Has something done in a thread, while the event loop goes on."""
        if self.has_finished:
            raise stopping()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool, functools.partial(work, *arguments))

    async def file(self, path: Path, media: str) -> Response:
        """The answer that is a file; no browser keeps it, so that what is deleted is gone.

        Raises:
          HttpProblem: it was deleted meanwhile.
        """
        try:
            data = await self.aside(self.small, path.read_bytes)
        except FileNotFoundError:
            raise HttpProblem("not-found", "it was deleted meanwhile") from None
        return Response(data, media_type=media, headers=UNKEPT)

    @contextmanager
    def looker(self) -> Iterator[None]:
        """Whoever has photos looked at; for the thread of the event loop.

        Raises:
          HttpProblem: too many have.
        """
        if self.lookers >= self.cfg.max_jobs:
            raise busy(f"{self.lookers} others have photos looked at", 5.0)
        self.lookers += 1
        try:
            yield
        finally:
            self.lookers -= 1

    # Drawing.

    def draw(
        self,
        jobs: Sequence[tuple[Job, Kind]],
        wants: Wants,
        tell: Callable[[tuple], None],
    ) -> tuple[Task, Ticket]:
        """Lets rows wait to be drawn; `tell` as of `Ticket`.

        Raises:
          HttpProblem: the line is full, or the server stops.
        """
        task = Task("draw", len(jobs))
        wants = wants._replace(task=task)

        def told(event: tuple) -> None:
            self._note(task, ticket, event)
            tell(event)

        ticket = Ticket(list(jobs), told, wants)
        task.people |= ticket.people
        task.stop = lambda problem: self.line.cancel(ticket, problem)
        task.position = lambda: self.line.ahead_of(ticket)
        left, kinds = self.painter.compiler.seconds_left, {kind for _, kind in jobs}
        task.is_compiled_for = lambda: any(left(kind) is not None for kind in kinds)
        self.tasks.add(task)
        try:
            self.line.put(ticket)
            for name in ticket.people:  # whoever is deleted from here on finds the request
                self.shelf.get(name)
        except HttpProblem as problem:
            task.cancel(problem)
            raise
        if self.cfg.log_prompts:
            for job, _ in jobs:
                log.info("job %s: %r", task.id, job.row.prompt)
        return task, ticket

    def _note(self, task: Task, ticket: Ticket, event: tuple) -> None:
        """Keeps the job of a request up to date."""
        if event[0] == "begun":
            self.meters.waited(time.monotonic() - ticket.came)
            task.change(state="running", stage="drawing")
        elif event[0] == "problem":
            task.fail(event[1])
        else:
            done = task.values["done"] + 1
            task.change(done=done)
            if done == task.values["total"]:
                task.change(state="done")

    def deliver(self, row: QueuedRow, picture: np.ndarray) -> None:
        """Encodes a picture, and hands it to whoever waits for it; in a thread of its own."""
        wants: Wants = row.ticket.wants
        if row.ticket.is_closed:
            return
        try:
            data = encoded(row.job, picture, wants.picture)
        except images.ImageError as error:
            # Numbers of any size may be asked for, and from some on nothing finite is drawn.
            detail = f"no picture ({error}): take a smaller guidance_scale or id_strength"
            where = {"where": f"rows[{row.place}]", "detail": detail}
            raise HttpProblem("invalid", detail, [where]) from error
        likeness = self._likeness(row.job, picture) if wants.has_likeness else None
        told = {
            "row": row.place,
            "id": None,
            "url": None,
            "data": None,
            "type": MEDIA[wants.picture],
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "likeness": likeness,
            "created": moment(),
            "about": {"hash": row.job.digest, **row.job.about},
        }

        def make() -> dict[str, Any]:
            if wants.is_kept:
                return self.album.keep(data, told) | {"row": row.place}
            return told | {"data": base64.b64encode(data).decode()}

        if wants.cover is not None:
            own = likeness.get(wants.cover) if likeness else None
            self._set_cover(row, data, own)
        row.ticket.deliver(row.place, make)

    def _likeness(self, job: Job, picture: np.ndarray) -> dict[str, float]:
        faces = {}
        for name in job.row.cast:
            try:
                face = self.shelf.get(name).face
            except HttpProblem:  # deleted meanwhile
                continue
            if face is not None:
                faces[name] = face
        return self.sights.likeness(images.to_uint8(picture), faces)

    # Learning.

    def learn(self, pupil: Pupil) -> Task:
        """Lets somebody wait to be learned; their photos are looked at first.

        Raises:
          HttpProblem: too many wait, the name is taken, or the steps cannot be taken.
        """
        if self.is_stopping.is_set():
            raise stopping()
        self.school.check(pupil.steps)
        is_here = self.shelf.has(pupil.name)
        if is_here and not pupil.replaces:
            raise HttpProblem(
                "conflict", "somebody of this name is here: take another name, or replace=true"
            )
        if not pupil.replaces and self.tasks.is_learning(pupil.name):
            raise HttpProblem(
                "conflict", "somebody of this name is being learned: take another name, or wait"
            )
        if not is_here and len(self.shelf.residents) >= self.cfg.max_people:
            raise HttpProblem(
                "conflict", f"{self.cfg.max_people} people are here already: delete somebody first"
            )
        waiting = self.learning()
        if waiting >= self.cfg.max_jobs:
            raise busy(f"{waiting} people wait to be learned", 5.0 * waiting)
        task = self.tasks.add(Task("learn", pupil.steps, pupil.name))
        task.position = lambda: self.painter.ahead_of(task)
        task.at_end = self.meters.ended
        looking = self.looking[task.id] = self.looks.submit(self._look, task, pupil)
        looking.add_done_callback(lambda _: self.looking.pop(task.id))
        return task

    def learning(self) -> int:
        """People who are learned, or wait for it."""
        return self.painter.learning() + len(self.looking)

    def _look(self, task: Task, pupil: Pupil) -> None:
        try:
            if task.has_ended:
                return
            task.change(stage="looking")
            seen, face = self.school.look(pupil)
            task.change(stage="waiting")
            make = self.shelf.new_folder
            if not task.has_ended:
                self.painter.enroll(Enrolled(task, pupil, seen, face, make, self._take_in))
        except Exception as error:
            task.fail(as_problem(error))

    def _take_in(self, one: Enrolled, lesson: Lesson) -> str:
        """Writes what was learned, and lets it be drawn; returns where it is. Not for the thread
        that owns JAX, which goes on meanwhile, or waits for it.

        Raises:
          HttpProblem: the name was taken meanwhile, or nobody wants the person any more;
          WriteError: the disk is full.
        """
        pupil, shelf = one.pupil, self.shelf
        lesson.write(one.face, self.sights.judge.recogniser.sha256)
        resident = shelf.put(pupil.name, lesson.folder, pupil.replaces, one.task.settle)
        self.reception.forget(pupil.name)

        def add() -> None:
            now = shelf.residents.get(pupil.name)
            if now is not None and now.sha256 == resident.sha256:  # else deleted by now
                self.painter.artist.add(pupil.name, resident.known)

        self.painter.errand(add)
        self._draw_cover(resident)
        return f"/v1/identities/{pupil.name}"

    def _draw_cover(self, resident: Resident) -> None:
        """Has a picture of somebody drawn that stands for them."""
        try:
            jobs = self.reception.jobs([{"identity": resident.name, "prompt": PORTRAIT}])
        except HttpProblem as problem:
            log.warning("no cover is drawn: %s", problem)
            return
        wants = Wants("png", True, False, None, resident.name)
        try:
            self.line.put(Ticket(jobs, lambda event: None, wants, is_own=True))
        except HttpProblem:  # the server stops
            return

    def _set_cover(self, row: QueuedRow, png: bytes, likeness: float | None) -> None:
        resident = self.shelf.residents.get(row.ticket.wants.cover)
        if resident is not None and resident.known.digest in row.job.about["identities"]:
            mark = hashlib.sha256(png).hexdigest()[:8]
            self.shelf.set_cover(resident, png, mark, likeness)

    def show(self, one: Enrolled, step: int, picture: np.ndarray) -> None:
        """Shows somebody as they are after a step of learning."""
        pixels = images.to_uint8(picture)
        faces = {} if one.face is None else {one.pupil.name: one.face}
        likeness = self.sights.likeness(pixels, faces).get(one.pupil.name)
        about = {"parameters": f"{PORTRAIT}, step {step}"}
        one.task.add_preview(step, images.encode_png(pixels, about), likeness)

    # People.

    async def delete(self, name: str) -> dict[str, Any]:
        """Deletes all that there is of somebody, and ends their learning; returns what there was.

        It holds no thread while it waits for those that learn and draw.

        Raises:
          HttpProblem: there is nobody of this name, and nobody is being learned.
        """
        gone = HttpProblem("conflict", f"{name} was deleted meanwhile")
        async with self.deleting:  # so that one of two is told all
            # The jobs first: whoever is taken in before they are ended is on the shelf, and goes.
            jobs, files, hidden = self.tasks.forget(name), [], None
            is_learned = any(task.kind == "learn" and not task.has_ended for task in jobs)
            await self._cancel(jobs, gone)
            try:
                files, hidden = await self.aside(self.small, self.shelf.hide, name)
            except HttpProblem:
                if not jobs and not self.album.listed(name, 1, None):
                    raise
        jobs += (late := self.tasks.forget(name))  # that were begun until the person was gone
        await self._cancel(late, gone)
        # The pictures while the files of the person are hidden, which says that they have to go.
        files += (pictures := await self.aside(self.small, self.album.remove_of, name))
        if hidden is not None:
            await self.aside(self.small, self.shelf.discard, hidden)
        entries = await self.aside(self.desk, self.reception.forget, name)
        for looking in filter(None, [self.looking.get(task.id) for task in jobs]):
            if not looking.cancel():
                await asyncio.wait([asyncio.wrap_future(looking)])  # for the photos to be let go
        forgetting = self.painter.errand(lambda: self.painter.forget(name))
        # If the client goes, the errand is done all the same.
        entries += await asyncio.shield(asyncio.wrap_future(forgetting))
        return {
            "name": name,
            "files": files,
            "pictures": len(pictures) // 2,
            "cache_entries": entries,
            "jobs": [task.id for task in jobs],
            "was_being_learned": is_learned,
        }

    async def _cancel(self, jobs: Sequence[Task], problem: HttpProblem) -> None:
        for task in jobs:
            await self.aside(self.small, task.cancel, problem)

    def export(self, name: str, programs: Sequence[str]) -> bytes:
        """A zip file of somebody for other programs.

        Raises:
          HttpProblem: there is nobody of this name.
        """
        resident = self.shelf.get(name)
        made = self.shelf.new_folder()  # goes at the next start, if the server is killed meanwhile
        try:
            out = made / name
            path = enhancers.find(self.cfg.enhancer, self.found.folder)
            exporting.export(
                Namespace(
                    identity=str(resident.folder),
                    out=str(out),
                    to=tuple(dict.fromkeys(programs)),
                    overwrite=False,
                    pretrained_model_name_or_path=None,
                    enhancer=str(path) if path and self.needs_enhancer(resident) else None,
                    push_to_hub=None,
                )
            )
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
                for entry in files_of(out):
                    file.write(entry, entry.relative_to(made))
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return buffer.getvalue()

    def needs_enhancer(self, resident: Resident) -> bool:
        """Whether a part that draws somebody is a shared ID-Enhancer's."""
        method = resident.known.method
        return method.shared_adapter or method.shared_kv

    # The end.

    def fail(self, error: BaseException) -> None:
        """Notes why the server cannot go on, and has it end."""
        self.broken = error
        self.at_failure()

    def refuse(self) -> None:
        """Takes nothing new, and ends what has not begun."""
        self.is_stopping.set()
        self.line.stop()
        for task in self.tasks.listed():
            if task.kind == "learn" and task.values["state"] == "queued":
                task.cancel(stopping())

    def finish(self, seconds: float) -> None:
        """Waits until what is under way is done, so many seconds at most; stops then. The second
        time it waits for the first."""
        with self.finishing:
            if self.has_finished:
                return
            until = time.monotonic() + seconds
            while time.monotonic() < until and (self.is_drawing() or self.learning()):
                time.sleep(0.05)
            self.has_finished = True
            for task in self.tasks.listed():
                if not task.has_ended:
                    task.cancel(stopping())
            self.looks.shutdown(cancel_futures=True)
            self.painter.stop()
            self.desk.shutdown(cancel_futures=True)
            self.small.shutdown(cancel_futures=True)
            self.meters.close()

    def is_drawing(self) -> bool:
        """Whether some request is not answered yet."""
        return any(task.kind == "draw" and not task.has_ended for task in self.tasks.listed())
