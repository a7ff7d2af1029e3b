"""`idea-studio`: people and pictures in the browser."""

import os
import secrets
import sys
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idea_jax import cli
from idea_jax.config.settings import setting
from idea_jax.runtime.files import say
from idea_jax.serve.settings import TOKEN, ServeConfig, is_loopback


@dataclass(frozen=True, kw_only=True)
class StudioConfig(ServeConfig):
    """A server, and how its page is opened."""

    open: bool = setting(False, "open the page in a browser")
    examples: str | None = setting(
        None,
        "folder of people (PERSON/*.png) whose photos the page offers to try; they are learned, "
        "with their faces and photos kept, if nobody is there yet",
    )


def address(host: str, port: int, token: str | None) -> str:
    """Where the page is. The token stands behind #, which browsers send to nobody.

    Args:
      host: that the server listens at; 0.0.0.0 and :: are all of the machine's addresses, of which
        this machine itself reaches the loopback one.
    """
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/studio/" + (f"#token={token}" if token else "")


def run(cfg: StudioConfig) -> list[Path]:
    """Serves the page and what it needs until SIGINT or SIGTERM comes.

    Raises:
      as `idea_jax.serve.run.run`; ImageError: the examples cannot be used.
    """
    from idea_jax.serve import run as serving

    if not is_loopback(cfg.host) and cfg.token_file is None:
        # A new one at each start; the page asks for it, or has it from the address.
        os.environ.setdefault(TOKEN, secrets.token_urlsafe(32))
    routers: list[Any] = []
    examples: Any = {}
    if cfg.examples is not None:
        from idea_jax.serve import examples as trial

        examples = trial.read_examples(Path(cfg.examples))
        routers.append(trial.example_routes(examples))

    def opened(port: int, service: Any, token: str | None) -> None:
        if examples:
            trial.learn_examples(service, examples)
        url = address(cfg.host, port, token)
        say(url)
        if cfg.open:
            # The socket listens already: the browser waits for the answer.
            webbrowser.open(url)

    return serving.run(cfg, opened, routers)


def starting() -> Callable:
    """What runs."""
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return cli.main(
        StudioConfig,
        starting,
        argv,
        prog="idea-studio",
        description="Learn, draw and compare people in the browser.",
    )


if __name__ == "__main__":
    sys.exit(main())
