"""The routes of `idea-serve`, and what they are called."""

import asyncio
import mimetypes
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

import idea_jax
from idea_jax.serve import described, metrics, models, opening
from idea_jax.serve.gate import COOKIE, Gate, Keys
from idea_jax.serve.problems import MEDIA, HttpProblem, printable, stopping, warming_up
from idea_jax.serve.routes_people import people_routes
from idea_jax.serve.routes_pictures import picture_routes
from idea_jax.serve.service import Service

STUDIO = Path(__file__).resolve().parent / "studio"
TEXT = "text/plain; version=0.0.4; charset=utf-8"
WATCH = 0.5  # seconds between two looks at the requests that wait
CODES_OF_STATUS = {
    400: "bad-request",
    401: "unauthorised",
    403: "forbidden",
    404: "not-found",
    405: "not-allowed",
    413: "too-large",
    415: "unsupported-media",
    422: "invalid",
}


def create_app(service: Service, token: str | None, routers: Sequence[APIRouter] = ()) -> Any:
    """The server as an ASGI application, which starts the service and ends it.

    Args:
      token: that clients must show; None if they need none.
      routers: more routes, beside the server's own.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        opening.start(service)
        watching = asyncio.ensure_future(watch(service))
        yield
        watching.cancel()
        service.refuse()
        await asyncio.to_thread(service.finish, 0.0)

    app = FastAPI(
        title="idea-serve",
        version=idea_jax.__version__,
        description="Learns people from photos, and draws them.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={"default": {"model": models.ProblemTold, "description": "what is wrong"}},
    )
    keys = Keys(token)
    _add_handlers(app)
    app.include_router(people_routes(service))
    app.include_router(picture_routes(service))
    for router in routers:
        app.include_router(router)
    _add_sessions(app, keys)
    _add_states(app, service)
    _add_pages(app, service)
    return Gate(app, service.cfg, keys, service.meters, lambda: service.connections())


async def watch(service: Service) -> None:
    """Tells requests that have waited too long, also while the thread that draws is busy."""
    while True:
        await asyncio.sleep(WATCH)
        service.line.expire()


def problem_answer(problem: HttpProblem) -> JSONResponse:
    """The answer that tells a problem."""
    return JSONResponse(problem.as_dict(), problem.status, problem.headers(), MEDIA)


def _add_handlers(app: FastAPI) -> None:
    @app.exception_handler(HttpProblem)
    async def of_problem(_: Request, problem: HttpProblem) -> Response:
        return problem_answer(problem)

    @app.exception_handler(HTTPException)
    async def of_http(_: Request, error: HTTPException) -> Response:
        code = CODES_OF_STATUS.get(error.status_code, "bad-request")
        problem = HttpProblem(code, str(error.detail))
        answer = problem_answer(problem)
        for name, value in (error.headers or {}).items():
            answer.headers[name] = value
        return answer

    @app.exception_handler(RequestValidationError)
    async def of_validation(_: Request, error: RequestValidationError) -> Response:
        errors = [mistake(one) for one in error.errors()[:20]]
        first = "; ".join(f"{one['where']}: {one['detail']}" for one in errors[:3])
        return problem_answer(HttpProblem("invalid", first, errors))


def mistake(found: dict[str, Any]) -> dict[str, str]:
    """Where something in a request is wrong, and what it is.

    Args:
      found: of pydantic, or of FastAPI where the body is no JSON.
    """
    where, detail = where_of(found["loc"]), found["msg"]
    if found["type"] == "json_invalid":
        place, reason = found["loc"][-1] + 1, found.get("ctx", {}).get("error", "it is damaged")
        where, detail = "body", f"this is no JSON ({reason}, at letter {place})"
    elif found["type"] == "extra_forbidden":
        detail = "no field of this name is known; /docs tells those that are"
    return {"where": where, "detail": printable(detail)}


def where_of(place: tuple) -> str:
    """The place of a mistake, such as rows[2].prompt."""
    parts = place[1:] if place and place[0] in ("body", "query", "path") else place
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return printable(text.lstrip("."))[:200] or "body"


def _add_sessions(app: FastAPI, keys: Keys) -> None:
    @app.get("/v1/session", response_model=models.SessionTold, tags=["session"])
    async def whether_logged_in(request: Request) -> Any:
        """Whether a token is needed, and was shown."""
        admitted = keys.admits(dict(request.headers))
        return {"required": keys.token is not None, "authenticated": admitted}

    @app.post("/v1/session", status_code=204, tags=["session"])
    async def log_in(asked: models.SessionAsked, request: Request) -> Response:
        """Shows the token, for a cookie that stands for it in this browser."""
        if keys.token is not None and not keys.is_token(asked.token):
            await asyncio.sleep(0.5)  # whoever guesses should not do it fast
            raise HttpProblem("unauthorised", "this is not the token of the server")
        answer = Response(status_code=204)
        is_secure = request.url.scheme == "https"
        answer.set_cookie(
            COOKIE, keys.session, httponly=True, samesite="strict", secure=is_secure, path="/"
        )
        return answer

    @app.delete("/v1/session", status_code=204, tags=["session"])
    async def log_out() -> Response:
        """Takes the cookie back."""
        answer = Response(status_code=204)
        answer.delete_cookie(COOKIE, path="/")
        return answer


def _add_states(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_model=models.StatusTold, tags=["server"])
    async def is_alive() -> Any:
        """Whether the server lives."""
        if not service.painter.is_alive() and not service.is_stopping.is_set():
            raise HttpProblem("internal", "the thread that draws has ended: start the server anew")
        return {"status": "alive"}

    @app.get("/readyz", response_model=models.StatusTold, tags=["server"])
    async def is_ready() -> Any:
        """Whether all is compiled, and requests are taken."""
        if service.is_stopping.is_set():
            raise stopping()
        if not service.painter.is_ready.is_set():
            raise warming_up()
        return {"status": "ready"}

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def measured() -> Response:
        """Counts, times and memory, as Prometheus reads them."""
        return Response(service.meters.text(gauges(service)), media_type=TEXT)

    @app.get("/v1/info", tags=["server"])
    async def info() -> dict[str, Any]:
        """What this server is, what it does by itself, and how much may be asked for."""
        return described.info(service)


def gauges(service: Service) -> dict[str, tuple[str, float]]:
    """What is now, for `Meters.text`."""
    return {
        "queue_rows": ("rows that wait", service.line.waiting()),
        "queue_rows_most": ("rows that may wait", service.line.most),
        "learning": ("people who are learned or wait for it", service.learning()),
        "people": ("people who are kept", len(service.shelf.residents)),
        "pictures": ("pictures that are kept", len(service.album.about)),
        "cache_bytes": ("keys and values that are kept", service.painter.artist.known.size),
        "programs": ("kinds of rows that are compiled for", len(service.reception.programs)),
        **metrics.memory(),
    }


def _add_pages(app: FastAPI, service: Service) -> None:
    pages = {
        path.relative_to(STUDIO).as_posix(): path
        for path in sorted(STUDIO.rglob("*"))
        if path.is_file()
    }

    @app.get("/", include_in_schema=False)
    async def first() -> Response:
        return RedirectResponse("/studio/" if pages else "/docs")

    @app.get("/studio", include_in_schema=False)
    async def studio() -> Response:
        return RedirectResponse("/studio/")

    @app.get("/studio/{name:path}", include_in_schema=False)
    async def page(name: str) -> Response:
        # The name is looked up, and never opened.
        path = pages.get(name or "index.html")
        if path is None:
            raise HttpProblem("not-found", "there is no such page")
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        return FileResponse(path, media_type=kind, headers={"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def documented() -> Response:
        return Response(described.page(app.openapi()), media_type="text/html")
