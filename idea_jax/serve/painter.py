"""The one thread that owns JAX: it draws rows and learns people, and shares its time between them.

One call is under way while the pictures of the one before are fetched, and encoded in threads.
Between calls somebody is taught for about as long as a call takes. Programs that are not compiled
yet are compiled beside it, so that only those wait who need them.
"""

import dataclasses
import logging
import queue
import re
import shutil
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from idea_jax.errors import InputError
from idea_jax.faces import models as face_models
from idea_jax.runtime import memory
from idea_jax.sampling import engine
from idea_jax.serve.compiling import Compiler
from idea_jax.serve.line import Line, QueuedRow
from idea_jax.serve.problems import HttpProblem, compiling, stopping, warming_up
from idea_jax.serve.school import Lesson, Pupil, School
from idea_jax.serve.tasks import Task

log = logging.getLogger(__name__)

BACKLOG = 8  # pictures for each thread that wait to be encoded, at most
AT_ONCE = 4  # people without a step who are learned side by side
NAP = 0.02  # seconds until something that runs elsewhere is looked at again
GONE = "somebody on a picture was deleted or learned anew meanwhile"
REST = 0.5  # seconds of waiting where nothing is to be done


class DrawnCall(NamedTuple):
    """A call under way: its rows, in order, and when it was begun."""

    call: engine.Call
    rows: list[QueuedRow]
    began: float


@dataclass(eq=False)
class Enrolled:
    """Somebody whose photos were looked at, and who waits to be learned.

    Attributes:
      seen: `portraits.Portraits` of the photos; face: by which likeness is told, if it is.
      make_folder: makes the one for what is learned, which goes if the person is not taken in.
      finish: writes what was learned and takes the person in, elsewhere; returns where they are.
    """

    task: Task
    pupil: Pupil
    seen: Any
    face: np.ndarray | None
    make_folder: Callable[[], Path]
    finish: Callable[["Enrolled", Lesson], str]


