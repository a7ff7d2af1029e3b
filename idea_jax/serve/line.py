"""The rows that wait to be drawn: bounded, fair between requests, in calls of one kind."""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from idea_jax.sampling.engine import Kind
from idea_jax.sampling.rows import Job
from idea_jax.serve.problems import HttpProblem, busy, stopping

PACE = 0.3  # how much of the speed is that of the newest call


class QueuedRow(NamedTuple):
    """A row of a request: its place in it, what is drawn, and the kind of rows that it is of."""

    ticket: "Ticket"
    place: int
    job: Job
    kind: Kind


class Ticket:
    """A request for pictures.

    Args:
      jobs: its rows, with the kind of each.
      tell: called with ("begun",), ("picture", place, what is told of it) and ("problem", it), from
        any thread; after a problem, or the last picture, no more.
      wants: what is to be done with each picture, for whoever encodes it.
      is_own: asked for by the server itself, so that no deadline and no limit counts.
    """

    def __init__(
        self,
        jobs: list[tuple[Job, Kind]],
        tell: Callable[[tuple], None],
        wants: Any,
        *,
        is_own: bool = False,
    ):
        self.tell, self.wants, self.is_own = tell, wants, is_own
        self.rows = deque(
            QueuedRow(self, place, job, kind) for place, (job, kind) in enumerate(jobs)
        )
        self.people = {name for job, _ in jobs for name in job.row.cast}
        self.left = len(self.rows)
        self.came = time.monotonic()
        self.has_begun, self.is_closed = False, False
        self.lock = threading.RLock()

    def begin(self) -> None:
        """Notes that the first row is being drawn."""
        with self.lock:
            if not self.has_begun and not self.is_closed:
                self.has_begun = True
                self.tell(("begun",))

    def deliver(self, place: int, make: Callable[[], Any]) -> None:
        """Hands a picture over, unless nobody waits for it any more; `make` returns what is told,
        and has its effects only then."""
        with self.lock:
            if self.is_closed:
                return
            self.tell(("picture", place, make()))
            self.left -= 1
            self.is_closed = self.left == 0

    def close(self, problem: HttpProblem | None = None) -> bool:
        """Ends the request, with a problem that is told, or none; False if it had ended."""
        with self.lock:
            if self.is_closed:
                return False
            self.is_closed = True
            self.rows.clear()
            if problem is not None:
                self.tell(("problem", problem))
            return True


class Line:
    """What waits. Requests take turns, a row each, so that a large one keeps nobody waiting.

    Args:
      most: rows that may wait; deadline: seconds that a request may wait for its first row.

    Attributes:
      why_late: what keeps rows of a kind besides other rows, None if that is nothing; called while
        the line is held.
    """

    def __init__(self, most: int, deadline: float):
        self.most, self.deadline = most, deadline
        self.tickets: deque[Ticket] = deque()
        self.changed = threading.Condition()
        self.is_stopping = False
        self.seconds_per_row = 0.5  # until it is known
        self.why_late: Callable[[Kind], HttpProblem | None] = lambda kind: None

    def waiting(self) -> int:
        """Rows that wait."""
        with self.changed:
            return sum(len(ticket.rows) for ticket in self.tickets)

    def ahead_of(self, ticket: Ticket) -> int:
        """Rows of those who came before a request that has not begun; 0 once it has."""
        with self.changed:
            if ticket.has_begun or ticket not in self.tickets:
                return 0
            before = itertools.takewhile(lambda other: other is not ticket, self.tickets)
            return sum(len(other.rows) for other in before)

    def put(self, ticket: Ticket) -> None:
        """Lets a request wait.

        Raises:
          HttpProblem: the line is full, or the server stops.
        """
        with self.changed:
            if self.is_stopping:
                raise stopping()
            waiting = sum(len(other.rows) for other in self.tickets)
            if waiting + len(ticket.rows) > self.most and not ticket.is_own:
                raise busy(f"{waiting} rows wait already", waiting * self.seconds_per_row)
            self.tickets.append(ticket)
            self.changed.notify_all()

    def take(
        self, size_for: Callable[[int], int], is_ready: Callable[[QueuedRow], bool]
    ) -> tuple[list[QueuedRow], int]:
        """The rows of the next call, all of one kind, and its size; ([], 0) if there are none.

        The first request that has a row which is ready decides the kind, and those that have rows
        of it fill the call in turns. Whoever got one goes to the end.

        Args:
          size_for: how large the call for so many rows is.
          is_ready: whether a row can be drawn now; one whose program is being compiled cannot.
        """
        with self.changed:
            self.expire()
            first = next(
                (row for ticket in self.tickets for row in ticket.rows if is_ready(row)), None
            )
            if first is None:
                return [], 0
            alike = sum(row.kind == first.kind for ticket in self.tickets for row in ticket.rows)
            size = size_for(alike)
            taken: list[QueuedRow] = []
            while len(taken) < min(size, alike):
                for ticket in list(self.tickets):
                    row = next((r for r in ticket.rows if r.kind == first.kind), None)
                    if row is None:
                        continue
                    ticket.rows.remove(row)
                    taken.append(row)
                    if len(taken) == size:
                        break
            served = {id(row.ticket) for row in taken}
            left = [ticket for ticket in self.tickets if ticket.rows]
            left.sort(key=lambda ticket: id(ticket) in served)  # stable: whoever was served is last
            self.tickets = deque(left)
        for row in taken:
            row.ticket.begin()
        return taken, size

    def expire(self) -> None:
        """Ends requests that have waited too long for their first row, and says what kept them."""
        with self.changed:
            latest = time.monotonic() - self.deadline
            for ticket in list(self.tickets):
                if ticket.is_closed:
                    self.tickets.remove(ticket)
                elif ticket.came < latest and not ticket.has_begun and not ticket.is_own:
                    self.tickets.remove(ticket)
                    ticket.close(self._lateness(ticket))

    def _lateness(self, ticket: Ticket) -> HttpProblem:
        """What keeps a request: other rows, if it has one that could be drawn."""
        for kind in dict.fromkeys(row.kind for row in ticket.rows):
            reason = self.why_late(kind)
            if reason is None:
                break
        else:
            return reason
        waiting = sum(len(other.rows) for other in self.tickets)
        what = f"none of the rows could be drawn within {self.deadline:g} s"
        return busy(what, waiting * self.seconds_per_row)

    def cancel(self, ticket: Ticket, problem: HttpProblem | None = None) -> bool:
        """Ends a request, whether it waits or is being drawn; False if it had ended."""
        with self.changed:
            if ticket in self.tickets:
                self.tickets.remove(ticket)
        return ticket.close(problem)

    def note_pace(self, rows: int, seconds: float) -> None:
        """Notes how long a call took, for what is told to those who have to wait."""
        newest = seconds / max(1, rows)
        self.seconds_per_row += PACE * (newest - self.seconds_per_row)

    def stop(self) -> None:
        """Refuses new requests, and those that have not begun."""
        with self.changed:
            self.is_stopping = True
            idle = [ticket for ticket in self.tickets if not ticket.has_begun]
            self.tickets = deque(ticket for ticket in self.tickets if ticket.has_begun)
            self.changed.notify_all()
        for ticket in idle:
            ticket.close(stopping())
