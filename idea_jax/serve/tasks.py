"""What clients are told of their jobs while the server works on them."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from idea_jax.serve.problems import HttpProblem
from idea_jax.serve.shelf import moment

LISTED = 200  # jobs that have ended and are still told of
CANCELLED = "the job was cancelled"
FINAL = ("done", "failed", "cancelled")


class Task:
    """A job: pictures that are drawn, or somebody who is learned.

    Args:
      kind: "draw" or "learn"; total: of its pictures or steps; name: of whom is learned.

    Attributes:
      stop: ends the work; at_end: is told the last state; position: how many are ahead of it.
      is_compiled_for: whether what it waits for is a program that is being compiled.
      is_unwanted: whether the work is to end; is_settled: whether it is too late for that.
    """

    def __init__(self, kind: str, total: int, name: str | None = None):
        self.id, self.kind = secrets.token_hex(16), kind
        self.lock = threading.Lock()
        self.values: dict[str, Any] = {
            "state": "queued",
            "created": moment(),
            "started": None,
            "ended": None,
            "stage": "waiting",
            "done": 0,
            "total": total,
            "unit": "pictures" if kind == "draw" else "steps",
            "name": name,
            "loss": None,
            "problem": None,
            "identity": None,
        }
        self.previews: dict[int, tuple[bytes, float | None]] = {}
        self.listeners: set[Callable[[], None]] = set()
        self.people: set[str] = {name} if name else set()
        self.stop: Callable[[HttpProblem], Any] = _nothing
        self.at_end: Callable[[str], Any] = _nothing
        self.position: Callable[[], int | None] = _nowhere
        self.is_compiled_for: Callable[[], bool] = _no
        self.is_unwanted, self.is_settled = False, False

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens."""
        return self.values["state"] in FINAL

    def change(self, **values: Any) -> None:
        """Notes what has changed, unless it has ended, and wakes those who look."""
        with self.lock:
            if self.has_ended:
                return
            state = values.get("state")
            if state == "running" and self.values["started"] is None:
                values["started"] = moment()
            if state in FINAL:
                values |= {"ended": moment(), "stage": ""}
            self.values |= values
            listeners = list(self.listeners)
        if state in FINAL:
            self.at_end(state)
            # Whatever these hold, such as pictures that nobody fetched, is let go.
            self.stop, self.position, self.is_compiled_for = _nothing, _nowhere, _no
        for wake in listeners:
            wake()

    def fail(self, problem: HttpProblem) -> None:
        """Ends it with what was wrong, unless it is being cancelled."""
        if not self.is_unwanted:
            self.change(state="failed", problem=problem.as_dict())

    def cancel(self, problem: HttpProblem | None = None) -> None:
        """Ends it because nobody wants it any more, unless it is settled; the problem is what those
        are told who wait."""
        problem, stop = problem or HttpProblem("conflict", CANCELLED), self.stop
        with self.lock:
            if self.is_settled:
                return
            self.is_unwanted = True
        self.change(state="cancelled", problem=problem.as_dict())
        stop(problem)

    def settle(self) -> None:
        """Decides that what came of it is kept.

        Raises:
          HttpProblem: nobody wants it any more.
        """
        with self.lock:
            if self.is_unwanted:
                raise HttpProblem("conflict", CANCELLED)
            self.is_settled = True

    def add_preview(self, step: int, png: bytes, likeness: float | None) -> None:
        """Shows a picture of somebody as they are after a step of learning."""
        with self.lock:
            self.previews[step] = png, likeness
        self.change()

    def as_dict(self) -> dict[str, Any]:
        """What clients are told."""
        with self.lock:
            previews = [
                {"step": step, "url": f"/v1/jobs/{self.id}/previews/{step}", "likeness": likeness}
                for step, (_, likeness) in sorted(self.previews.items())
            ]
            values = dict(self.values)
        position = None
        if values["state"] == "queued":
            position = self.position()
            values["stage"] = "compiling" if self.is_compiled_for() else values["stage"]
        return {
            "id": self.id,
            "kind": self.kind,
            **values,
            "position": position,
            "previews": previews,
        }


def _nothing(_: Any) -> None:
    return None


def _nowhere() -> int | None:
    return None


def _no() -> bool:
    return False


class Tasks:
    """The jobs of a process, those that have ended up to a number; for any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.all: OrderedDict[str, Task] = OrderedDict()

    def add(self, task: Task) -> Task:
        """Lists a job; the oldest of those that have ended go beyond `LISTED`."""
        with self.lock:
            self.all[task.id] = task
            ended = [key for key, one in self.all.items() if one.has_ended]
            for key in ended[: max(0, len(ended) - LISTED)]:
                del self.all[key]
        return task

    def get(self, key: str) -> Task:
        """A job.

        Raises:
          HttpProblem: there is none; it may have been one of an earlier start of the server.
        """
        with self.lock:
            task = self.all.get(key)
        if task is None:
            raise HttpProblem("not-found", "there is no such job, or none any more")
        return task

    def listed(self) -> list[Task]:
        """All of them, the newest first."""
        with self.lock:
            return list(self.all.values())[::-1]

    def is_learning(self, name: str) -> bool:
        """Whether somebody of this name is learned, or waits for it."""
        with self.lock:
            return any(
                task.values["name"] == name and not task.has_ended for task in self.all.values()
            )

    def forget(self, name: str) -> list[Task]:
        """Lists the jobs no more that somebody has a part in; returns them, as they are."""
        with self.lock:
            gone = [task for task in self.all.values() if name in task.people]
            for task in gone:
                del self.all[task.id]
        return gone