class Painter(threading.Thread):
    """Draws and teaches until it is stopped.

    Args:
      artist: the engine, which nobody else touches.
      line: what waits to be drawn.
      deliver: takes (row, picture float32[h, w, 3]) of each that was drawn, in threads.
      shown: takes (enrolled, step, picture) of somebody under way.
      threads: that encode.
      note: called with the seconds and rows of each call.
    """

    def __init__(
        self,
        artist: engine.Engine,
        line: Line,
        school: School,
        deliver: Callable[[QueuedRow, np.ndarray], None],
        shown: Callable[[Enrolled, int, np.ndarray], None],
        threads: int,
        note: Callable[[float, int], None],
    ):
        super().__init__(name="painter", daemon=True)
        self.artist, self.line, self.school = artist, line, school
        self.deliver, self.shown, self.note = deliver, shown, note
        self.errands: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        self.encoders = ThreadPoolExecutor(threads, "encoder")
        self.writers = ThreadPoolExecutor(1, "writer")
        self.compiler = Compiler()
        self.room = threading.BoundedSemaphore(BACKLOG * threads)
        self.quick: deque[Enrolled] = deque()
        self.pupils: deque[Enrolled] = deque()
        self.lessons: deque[tuple[Enrolled, Generator[bool, None, None]]] = deque()
        self.shown_row: engine.PictureRow | None = None  # of pictures on the way
        self.call_seconds, self.fetched, self.was_taught = 0.0, 0.0, False
        self.is_ready, self.is_over = threading.Event(), threading.Event()
        self.ending, self.has_ended = threading.Lock(), False
        line.why_late = self.why_late

    # What other threads call.

    def errand(self, work: Callable[[], Any]) -> Future:
        """Has something done between two calls, by the thread that owns JAX."""
        future: Future = Future()
        with self.ending:
            if self.has_ended:
                future.set_exception(stopping())
            else:
                self.errands.put((work, future))
        self._wake()
        return future

    def enroll(self, one: Enrolled) -> None:
        """Lets somebody wait to be learned; whoever needs no step comes first."""
        (self.pupils if one.pupil.steps else self.quick).append(one)
        self._wake()

    def learning(self) -> int:
        """People who are being learned or wait for it."""
        return len(self.pupils) + len(self.quick) + len(self.lessons)

    def ahead_of(self, task: Task) -> int:
        """People who are learned before somebody who waits."""
        waiting = [one.task for one in (*self.quick, *self.pupils)]
        return waiting.index(task) + len(self.lessons) if task in waiting else 0

    def stop(self) -> None:
        """Ends the thread after the call under way, and waits until its pictures are delivered."""
        self.is_over.set()
        self._wake()
        if self.ident is not None:
            self.join()
        for pool in (self.encoders, self.writers):
            pool.shutdown(cancel_futures=True)
        self.compiler.close()

    def why_late(self, kind: engine.Kind) -> HttpProblem | None:
        """What keeps a row of a kind besides other rows, while the line is held; None if that is
        nothing."""
        if not self.is_ready.is_set():
            return warming_up()
        left = self.compiler.seconds_left(kind)
        return None if left is None else compiling(described(kind), left)

    def _wake(self) -> None:
        with self.line.changed:
            self.line.changed.notify_all()

    # What the thread does.

    def run(self) -> None:
        under_way: DrawnCall | None = None
        while not self.is_over.is_set():
            try:
                self._run_errands()
                under_way = self._draw(under_way)
                self.was_taught = self._teach()
                if under_way is None and not self.was_taught:
                    self._rest()
            except Exception as error:  # a mistake of this file; those who wait should not pay
                as_problem(error)
                time.sleep(REST)
        if under_way is not None:
            self._fetch(under_way)
        for one, lesson in self.lessons:
            one.task.cancel()
            lesson.close()
        for one in (*self.quick, *self.pupils):
            one.task.cancel()
        with self.ending:
            self.has_ended = True
        self._run_errands()

    def _rest(self) -> None:
        """Waits until something comes, or for as long as it may take elsewhere."""
        is_waiting = self.lessons or self.compiler.under_way or self.line.waiting()
        with self.line.changed:
            if self.errands.empty() and not self.is_over.is_set():
                self.line.changed.wait(NAP if is_waiting else REST)

    def _run_errands(self) -> None:
        while True:
            try:
                work, future = self.errands.get_nowait()
            except queue.Empty:
                return
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    def _draw(self, under_way: DrawnCall | None) -> DrawnCall | None:
        """Starts the next call, then fetches the pictures of the one before."""
        rows, size = self.line.take(
            lambda count: engine.size_for(count, self.artist.sizes), self._is_ready
        )
        newest, rows = None, self._still_here(rows)
        if rows:
            try:
                began = time.monotonic()
                call = self.artist.launch([row.job.row for row in rows], size)
                newest = DrawnCall(call, rows, began)
            except FileNotFoundError:
                self._give_up(rows, HttpProblem("conflict", GONE))
            except Exception as error:
                self._give_up(rows, error)
        if under_way is not None:
            self._fetch(under_way)
        return newest

    def _still_here(self, rows: list[QueuedRow]) -> list[QueuedRow]:
        """Those rows whose people are as they were when they were asked for; ends the others."""
        people, here = self.artist.texts.people, []
        for row in rows:
            known = [people[name].digest for name in row.job.row.cast if name in people]
            if known == row.job.about["identities"]:
                here.append(row)
            else:
                self.line.cancel(row.ticket, HttpProblem("conflict", GONE))
        return here

    def _fetch(self, drawn: DrawnCall) -> None:
        """Waits for a call, and has its pictures encoded."""
        try:
            pictures = engine.fetch(range(len(drawn.rows)), drawn.call)
        except Exception as error:
            self._give_up(drawn.rows, error)
            return
        now = time.monotonic()
        # What was begun while the call before was still running took less than it seems.
        seconds = now - max(drawn.began, self.fetched)
        self.fetched = now
        if not self.was_taught:
            self.call_seconds = seconds
        self.line.note_pace(len(drawn.rows), seconds)
        self.note(seconds, len(drawn.rows))
        for place, picture in pictures:
            self.room.acquire()
            self.encoders.submit(self._encode, drawn.rows[place], picture)

    def _encode(self, row: QueuedRow, picture: np.ndarray) -> None:
        try:
            self.deliver(row, picture)
        except Exception as error:
            self._give_up([row], error)
        finally:
            self.room.release()

    def _give_up(self, rows: list[QueuedRow], error: Exception) -> None:
        """Ends the requests of rows that cannot be drawn."""
        problem = as_problem(error)
        for ticket in {id(row.ticket): row.ticket for row in rows}.values():
            self.line.cancel(ticket, problem)

    def _is_ready(self, row: QueuedRow) -> bool:
        """Whether the program of a row is compiled; otherwise it will be, beside this thread."""
        return self.compiler.has(row.kind, lambda: self.compile(row.kind))

    def compile(self, kind: engine.Kind) -> None:
        """Compiles the programs of a kind, or reads them as an earlier run has kept them."""
        artist = self.artist
        for size in artist.sizes:
            lowered = engine.lower_call(artist.model, kind, size, artist.devices, artist.each)
            lowered.compile()

    # Learning.

    def _teach(self) -> bool:
        """Teaches for about as long as a call takes; whether the devices had anything to do.

        Whoever needs no step is not kept waiting by somebody with hundreds.
        """
        while self.quick and len(self.lessons) < AT_ONCE:
            self._begin(self.quick.popleft())
        if self.pupils and not any(one.pupil.steps for one, _ in self.lessons):
            self._begin(self.pupils.popleft())
        has_taught, idle, until = False, 0, time.monotonic() + self.call_seconds
        while idle < len(self.lessons):
            one, lesson = self.lessons.popleft()
            is_working = next(lesson, None)
            if is_working is not None:
                self.lessons.append((one, lesson))
            idle = 0 if is_working else idle + (is_working is not None)
            has_taught = has_taught or is_working is not False
            if time.monotonic() >= until:
                break
        return has_taught

    def _begin(self, one: Enrolled) -> None:
        if not one.task.has_ended:
            self.lessons.append((one, self._lesson(one)))

    def _lesson(self, one: Enrolled) -> Generator[bool, None, None]:
        """Learns somebody; yields after each part whether the devices had work."""
        task, lesson, folder = one.task, None, None
        written: Future | None = None
        shown: list[Future] = []
        try:
            yield from self._compiled(one)
            task.change(stage="learning")
            folder = one.make_folder()
            lesson = self.school.begin(one.pupil, one.seen, folder)
            before = 0
            for _ in lesson.steps():
                if task.is_unwanted:
                    return
                task.change(done=lesson.taken, loss=lesson.loss)
                if lesson.is_shown(before):
                    shown += self._show(one, lesson)
                before = lesson.taken
                yield True
            task.change(stage="writing", done=lesson.taken)
            written = self.writers.submit(one.finish, one, lesson)
            while not all(future.done() for future in (written, *shown)):
                yield False
            written.result()
        except Exception as error:
            task.fail(as_problem(error))
        finally:
            if written is not None and written.exception() is None:  # waits for it
                task.change(state="done", identity=written.result())
            if lesson is not None:
                lesson.close()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def forget(self, name: str) -> int:
        """Lets go of somebody whose jobs have ended; returns how many entries of caches went."""
        for one in (*self.quick, *self.pupils):
            if one.task.has_ended:
                (self.pupils if one.pupil.steps else self.quick).remove(one)
        for pair in tuple(self.lessons):
            if pair[0].task.has_ended:
                self.lessons.remove(pair)
                pair[1].close()
        return self.artist.remove(name)

    def _compiled(self, one: Enrolled) -> Generator[bool, None, None]:
        """Waits until the program of somebody's steps is compiled."""
        steps, school = one.pupil.steps, self.school
        one.task.change(state="running", stage="compiling" if steps else "learning")
        course = school.course(steps, len(one.seen.pictures))
        key = steps, course.work.shape.photo_slots
        while steps and not self.compiler.has(key, lambda: course.lower().compile()):
            if one.task.is_unwanted:
                return
            yield False

    def _show(self, one: Enrolled, lesson: Lesson) -> list[Future]:
        """Draws somebody as they are by now; returns what tells when that is shown."""
        if self.shown_row is None:
            return []
        name = f"({one.task.id})"
        row = dataclasses.replace(self.shown_row, cast=(name,))
        self.artist.add(name, lesson.person_now())
        try:
            ((_, picture),) = engine.fetch(range(1), self.artist.launch([row]))
        finally:
            self.artist.remove(name)
        return [self.encoders.submit(self._shown, one, lesson.taken, picture)]

    def _shown(self, one: Enrolled, step: int, picture: np.ndarray) -> None:
        try:
            self.shown(one, step, picture)
        except Exception as error:  # a picture on the way costs nobody what is learned
            as_problem(error)


