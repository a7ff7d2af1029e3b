"""From the threads that draw and learn to whoever waits in the event loop."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from starlette.requests import Request

from idea_jax.serve.problems import HttpProblem
from idea_jax.serve.tasks import Task

PING = 10.0  # seconds after which a stream says that it is still there


class Inbox:
    """Events that any thread puts in, and the event loop takes out in order."""

    def __init__(self) -> None:
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue[tuple]()

    def put(self, event: tuple) -> None:
        """Puts one in; where the loop has ended, nobody waits for it."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    async def take(self, seconds: float | None = None) -> tuple | None:
        """The next one; None if it does not come in time."""
        try:
            async with asyncio.timeout(seconds):
                return await self.queue.get()
        except TimeoutError:
            return None


async def gone(request: Request) -> None:
    """Waits until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event(name: str, value: Any) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


COMMENT = b": ping\n\n"


async def pictures(
    inbox: Inbox, total: int, request: Request, cancel: Callable[[], Any]
) -> list[dict[str, Any]]:
    """All pictures of a request, in the order of its rows; cancelled if the client goes.

    Raises:
      HttpProblem: they could not be drawn.
    """
    found: dict[int, dict[str, Any]] = {}

    async def collect() -> None:
        while len(found) < total:
            kind, *values = await inbox.queue.get()
            if kind == "problem":
                raise values[0]
            if kind == "picture":
                found[values[0]] = values[1]

    collecting, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise HttpProblem("gone", "the client has gone")
        collecting.result()
    finally:
        for future in (collecting, leaving):
            future.cancel()
        cancel()
    return [found[place] for place in range(total)]


async def stream_pictures(
    inbox: Inbox, total: int, task: Task, cancel: Callable[[], Any]
) -> AsyncIterator[bytes]:
    """Server-sent events of a request; whoever stops reading has it cancelled."""
    loop, done, last = asyncio.get_running_loop(), 0, None
    began = loop.time()
    try:
        yield event("accepted", {"job": task.id, "total": total})
        while done < total:
            now = task.as_dict()
            told = {name: now[name] for name in ("state", "stage", "done", "total", "position")}
            told["done"] = done
            if told != last and told["state"] in ("queued", "running"):
                yield event("progress", told)
                last = told
            happened = await inbox.take(1.0 if now["state"] == "queued" else PING)
            if happened is None:
                yield COMMENT
            elif happened[0] == "problem":
                yield event("error", happened[1].as_dict())
                return
            elif happened[0] == "picture":
                done += 1
                yield event("picture", happened[2])
        seconds = round(loop.time() - began, 3)
        yield event("done", {"job": task.id, "done": done, "total": total, "seconds": seconds})
    finally:
        cancel()


async def stream_task(task: Task) -> AsyncIterator[bytes]:
    """Server-sent events of a job, from now until it ends; what is skipped is in the next one."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(changed.set)

    with task.lock:
        task.listeners.add(wake)
    try:
        while True:
            changed.clear()
            now = task.as_dict()
            yield event("job", now)
            if task.has_ended and now["ended"] is not None:
                yield event("end", {})
                return
            try:
                async with asyncio.timeout(PING):
                    await changed.wait()
            except TimeoutError:
                yield COMMENT
    finally:
        with task.lock:
            task.listeners.discard(wake)
