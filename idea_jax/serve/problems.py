"""What a client is told when something is wrong: problem details, RFC 9457."""

from collections.abc import Sequence
from typing import Any

from idea_jax.errors import InputError

MEDIA = "application/problem+json"
# Codes of problems: the status, and a title that is the same for all of a code.
CODES = {
    "bad-request": (400, "the request cannot be read"),
    "unauthorised": (401, "a token is needed"),
    "forbidden": (403, "another site may not ask for this"),
    "not-found": (404, "there is no such thing"),
    "not-allowed": (405, "this cannot be done here"),
    "timeout": (408, "the request came too slowly"),
    "conflict": (409, "this does not fit what is there"),
    "too-large": (413, "the request is too large"),
    "unsupported-media": (415, "the request has another form"),
    "bad-host": (421, "the server is not called so"),
    "invalid": (422, "the request cannot be used"),
    "no-face": (422, "a photo has no usable face"),
    "too-busy": (429, "the server is busy"),
    "gone": (499, "the client has gone"),
    "internal": (500, "the server has made a mistake"),
    "compiling": (503, "the program for this is being compiled"),
    "stopping": (503, "the server is stopping, or not ready yet"),
}


class HttpProblem(InputError):
    """Why a request was not answered as it was meant.

    Attributes:
      code: one of `CODES`.
      detail: what was expected, what came, what to do.
      errors: {"where", "detail"} of each part of the request that is wrong.
      retry_after: seconds after which it may be tried again; None if that would not help.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        errors: Sequence[dict[str, str]] = (),
        retry_after: int | None = None,
    ):
        super().__init__(detail)
        self.code, self.detail, self.errors = code, detail, list(errors)
        self.retry_after = retry_after

    @property
    def status(self) -> int:
        """The status of the answer."""
        return CODES[self.code][0]

    def as_dict(self) -> dict[str, Any]:
        """The body of the answer."""
        status, title = CODES[self.code]
        return {
            "type": f"urn:idea_jax:{self.code}",
            "title": title,
            "status": status,
            "detail": printable(self.detail),
            "errors": [{k: printable(v) for k, v in one.items()} for one in self.errors],
        }

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.code == "unauthorised" else {})


def printable(text: str) -> str:
    """A text that has a UTF-8 form: lone surrogates become question marks."""
    return str(text).encode("utf-8", "replace").decode("utf-8")


def _later(code: str, what: str, seconds: float) -> HttpProblem:
    """A problem that is none any more after about so many seconds."""
    wait = max(1, min(600, round(seconds)))
    return HttpProblem(code, f"{what}; try again in about {wait} s", retry_after=wait)


def busy(what: str, seconds: float) -> HttpProblem:
    """The problem of a full queue: to be tried again after about so many seconds."""
    return _later("too-busy", what, seconds)


def compiling(what: str, seconds: float) -> HttpProblem:
    """The problem of the first pictures of a kind, whose program takes so many seconds yet."""
    told = f"{what} are the first of their kind here: their program is still being compiled"
    return _later("compiling", told, seconds)


def warming_up() -> HttpProblem:
    """The problem of a server that compiles what is asked for most."""
    return _later("stopping", "the server is warming up", 5.0)


def stopping() -> HttpProblem:
    """The problem of a server that is told to stop."""
    return HttpProblem(
        "stopping", "the server is stopping: ask again once it is back", retry_after=10
    )
