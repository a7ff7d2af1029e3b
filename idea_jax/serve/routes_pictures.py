"""Routes of pictures and of jobs."""

from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from idea_jax.serve import models, streams
from idea_jax.serve.problems import HttpProblem
from idea_jax.serve.service import UNKEPT, Service, Wants

EVENTS: dict = {"content": {"text/event-stream": {}}}
DRAWN: dict = {
    200: {
        "model": models.ImagesTold,
        "description": "all pictures, or events with stream",
        "content": {"text/event-stream": {}},
    }
}
IMAGES = {"content": {"image/png": {}, "image/webp": {}, "image/jpeg": {}}, "description": "it"}
NO_BUFFER = {"X-Accel-Buffering": "no"}


def picture_routes(service: Service) -> APIRouter:
    """Routes below /v1/images, /v1/pictures and /v1/jobs."""
    router = APIRouter()
    _add_drawing(router, service)
    _add_album(router, service)
    _add_jobs(router, service)
    return router


def _add_drawing(router: APIRouter, service: Service) -> None:
    @router.post("/v1/images", responses=DRAWN, tags=["pictures"])
    async def draw(asked: models.ImagesAsked, request: Request) -> Response:
        """Draws pictures, a row each. If the client goes, what is not drawn is cancelled."""
        rows = [row.model_dump(exclude_none=True) for row in asked.rows]
        jobs = await service.aside(service.desk, service.reception.jobs, rows)
        inbox, total = streams.Inbox(), len(jobs)
        wants = Wants(asked.picture, asked.likeness, asked.keep, None)
        task, ticket = service.draw(jobs, wants, inbox.put)

        def cancel() -> None:
            if not task.has_ended:
                with suppress(RuntimeError):  # the server has ended, and the job with it
                    service.small.submit(task.cancel)

        if asked.stream:
            events = streams.stream_pictures(inbox, total, task, cancel)
            return StreamingResponse(events, media_type="text/event-stream", headers=NO_BUFFER)
        found = await streams.pictures(inbox, total, request, cancel)
        return JSONResponse({"job": task.id, "pictures": found})


def _add_album(router: APIRouter, service: Service) -> None:
    @router.get("/v1/pictures", response_model=models.PicturesTold, tags=["pictures"])
    async def kept(
        identity: str | None = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: str | None = None,
    ) -> Any:
        """Pictures that are kept, the newest first."""
        found = service.album.listed(identity, limit, before)
        return {"pictures": found, "next": found[-1]["id"] if len(found) == limit else None}

    @router.get(
        "/v1/pictures/{key}",
        response_class=Response,
        responses={200: IMAGES},
        tags=["pictures"],
    )
    async def picture(key: str) -> Response:
        """A picture that is kept, with its marks and settings."""
        path, kind = service.album.get(key)
        return await service.file(path, kind)

    @router.delete("/v1/pictures/{key}", status_code=204, tags=["pictures"])
    async def delete(key: str) -> Response:
        """Deletes a picture."""
        await service.aside(service.small, service.album.remove, key)
        return Response(status_code=204)


def _add_jobs(router: APIRouter, service: Service) -> None:
    @router.get("/v1/jobs", response_model=models.JobsTold, tags=["jobs"])
    async def listed() -> Any:
        """The newest jobs of this start of the server."""
        return {"jobs": [task.as_dict() for task in service.tasks.listed()]}

    @router.get("/v1/jobs/{key}", response_model=models.JobTold, tags=["jobs"])
    async def job(key: str) -> Any:
        """How far a job is."""
        return service.tasks.get(key).as_dict()

    @router.delete("/v1/jobs/{key}", response_model=models.JobTold, tags=["jobs"])
    async def cancel(key: str) -> Any:
        """Cancels a job, unless it has ended."""
        task = service.tasks.get(key)
        await service.aside(service.small, task.cancel)
        return task.as_dict()

    @router.get(
        "/v1/jobs/{key}/events",
        response_class=Response,
        responses={200: EVENTS | {"description": "the job, each time it changes"}},
        tags=["jobs"],
    )
    async def events(key: str) -> Response:
        """Server-sent events of a job, until it ends."""
        told = streams.stream_task(service.tasks.get(key))
        return StreamingResponse(told, media_type="text/event-stream", headers=NO_BUFFER)

    @router.get(
        "/v1/jobs/{key}/previews/{step}",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "it"}},
        tags=["jobs"],
    )
    async def preview(key: str, step: int) -> Response:
        """A picture of somebody after a step of learning."""
        found = service.tasks.get(key).previews.get(step)
        if found is None:
            raise HttpProblem("not-found", "there is no picture of this step")
        return Response(found[0], media_type="image/png", headers=UNKEPT)
