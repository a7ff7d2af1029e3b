"""People to try: photos of a folder that the page offers, read once and served from memory."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from idea_jax.data import folders
from idea_jax.data.images import ImageError
from idea_jax.serve.photos import uploads
from idea_jax.serve.problems import HttpProblem
from idea_jax.serve.school import Pupil
from idea_jax.serve.service import Service
from idea_jax.serve.settings import ServeConfig
from idea_jax.serve.shelf import NAME

log = logging.getLogger(__name__)

PEOPLE, PHOTOS = 8, 4  # that are offered, at most
Examples = Mapping[str, Sequence[bytes]]


def read_examples(folder: Path) -> Examples:
    """The photos of each person of a folder, as PNG files; by the names of their sub-folders.

    Raises:
      ImageError: the folder has no people, or one of their names is no name here.
    """
    found: dict[str, list[bytes]] = {}
    people = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for place in people[:PEOPLE]:
        if not NAME.fullmatch(place.name):
            raise ImageError(
                f"{place} is no name of a person: take small letters, digits, - and _, a letter or "
                "digit first"
            )
        photos = folders.list_images(place)[0][:PHOTOS]
        found[place.name] = [path.read_bytes() for path in photos if path.suffix == ".png"]
    if not any(found.values()):
        raise ImageError(f"{folder} has no folders of people with PNG photos")
    return {name: photos for name, photos in found.items() if photos}


def example_routes(examples: Examples) -> Any:
    """A router of what is below /v1/examples."""
    from fastapi import APIRouter
    from fastapi.responses import Response

    router = APIRouter(tags=["people"])

    @router.get("/v1/examples")
    async def offered() -> dict[str, Any]:
        """People to try, and where their photos are."""
        return {
            "people": [
                {"name": name, "photos": [f"/v1/examples/{name}/{i}" for i in range(len(photos))]}
                for name, photos in examples.items()
            ]
        }

    @router.get("/v1/examples/{name}/{index}", response_class=Response)
    async def photo(name: str, index: int) -> Response:
        """A photo of somebody to try."""
        photos = examples.get(name, ())
        if not 0 <= index < len(photos):
            raise HttpProblem("not-found", "there is no such photo")
        return Response(photos[index], media_type="image/png")

    return router


def learn_examples(service: Service, examples: Examples) -> None:
    """Has those people learned, without a step where that can be; only if nobody is there yet."""
    if service.shelf.residents:
        return
    cfg: ServeConfig = service.cfg
    for name, photos in examples.items():
        sent = tuple(uploads(cfg, photos, [None] * len(photos)))
        steps = 0 if service.enhancer is not None else cfg.learn_steps
        try:
            service.learn(
                Pupil(
                    name=name,
                    photos=sent,
                    steps=steps,
                    seed=0,
                    keeps_photos=True,
                    keeps_face=True,
                    shows=False,
                    replaces=False,
                )
            )
        except HttpProblem as problem:
            log.warning("%s is not learned: %s", name, problem)
