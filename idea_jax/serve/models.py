"""What the routes take and answer, as OpenAPI describes it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]


class Strict(BaseModel):
    """What clients send: a field that nobody knows is refused."""

    model_config = ConfigDict(extra="forbid")


class RowAsked(Strict):
    """One picture. What it leaves out is as the server's settings say (GET /v1/info)."""

    identity: str = Field(description="a person; or several, with commas between them")
    prompt: str = Field(description="with {} for one person, or {NAME} for each of several")
    negative_prompt: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**32)
    number: int | None = Field(None, ge=0, lt=2**31, description="which picture of the seed")
    height: int | None = Field(None, ge=1, le=8192)
    width: int | None = Field(None, ge=1, le=8192)
    num_inference_steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: Number | None = Field(None, ge=0)
    id_strength: Number | None = Field(None, ge=0)
    scheduler: str | None = None


class ImagesAsked(Strict):
    """Pictures to draw."""

    rows: list[RowAsked] = Field(min_length=1)
    picture: Literal["png", "webp", "jpeg"] = "png"
    likeness: bool = Field(False, description="say how alike each is to its person")
    keep: bool = Field(False, description="keep them on the server, and answer with their ids")
    stream: bool = Field(False, description="answer with server-sent events")


class SessionAsked(Strict):
    """A token, for a cookie."""

    token: str = Field(max_length=4096)


class PartProblem(BaseModel):
    where: str
    detail: str


class ProblemTold(BaseModel):
    """What is wrong: RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[PartProblem]


class SessionTold(BaseModel):
    required: bool
    authenticated: bool


class FaceTold(BaseModel):
    number: int = Field(description="from the left")
    box: list[float] = Field(description="left, top, right, bottom in pixels")
    score: float


class PhotoTold(BaseModel):
    index: int
    width: int | None
    height: int | None
    faces: list[FaceTold]
    chosen: int | None
    problem: str | None


class PhotosTold(BaseModel):
    photos: list[PhotoTold]


class IdentityTold(BaseModel):
    name: str
    created: str
    steps: int
    photos: int
    kept_photos: int
    keeps_face: bool
    model: str
    profile: str
    placeholder: str
    bytes: int
    sha256: str
    seconds: float | None
    cover: str | None
    cover_likeness: float | None


class IdentitiesTold(BaseModel):
    identities: list[IdentityTold]


class DeletedTold(BaseModel):
    name: str
    files: list[str] = Field(description="that were deleted, below the server's folder")
    pictures: int
    cache_entries: int
    jobs: list[str] = Field(description="of the person; none is listed any more")
    was_being_learned: bool = Field(description="whether a job was learning them, which has ended")


class PictureTold(BaseModel):
    row: int | None
    id: str | None
    url: str | None
    data: str | None = Field(description="base64, of pictures that are not kept")
    type: str
    bytes: int
    sha256: str
    likeness: dict[str, float] | None
    created: str
    about: dict[str, Any]


class ImagesTold(BaseModel):
    job: str
    pictures: list[PictureTold]


class PicturesTold(BaseModel):
    pictures: list[PictureTold]
    next: str | None


class PreviewTold(BaseModel):
    step: int
    url: str
    likeness: float | None


class JobTold(BaseModel):
    id: str
    kind: Literal["learn", "draw"]
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    created: str
    started: str | None
    ended: str | None
    stage: str
    done: int
    total: int
    unit: Literal["steps", "pictures"]
    position: int | None
    name: str | None
    loss: float | None
    previews: list[PreviewTold]
    problem: ProblemTold | None
    identity: str | None


class JobsTold(BaseModel):
    jobs: list[JobTold]


class StatusTold(BaseModel):
    status: str
