"""What every request passes: host, origin, token, size; and what every answer says.

It is ASGI around the routes, so that what is refused here costs no more than its headers.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any

from idea_jax.serve.metrics import Meters
from idea_jax.serve.painter import as_problem
from idea_jax.serve.problems import MEDIA, HttpProblem, busy
from idea_jax.serve.settings import MEGA, ServeConfig

log = logging.getLogger(__name__)

COOKIE = "idea_session"
# What needs no token: whether the server lives, how to show one, and the page that asks for it.
OPEN = ("/healthz", "/readyz", "/v1/session", "/", "/favicon.ico")
OPEN_BELOW = "/studio/"
SMALL_BODY = 2 * MEGA  # of everything that takes no photos
UPLOADS = ("/v1/identities", "/v1/faces")
CONNECTIONS = 1000  # at the same time, at most
BODY_SECONDS = 60.0  # in which a request has to arrive
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Keys:
    """The token, and the sessions of those who have shown it; None as token for no need of one."""

    def __init__(self, token: str | None):
        self.token = None if token is None else _digest(token.encode())
        self.session = secrets.token_urlsafe(32)

    def is_token(self, given: str) -> bool:
        """Whether this is the token; takes as long for a wrong one."""
        if self.token is None:
            return False
        return hmac.compare_digest(_digest(given.encode("utf-8", "replace")), self.token)

    def admits(self, headers: dict[str, str]) -> bool:
        """Whether a request may pass."""
        if self.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_token(given.strip()):
            return True
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        own = _digest(self.session.encode())
        value = morsel.value if morsel is not None else ""
        return hmac.compare_digest(_digest(value.encode("utf-8", "replace")), own)


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def host_of(value: str) -> str:
    """The name or address in a Host header, without its port."""
    if value.startswith("["):
        return value[1:].partition("]")[0].lower()
    return value.rpartition(":")[0].lower() if ":" in value else value.lower()


def is_known_host(value: str, allowed: Iterable[str]) -> bool:
    """Whether a Host header is one by which no other site's page can reach the server.

    A page can have its own name lead here (DNS rebinding), but neither localhost nor an address.
    """
    name = host_of(value)
    if name == "localhost" or name in {host_of(host) for host in allowed}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Gate:
    """ASGI: refuses what may not pass, and answers with a problem where something was raised.

    Args:
      app: the routes; connections: how many are open now.
    """

    def __init__(
        self,
        app: Any,
        cfg: ServeConfig,
        keys: Keys,
        meters: Meters,
        connections: Callable[[], int] = lambda: 0,
    ):
        self.app, self.keys, self.meters = app, keys, meters
        self.connections = connections
        self.allowed = [*(cfg.allowed_hosts or ()), cfg.host]
        self.large = cfg.max_body_megabytes * MEGA

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        began, status, has_begun = time.monotonic(), 500, False

        async def send_on(message: Any) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                own = {name.lower() for name, _ in message.get("headers", ())}
                extra = [
                    (name.lower().encode(), value.encode())
                    for name, value in HEADERS.items()
                    if name.lower().encode() not in own
                ]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            headers = self.check(scope)
            await self.app(scope, self.counted(scope, headers, receive), send_on)
        except asyncio.CancelledError:
            status = 499  # the client has gone, or the server ends
            raise
        except BaseExceptionGroup as group:
            await self._answer(group.exceptions[0], has_begun, send_on)
        except Exception as error:
            await self._answer(error, has_begun, send_on)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.monotonic() - began
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.meters.answered(method, route, status, seconds)
            log.info("%s %s %d %.0f ms", method, route, status, 1000 * seconds)

    def check(self, scope: dict) -> dict[str, str]:
        """The headers of a request that may pass.

        Raises:
          HttpProblem: it may not.
        """
        if (count := self.connections()) > CONNECTIONS:
            raise busy(f"{count} connections are open, and {CONNECTIONS} may be", 5.0)
        pairs = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"]]
        headers = dict(pairs)
        hosts = [value for name, value in pairs if name == "host"]
        if len(hosts) != 1 or not is_known_host(hosts[0], self.allowed):
            raise HttpProblem(
                "bad-host",
                "the Host of the request is none of this server's: call it by its address, as "
                "localhost, or by a name that it was told of",
            )
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        is_own = origin in (None, f"{scope['scheme']}://{hosts[0]}")
        # A proxy that ends TLS speaks plain HTTP here.
        is_own = is_own or origin == f"https://{hosts[0]}"
        is_visit = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
        if not is_own or (site in ("cross-site", "same-site") and not is_visit):
            raise HttpProblem("forbidden", "a page of another site may not use this server")
        path = scope["path"]
        is_open = path in OPEN or path.startswith(OPEN_BELOW)
        if not is_open and not self.keys.admits(headers):
            raise HttpProblem(
                "unauthorised", "send the header Authorization: Bearer TOKEN, or log in"
            )
        length = headers.get("content-length")
        if length is not None and length.isascii() and length.isdigit():
            self._check_size(int(length), self.most(path))
        return headers

    def most(self, path: str) -> int:
        """Bytes that the body of a request may have."""
        return self.large if path in UPLOADS else SMALL_BODY

    def _check_size(self, size: int, most: int) -> None:
        if size > most:
            raise HttpProblem(
                "too-large",
                f"the body has {size} bytes or more, and this server takes {most} at most",
            )

    def counted(self, scope: dict, headers: dict[str, str], receive: Receive) -> Receive:
        """`receive`, which refuses a body that is too large or too slow."""
        most, size, is_whole = self.most(scope["path"]), 0, False
        until = time.monotonic() + BODY_SECONDS

        async def receive_on() -> Any:
            nonlocal size, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise HttpProblem(
                    "timeout", f"the request did not arrive within {BODY_SECONDS:.0f} s"
                ) from None
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
                self._check_size(size, most)
            return message

        return receive_on

    async def _answer(self, error: BaseException, has_begun: bool, send: Send) -> None:
        """Answers with what was wrong, if nothing was sent yet."""
        problem = as_problem(error)
        if has_begun:
            return
        body = json.dumps(problem.as_dict()).encode()
        own = {"content-type": MEDIA, "content-length": str(len(body)), "connection": "close"}
        pairs = {**own, **problem.headers()}
        headers = [(name.lower().encode(), value.encode()) for name, value in pairs.items()]
        await send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