def described(kind: engine.Kind) -> str:
    """The pictures of a kind, in words."""
    sampling, (height, width) = kind.sampling, kind.sampling.size
    return (
        f"pictures of {width} x {height} in {sampling.steps} steps of {sampling.scheduler}, with "
        "prompts of this length,"
    )


def as_problem(error: BaseException) -> HttpProblem:
    """What a client is told of an error.

    Of a mistake of theirs, what it is, without the server's folders. Of others the log has what was
    raised and where, and not its words: they may be somebody's.
    """
    if isinstance(error, HttpProblem):
        return error
    if isinstance(error, face_models.FaceError):
        return HttpProblem("no-face", without_folders(error.plain))
    if isinstance(error, InputError) and not isinstance(error, OSError):
        return HttpProblem("invalid", without_folders(error.plain))
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s at\n%s", type(error).__name__, where)
    if isinstance(error, OSError):
        reason = getattr(error.__cause__ or error, "strerror", None) or type(error).__name__
        return HttpProblem("internal", f"the server cannot use its disk: {reason}")
    if memory.is_out_of_memory(error):
        return HttpProblem("internal", memory.describe_memory(error, None))
    return HttpProblem("internal", "the server has made a mistake, which its log tells")


def without_folders(text: str) -> str:
    """A message with the names of files, and not where they are."""
    return re.sub(r"(?:/[^\s/:;,()']+)+/(?=[^\s/])", "", text)
