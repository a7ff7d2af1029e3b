"""Multipart forms with photos, which stay in memory."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from idea_jax.serve.problems import HttpProblem
from idea_jax.serve.settings import MEGA, ServeConfig

FIELDS = 20  # of a form, besides its photos, at most
FIELD_BYTES = 100_000
TRUE, FALSE = ("true", "1", "on", "yes"), ("false", "0", "off", "no", "")
AT_ONCE = 8  # forms that are read at the same time: each may be as large as a request may be
FILE = {"type": "string", "format": "binary"}


class _InMemory(MultiPartParser):
    spool_max_size = 2**40  # photos are written to no file


@dataclass(frozen=True)
class SentForm:
    """What a form holds: the fields by their names, and the photos in order."""

    fields: Mapping[str, str]
    photos: Sequence[bytes]

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false.

        Raises:
          HttpProblem: it is neither.
        """
        value = self.fields.get(name)
        if value is None:
            return default
        if value.lower() not in (*TRUE, *FALSE):
            raise field_problem(name, f"expected true or false, got {value[:40]!r}")
        return value.lower() in TRUE

    def number(self, name: str, default: int, most: int) -> int:
        """A field that is a number from 0 to `most`.

        Raises:
          HttpProblem: it is not.
        """
        value = self.fields.get(name)
        if value is None or value == "":
            return default
        if not (value.isascii() and value.isdigit() and len(value) < 12) or int(value) > most:
            raise field_problem(name, f"expected a number from 0 to {most}, got {value[:40]!r}")
        return int(value)

    def chosen(self, photos: int) -> list[int | None]:
        """The field `faces`: a number of a face, or null, for each photo.

        Raises:
          HttpProblem: it is no such list.
        """
        text = self.fields.get("faces")
        if not text:
            return [None] * photos
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or len(found) != photos or not all(map(_is_face, found)):
            raise field_problem(
                "faces", f"expected a JSON list of {photos} numbers or null, one for each photo"
            )
        return found


def _is_face(value: Any) -> bool:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value is None or (is_number and 0 <= value < 1000)


def field_problem(name: str, detail: str) -> HttpProblem:
    """The problem of one field of a form."""
    return HttpProblem("invalid", f"{name}: {detail}", [{"where": name, "detail": detail}])


class FormReader:
    """Reads forms, a few at the same time."""

    def __init__(self, cfg: ServeConfig):
        self.cfg, self.room = cfg, asyncio.Semaphore(AT_ONCE)

    async def read(self, request: Request, known: Sequence[str]) -> SentForm:
        """A form with some of the fields that are known, and photos.

        Raises:
          HttpProblem: it is no form, damaged, or holds too much, or what nobody knows.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "multipart/form-data":
            raise HttpProblem(
                "unsupported-media", f"expected multipart/form-data, got {kind[:80] or 'nothing'}"
            )
        async with self.room:
            parser = _InMemory(
                request.headers,
                request.stream(),
                max_files=self.cfg.max_photos + 1,
                max_fields=FIELDS,
                max_part_size=FIELD_BYTES,
            )
            try:
                parsed = await parser.parse()
            except (MultiPartException, UnicodeError, ValueError) as error:
                text = getattr(error, "message", None) or "it is damaged"
                if text.startswith("Too many files"):
                    raise self._too_many() from error
                raise HttpProblem("bad-request", f"the form cannot be read: {text}") from error
            return await self._form(parsed.multi_items(), known)

    async def _form(self, items: Sequence[tuple[str, Any]], known: Sequence[str]) -> SentForm:
        fields: dict[str, str] = {}
        photos: list[bytes] = []
        for name, value in items:
            if isinstance(value, UploadFile):
                if name != "photos":
                    raise field_problem(name[:80], "no file of this name is known, but photos")
                photos.append(await self._photo(value, len(photos)))
            elif name == "photos" and value == "":
                continue  # what browsers send of a field without a file
            elif name not in known:
                raise field_problem(name[:80], f"expected some of {', '.join((*known, 'photos'))}")
            elif name in fields:
                raise field_problem(name, "it is there twice")
            else:
                fields[name] = value
        if len(photos) > self.cfg.max_photos:
            raise self._too_many()
        return SentForm(fields, photos)

    def _too_many(self) -> HttpProblem:
        return field_problem("photos", f"this server takes {self.cfg.max_photos} at most")

    async def _photo(self, file: UploadFile, number: int) -> bytes:
        most = self.cfg.max_photo_megabytes * MEGA
        data = await file.read()
        await file.close()
        if len(data) > most:
            detail = (
                f"photo {number + 1} has {len(data)} bytes, and this server takes {most} at most: "
                "scale it down"
            )
            where = {"where": f"photos[{number}]", "detail": detail}
            raise HttpProblem("too-large", detail, [where])
        return data


def described(fields: Mapping[str, str], required: Sequence[str]) -> dict[str, Any]:
    """A form as OpenAPI describes it.

    Args:
      fields: what each is, by its name; besides the photos.
    """
    properties: dict[str, Any] = {
        name: {"type": "string", "description": text} for name, text in fields.items()
    }
    properties["photos"] = {"type": "array", "items": FILE}
    schema = {"type": "object", "properties": properties, "required": list(required)}
    content = {"multipart/form-data": {"schema": schema | {"additionalProperties": False}}}
    return {"requestBody": {"required": True, "content": content}}
