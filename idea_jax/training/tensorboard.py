"""TensorBoard's log of a run, written in the calling thread.

tensorboardX's own `SummaryWriter` leaves the writing to another thread. On a full disk that thread
dies, and a run that still has something to log waits for it for ever.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from idea_jax.runtime.files import cannot_write

FLUSH_SECONDS = 10.0


class Log:
    """An event file in a folder of its own.

    Every method raises WriteError (`idea_jax.runtime.files`) if the file cannot be written.
    """

    def __init__(self, folder: Path):
        with without_torch():
            from tensorboardX.event_file_writer import EventsWriter

        self.folder = folder
        with self.writing():
            folder.mkdir(parents=True, exist_ok=True)
            # Named by the second otherwise: a run right after another would replace its log.
            suffix = f".{time.time_ns()}"
            self.events = EventsWriter(str(folder / "events"), suffix)
        self.flushed = time.monotonic()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Logs one number for each name."""
        from tensorboardX import summary

        for name, value in values.items():
            self.add(summary.scalar(name, value), step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Logs a picture, uint8[H, W, 3]."""
        from tensorboardX import summary

        self.add(summary.image(name, pixels, dataformats="HWC"), step)

    def add(self, summary: Any, step: int) -> None:
        """Logs a `Summary` protocol buffer."""
        from tensorboardX.proto.event_pb2 import Event

        with self.writing():
            self.events.write_event(Event(summary=summary, step=step, wall_time=time.time()))
            if time.monotonic() - self.flushed > FLUSH_SECONDS:
                self.events.flush()
                self.flushed = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        with self.writing():
            self.events.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Names the log in the errors of the operating system."""
        try:
            yield
        except OSError as error:
            raise cannot_write(self.folder, error) from error


@contextmanager
def without_torch() -> Iterator[None]:
    """Hides PyTorch from the first import of tensorboardX, unless it has been imported already.

    tensorboardX imports it where it is installed, for the type of an annotation: a second or more
    of every start.
    """
    is_hidden = sys.modules.keys().isdisjoint(("torch", "tensorboardX"))
    if is_hidden:
        sys.modules["torch"] = None
    try:
        yield
    finally:
        if is_hidden:
            del sys.modules["torch"]
