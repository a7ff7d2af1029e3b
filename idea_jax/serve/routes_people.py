"""Routes of people: their photos, learning, and what is kept of them."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from idea_jax.export import PROGRAMS
from idea_jax.serve import forms, models
from idea_jax.serve.photos import Upload, uploads
from idea_jax.serve.problems import HttpProblem
from idea_jax.serve.school import Pupil
from idea_jax.serve.service import UNKEPT, Service
from idea_jax.serve.shelf import COVER, NAME, PHOTOS

LEARNING = {
    "name": "small letters, digits, - and _; at most 64",
    "consent": "true: the person on the photos agreed to it",
    "faces": "JSON list of the number of the face on each photo, from the left, or null",
    "steps": "of learning; 0 takes what the shared ID-Enhancer predicts",
    "seed": "of everything random in learning",
    "preview": "true: draw pictures on the way",
    "keep_photos": "true: keep the photos, re-encoded",
    "keep_face": "true: keep the face, by which likeness is told",
    "replace": "true: replace somebody of this name; without photos, from those that were kept",
}
PICTURE = {"content": {"image/png": {}}, "description": "a picture"}
ZIP = {"content": {"application/zip": {}}, "description": "files for other programs"}


def people_routes(service: Service) -> APIRouter:
    """Routes below /v1/faces and /v1/identities."""
    router, reader = APIRouter(tags=["people"]), forms.FormReader(service.cfg)

    @router.post(
        "/v1/faces",
        response_model=models.PhotosTold,
        openapi_extra=forms.described({}, ["photos"]),
    )
    async def look_for_faces(request: Request) -> Any:
        """Looks for faces on photos. Nothing of them is kept."""
        form = await reader.read(request, ())
        if not form.photos:
            raise forms.field_problem("photos", "expected at least one photo")
        photos = uploads(service.cfg, form.photos, [None] * len(form.photos))
        with service.looker():
            found = [await service.aside(service.looks, service.sights.faces_on, p) for p in photos]
        return {"photos": [{"index": index, **one} for index, one in enumerate(found)]}

    @router.post(
        "/v1/identities",
        status_code=202,
        response_model=models.JobTold,
        openapi_extra=forms.described(LEARNING, ["name", "consent"]),
    )
    async def learn(request: Request) -> Any:
        """Learns somebody from photos. Answers with a job, which can be followed."""
        form = await reader.read(request, tuple(LEARNING))
        pupil = await service.aside(service.small, pupil_of, service, form)
        task = service.learn(pupil)
        return JSONResponse(task.as_dict(), 202, {"Location": f"/v1/jobs/{task.id}"})

    @router.get("/v1/identities", response_model=models.IdentitiesTold)
    async def everybody() -> Any:
        """All people, the newest first."""
        return {"identities": [one.as_dict() for one in service.shelf.all()]}

    @router.get("/v1/identities/{name}", response_model=models.IdentityTold)
    async def somebody(name: str) -> Any:
        """One person."""
        return service.shelf.get(name).as_dict()

    @router.delete("/v1/identities/{name}", response_model=models.DeletedTold)
    async def delete(name: str) -> Any:
        """Deletes all files and cache entries of somebody, and says which."""
        return await service.delete(name)

    @router.get("/v1/identities/{name}/cover", response_class=Response, responses={200: PICTURE})
    async def cover(name: str) -> Response:
        """The picture that stands for somebody."""
        resident = service.shelf.get(name)
        if resident.about.get("cover") is None:
            raise HttpProblem("not-found", "no cover is drawn yet")
        path = resident.folder / COVER
        return await service.file(path, "image/png")

    @router.get(
        "/v1/identities/{name}/photos/{index}", response_class=Response, responses={200: PICTURE}
    )
    async def photo(name: str, index: int) -> Response:
        """A photo that was kept."""
        resident = service.shelf.get(name)
        if not 0 <= index < resident.about.get("kept_photos", 0):
            raise HttpProblem("not-found", "no such photo is kept")
        path = resident.folder / PHOTOS / f"{index}.jpg"
        return await service.file(path, "image/jpeg")

    @router.get("/v1/identities/{name}/export", response_class=Response, responses={200: ZIP})
    async def export(name: str, to: Annotated[list[str] | None, Query()] = None) -> Response:
        """Somebody for diffusers, AUTOMATIC1111 and ComfyUI, as a zip file."""
        programs = to or list(PROGRAMS)
        if wrong := [one for one in programs if one not in PROGRAMS]:
            detail = f"expected some of {', '.join(PROGRAMS)}, got {wrong[0][:40]!r}"
            raise forms.field_problem("to", detail)
        data = await service.aside(service.small, service.export, name, programs)
        attached = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
        return Response(data, media_type="application/zip", headers=attached | UNKEPT)

    return router


def pupil_of(service: Service, form: forms.SentForm) -> Pupil:
    """Whom a form asks to have learned.

    Raises:
      HttpProblem: a field is missing or wrong.
    """
    cfg, name = service.cfg, form.fields.get("name", "")
    if not NAME.fullmatch(name):
        raise forms.field_problem(
            "name", "expected small letters, digits, - and _, a letter or digit first, at most 64"
        )
    if not form.flag("consent", False):
        raise forms.field_problem(
            "consent", "expected true: only those may be learned who agreed to it"
        )
    replaces, data = form.flag("replace", False), form.photos
    if not data and replaces:
        data = kept_photos(service, name)
    if not data:
        raise forms.field_problem("photos", f"expected 1 to {cfg.max_photos} of them")
    photos: Sequence[Upload] = uploads(cfg, data, form.chosen(len(data)))
    default = 0 if service.enhancer is not None else cfg.learn_steps
    steps = form.number("steps", default, cfg.max_learn_steps)
    service.school.check(steps)
    service.school.check_settings(steps)
    return Pupil(
        name=name,
        photos=tuple(photos),
        steps=steps,
        seed=form.number("seed", 0, 2**32 - 1),
        keeps_photos=form.flag("keep_photos", False),
        keeps_face=form.flag("keep_face", False),
        shows=form.flag("preview", True),
        replaces=replaces,
    )


def kept_photos(service: Service, name: str) -> list[bytes]:
    """The photos that were kept of somebody.

    Raises:
      HttpProblem: there is nobody of this name, or none was kept.
    """
    resident = service.shelf.get(name)
    count = resident.about.get("kept_photos", 0)
    if not count:
        raise forms.field_problem("photos", "none were kept of this person: send some")
    return [(resident.folder / PHOTOS / f"{index}.jpg").read_bytes() for index in range(count)]
