"""Programs that are compiled beside the drawing, one after the other."""

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

GUESS = 10.0  # seconds that a program takes, until one has been timed


class Compiler:
    """A thread that compiles, and what it has compiled; any thread may ask.

    A program that was begun is finished, also where nobody waits for it any more.

    Attributes:
      ready: what the programs that are there are called.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "compiler")
        self.ready: set[Hashable] = set()
        self.under_way: dict[Hashable, Future] = {}
        self.began: dict[Hashable, float] = {}
        self.usual, self.lock = GUESS, threading.Lock()

    def has(self, key: Hashable, work: Callable[[], Any]) -> bool:
        """Whether a program is compiled; if not, `work` compiles it in the other thread."""
        with self.lock:
            if key in self.ready:
                return True
            if key not in self.under_way:
                self.under_way[key] = self.pool.submit(self._timed, key, work)
            if self.under_way[key].done():
                # What was wrong with it will be wrong with the call, which says so.
                self.ready.add(key)
                del self.under_way[key]
            return key in self.ready

    def _timed(self, key: Hashable, work: Callable[[], Any]) -> None:
        self.began[key] = time.monotonic()
        try:
            work()
        finally:
            self.usual = time.monotonic() - self.began.pop(key)

    def seconds_left(self, key: Hashable) -> float | None:
        """About how long a program will take yet; None for one that is not being compiled.

        One that takes longer than the one before it is thought to be done after half as long again.
        """
        left, now = 0.0, time.monotonic()
        with self.lock:
            for other, future in self.under_way.items():
                if not future.done():
                    gone = now - self.began.get(other, now)
                    left += max(self.usual - gone, gone / 2)
                    if other == key:
                        return left
        return None

    def close(self) -> None:
        """Lets go of what was not begun."""
        self.pool.shutdown(cancel_futures=True)
