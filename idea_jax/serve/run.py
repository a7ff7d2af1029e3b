"""Serving until a signal comes: the command."""

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from idea_jax import jobs
from idea_jax.config.settings import ConfigError
from idea_jax.runtime.files import say
from idea_jax.runtime.signals import Interrupted
from idea_jax.serve.settings import ServeConfig, read_token

log = logging.getLogger(__name__)

IDLE = 15  # seconds that a connection without a request stays open
HEADER_SECONDS = 20.0  # in which the first lines of a request have to arrive
NAMING = ("idea_jax.exporting", "idea_jax.training.learner")  # whose notices name people
EXTRA = 10.0  # seconds, beyond the grace, until answers that are still being sent are cut off


def run(
    cfg: ServeConfig, opened: Callable | None = None, routers: Sequence[Any] = ()
) -> list[Path]:
    """Serves until SIGINT or SIGTERM comes.

    Args:
      opened: called with the port, the service and the token once requests are about to be taken;
        by default the address is printed.
      routers: more routes.

    Raises:
      ConfigError: packages are missing, the token is, or the port is taken.
      JobsError: another server uses the folder.
      Interrupted: as soon as the first signal has been obeyed.
      InputError: the model, the face models or the folder cannot be used.
    """
    try:
        import uvicorn

        from idea_jax.serve.app import create_app
    except ImportError as error:
        raise ConfigError(
            f"the package {error.name} is missing; install it, in the folder of this project, "
            "with: pip install '.[serve]'"
        ) from error
    token = read_token(cfg)
    for name in NAMING:
        logging.getLogger(name).setLevel(logging.WARNING)
    with jobs.only_run(Path(cfg.data), 0, "--data"), bound(cfg) as listener:
        from idea_jax.serve.opening import open_service

        service = open_service(cfg)
        config = uvicorn.Config(
            create_app(service, token, routers),
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=IDLE,
            timeout_graceful_shutdown=round(cfg.grace + EXTRA),
            ws="none",
        )
        host, port = listener.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        if opened is None:
            say(f"http://{name}:{port}")
        else:
            opened(port, service, token)
        server = server_of(uvicorn, config, service)
        server.run([listener])
    if service.broken is not None:
        raise service.broken
    raise Interrupted(server.signum, "stopped")


def bound(cfg: ServeConfig) -> socket.socket:
    """A socket that listens where the settings say; before anything slow is done.

    Raises:
      ConfigError: the address is not here, or taken.
    """
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    try:
        return socket.create_server((cfg.host, cfg.port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"--host {cfg.host} --port {cfg.port} cannot be listened at ({error.strerror}): choose "
            "another port, 0 for any that is free"
        ) from error


class Late:
    """Which connections have had no whole request for too long.

    uvicorn waits for the first one, and for the rest of one that has begun, for as long as the
    client likes: so many of these would keep everybody else out, and need no token.
    """

    def __init__(self) -> None:
        self.waiting: dict[Any, tuple[Any, float]] = {}

    def among(self, connections: Iterable[Any]) -> list[Any]:
        """Those of uvicorn's connections that are to be closed.

        Args:
          connections: all that are open; `cycle` is the newest request of each, None for none.
        """
        now, waiting = time.monotonic(), {}
        for one in connections:
            cycle = one.cycle
            if cycle is not None and not cycle.response_complete:
                continue
            before, since = self.waiting.get(one, (None, now))
            waiting[one] = cycle, since if before is cycle else now
        self.waiting = waiting
        return [one for one, (_, since) in waiting.items() if now - since > HEADER_SECONDS]


def server_of(uvicorn: Any, config: Any, service: Any) -> Any:
    """uvicorn's server, which at the first signal refuses what is new, and the second time ends at
    once."""

    late = Late()

    class Serving(uvicorn.Server):  # type: ignore[misc, name-defined]
        signum: signal.Signals = signal.SIGTERM
        should_exit: bool

        async def on_tick(self, counter: int) -> bool:
            if counter % 10 == 0:  # once a second
                for connection in late.among(self.server_state.connections):
                    connection.transport.close()
            return await super().on_tick(counter)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self.should_exit:
                signal.signal(sig, signal.SIG_DFL)
                signal.raise_signal(sig)
            self.signum, self.should_exit = signal.Signals(sig), True
            log.warning("stopping once what is under way is done; once more to stop at once")

        async def shutdown(self, sockets: Any = None) -> None:
            # What waits is refused, and what is under way gets its time, while the connections of
            # both are waited for.
            service.refuse()
            finishing = asyncio.ensure_future(asyncio.to_thread(service.finish, service.cfg.grace))
            await super().shutdown(sockets)
            await finishing

    server = Serving(config)

    def end() -> None:
        server.should_exit = True

    service.at_failure = end
    service.connections = lambda: len(server.server_state.connections)
    return server
