"""What a server says of itself: its settings and limits, and a page of its routes."""

import html
from typing import Any

import idea_jax
from idea_jax.config.settings import SCHEDULERS
from idea_jax.mini import captions
from idea_jax.models import hub
from idea_jax.runtime.versions import versions
from idea_jax.sampling.programs import picture_size
from idea_jax.serve.album import PICTURES
from idea_jax.serve.service import Service
from idea_jax.serve.settings import MEGA
from idea_jax.serve.shelf import PEOPLE

EXAMPLES = (
    "a photo of {} on the beach",
    "an oil painting of {}",
    "a photo of {} smiling, in a red jacket",
    "a pencil sketch of {}",
    "{} as an astronaut, cinematic light",
)
LICENCES = (
    ("the program", "MIT"),
    ("Stable Diffusion 1.x", "CreativeML Open RAIL-M; its use restrictions pass on to pictures"),
    ("Stable Diffusion 2.x", "CreativeML Open RAIL++-M; likewise"),
    ("insightface's face models", "non-commercial research only"),
    ("the mini and its made-up people", "MIT"),
)
STORED = (
    (f"{PEOPLE}/NAME/identity.safetensors", "what was learned: biometric data"),
    (f"{PEOPLE}/NAME/face.safetensors", "the face, if it is kept: biometric data"),
    (f"{PEOPLE}/NAME/photos", "the photos, re-encoded, if they are kept"),
    (f"{PEOPLE}/NAME/cover.png", "a drawn picture that stands for the person"),
    (f"{PEOPLE}/NAME", "settings, times and digests of the learning; no prompts"),
    (f"{PICTURES}", "pictures that were to be kept, with their prompts and settings"),
)


def info(service: Service) -> dict[str, Any]:
    """What a client has to know of the server, as `GET /v1/info` answers."""
    cfg, model, sights = service.cfg, service.model, service.sights
    height, width = picture_size(model, cfg.height, cfg.width)
    is_mini = service.found.name == hub.MINI
    examples = [prompt.text for prompt in captions.PROMPTS] if is_mini else list(EXAMPLES)
    return {
        "version": idea_jax.__version__,
        "model": service.found.name,
        "revision": service.found.revision,
        "devices": [device.device_kind for device in service.painter.artist.devices],
        "versions": versions(),
        "defaults": {
            "height": height,
            "width": width,
            "num_inference_steps": cfg.num_inference_steps,
            "guidance_scale": cfg.guidance_scale,
            "guidance_interval": cfg.guidance_interval,
            "guidance_rescale": cfg.guidance_rescale,
            "scheduler": cfg.scheduler or model.schedule.sampler,
            "id_strength": cfg.id_strength,
            "negative_prompt": cfg.negative_prompt,
            "seed": cfg.seed,
            "learn_steps": cfg.learn_steps,
        },
        "limits": {
            "photos": cfg.max_photos,
            "photo_bytes": cfg.max_photo_megabytes * MEGA,
            "photo_pixels": cfg.max_photo_megapixels * MEGA,
            "body_bytes": cfg.max_body_megabytes * MEGA,
            "rows": cfg.max_rows,
            "people_per_row": cfg.max_people_per_row,
            "learn_steps": cfg.max_learn_steps,
            "num_inference_steps": cfg.max_inference_steps,
            "side": cfg.max_side,
            "prompt_letters": cfg.max_prompt_letters,
            "name_letters": 64,
            "people": cfg.max_people,
            "kept_pictures": cfg.max_pictures,
        },
        "schedulers": list(SCHEDULERS),
        "size_multiple": model.vae.downscale,
        "has_enhancer": service.enhancer is not None,
        "has_faces": True,
        "has_own_score_model": sights.judge.recogniser is not sights.finder.recogniser,
        "examples": examples,
        "licences": [{"what": what, "terms": terms} for what, terms in LICENCES],
        "stored": [{"where": where, "what": what} for where, what in STORED],
    }


def page(description: dict[str, Any]) -> str:
    """An HTML page of the routes; it loads nothing from elsewhere.

    Args:
      description: of OpenAPI.
    """
    rows = []
    for path, methods in description["paths"].items():
        for method, about in methods.items():
            text = html.escape(about.get("description") or about.get("summary", ""))
            body = ""
            for kind, content in about.get("requestBody", {}).get("content", {}).items():
                shown = _fields(content["schema"], description)
                body = f"<br><code>{html.escape(kind)}</code>: {shown}"
            rows.append(
                f"<tr><td><b>{method.upper()}</b><td><code>{html.escape(path)}</code>"
                f"<td>{text}{body}</tr>"
            )
    title = html.escape(f"{description['info']['title']} {description['info']['version']}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<h1>{title}</h1><p>{html.escape(description['info']['description'])} All of it for "
        "programs: <a href=/openapi.json>openapi.json</a>.</p>"
        f"<table border=1 cellpadding=6><tr><th>method<th>path<th>what</tr>{''.join(rows)}</table>"
        "</html>\n"
    )


def _fields(schema: dict[str, Any], description: dict[str, Any]) -> str:
    """The fields of a body, with what each is, as HTML."""
    if "$ref" in schema:
        schema = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    told = []
    for name, about in schema.get("properties", {}).items():
        text = about.get("description", "")
        inner = about.get("items", {})
        nested = f" of ({_fields(inner, description)})" if "$ref" in inner else ""
        told.append(f"<code>{html.escape(name)}</code> {html.escape(text)}{nested}")
    return "; ".join(told)
