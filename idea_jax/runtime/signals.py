"""SIGINT and SIGTERM: a run that is asked to stop ends in order, and at once the second time."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """A signal asked the run to stop; what was reached is on disk."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the step under way can end; see `first_signal`."""
    noted: list[int] = []

    def note(signum):
        noted.append(signum)
        log.warning("stopping after this step; once more to stop at once")

    with first_signal(note):
        yield noted


@contextmanager
def first_signal(act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act` with the number of the first SIGINT or SIGTERM; a second one ends the process at
    once, wherever it is.

    Does nothing outside the main thread, where Python allows no handlers.
    """

    def handle(signum, frame):
        # A handler of ours would have to wait for the end of a long call into XLA.
        for number in STOPPING:
            signal.signal(number, signal.SIG_DFL)
        act(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
