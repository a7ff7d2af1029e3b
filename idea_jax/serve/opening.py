"""Opening a server: the model, the faces, the people that are there; and what is compiled first."""

import functools
import io
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from idea_jax.config.settings import is_guided
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.faces.models import SIZE, WIDTH
from idea_jax.faces.portraits import Portraits
from idea_jax.faces.table import Sight
from idea_jax.formats import enhancer as enhancers
from idea_jax.formats.identity import Identity
from idea_jax.method import shared
from idea_jax.models import sd
from idea_jax.runtime import compile_cache
from idea_jax.runtime.files import check_writable
from idea_jax.sampling import engine
from idea_jax.sampling.batch import about_model
from idea_jax.sampling.engine import PictureRow
from idea_jax.sampling.plan import NOBODY, open_model
from idea_jax.sampling.programs import choose_sampling, picture_size
from idea_jax.serve.album import Album
from idea_jax.serve.line import Line
from idea_jax.serve.metrics import Meters
from idea_jax.serve.painter import Painter
from idea_jax.serve.photos import Upload, open_sights
from idea_jax.serve.reception import Reception
from idea_jax.serve.school import Pupil, School, refuse_settings
from idea_jax.serve.service import PORTRAIT, Service
from idea_jax.serve.settings import ServeConfig
from idea_jax.serve.shelf import Shelf

log = logging.getLogger(__name__)

ON_CPU, ELSEWHERE = 1, 8  # rows of a device in a call, where nothing is said
WARM = "(warm-up)"


def open_service(cfg: ServeConfig, devices: Sequence[jax.Device] | None = None) -> Service:
    """Everything that a server needs; its thread is not started yet.

    Args:
      devices: that draw; default: all of this process.

    Raises:
      InputError: the model, the face models, the settings or the folder cannot be used.
    """
    check_writable(cfg.data)
    found, model, loading = open_model(cfg)
    row = portrait_row(cfg, model)
    path, enhancer = enhancers.find(cfg.enhancer, found.folder), None
    if path is not None:
        enhancer = enhancers.read(path)
    sights = open_sights(cfg, found.folder)
    if enhancer is not None:
        recogniser = sights.finder.recogniser.sha256
        enhancers.check(enhancer, model, path, face_model=recogniser)
    length = model.text.max_position_embeddings
    plain = load_tokenizer(found.tokenizer, model.text.vocab_size, length, found.padding)
    school = School(cfg, found, model, plain, enhancer, sights)
    refuse_settings(school)
    album = Album(Path(cfg.data), cfg.max_pictures)
    sha256 = enhancer.sha256 if enhancer else None
    shelf = Shelf(Path(cfg.data), model, sha256, album.remove_of)
    reception = Reception(cfg, model, plain, shelf, about_model(cfg, found, model, loading))
    local = list(devices or jax.local_devices())
    each = cfg.batch_size or (ON_CPU if local[0].platform == "cpu" else ELSEWHERE)
    texts = engine.Texts(plain)
    sd.shapes(model)  # once, before two threads ask for them
    kind = engine.Kind(row.sampling, 1, is_guided(row.guidance))
    size = engine.sizes_on(local, each)[0]
    lower = functools.partial(engine.lower_call, model, kind, size, local, each)
    with compile_cache.ahead(lower):
        _, frozen = sd.load(found.folder, **loading)
    ours = shared.frozen_part(enhancer.shared) if enhancer else None
    if enhancer is not None:
        enhancers.warn_of_weights(enhancer, frozen, found.name)
    artist = engine.Engine(model, frozen, texts, each=each, shared=ours, devices=local)
    school.frozen = artist.frozen._replace(shared=ours) if ours else artist.frozen
    school.devices = artist.devices
    for resident in shelf.all():
        artist.add(resident.name, resident.known)
    meters, line = Meters(), Line(cfg.max_queue, cfg.deadline)
    service: Service
    painter = Painter(
        artist,
        line,
        school,
        lambda row, picture: service.deliver(row, picture),
        lambda one, step, picture: service.show(one, step, picture),
        cfg.threads,
        meters.called,
    )
    painter.shown_row = row
    service = Service(
        cfg=cfg,
        found=found,
        model=model,
        enhancer=enhancer,
        sights=sights,
        shelf=shelf,
        album=album,
        reception=reception,
        school=school,
        line=line,
        painter=painter,
        meters=meters,
    )
    return service


def portrait_row(cfg: ServeConfig, model: sd.StableDiffusion) -> PictureRow:
    """A row of nobody in particular, as the settings have it."""
    sampling = choose_sampling(
        model,
        cfg,
        picture_size(model, cfg.height, cfg.width),
        scheduler=cfg.scheduler,
        steps=cfg.num_inference_steps,
        guidance=cfg.guidance_scale,
    )
    return PictureRow(
        (WARM,),
        PORTRAIT,
        sampling,
        negative=cfg.negative_prompt,
        guidance=cfg.guidance_scale,
        strength=cfg.id_strength,
    )


def start(service: Service) -> None:
    """Starts the thread, which compiles what is asked for most before it takes anything else."""
    service.painter.start()

    def ready(future: Future) -> None:
        error = future.exception()
        if error is None:
            service.painter.is_ready.set()
            log.info("ready")
        elif not service.is_stopping.is_set():
            service.fail(error)

    service.painter.errand(lambda: warm_up(service)).add_done_callback(ready)


def warm_up(service: Service) -> None:
    """Learns and draws somebody who does not exist, and forgets them."""
    cfg, school, artist = service.cfg, service.school, service.painter.artist
    if cfg.warm_up == "none":
        return
    row = portrait_row(cfg, service.model)
    # Without a step people begin, and are drawn, by other programs than after some.
    courses = [0] if service.enhancer is not None else []
    if cfg.learn_steps and (cfg.warm_up == "all" or not courses):
        courses.append(cfg.learn_steps)
    for steps in courses:
        pupil, seen = nobody(cfg, steps)
        lesson = school.begin(pupil, seen, Path(cfg.data))
        if steps and cfg.warm_up == "all":
            school.course(steps, 1).lower().compile()  # as an earlier run has kept it
            next(lesson.steps())
            service.painter.compiler.ready.add((steps, lesson.work.shape.photo_slots))
        state = jax.device_get(lesson.learner.state)
        lesson.close()
        who = Identity(
            method=lesson.work.method,
            trainable=state.trainable,
            given=state.given,
            placeholder=NOBODY,
            base_model=service.found.name,
            revision=None,
            seed=0,
            steps=steps,
        )
        artist.add(WARM, engine.person_of(who, WARM))
        kind = artist.texts.kind(row)
        if kind not in service.painter.compiler.ready:
            service.painter.compile(kind)
        artist.warm_up([row])
        service.reception.programs.add((kind, (lesson.work.method,)))
        service.painter.compiler.ready.add(kind)
        artist.remove(WARM)


def nobody(cfg: ServeConfig, steps: int) -> tuple[Pupil, Portraits]:
    """Somebody who does not exist, with a grey photo and a face of noise."""
    from insightface.utils import face_align

    buffer = io.BytesIO()
    Image.new("RGB", (2 * SIZE, 2 * SIZE), "grey").save(buffer, "PNG")
    photo = Upload(buffer.getvalue(), "a grey photo", 4 * SIZE * SIZE)
    points = face_align.arcface_dst + np.float32(SIZE / 2)
    box = np.array([0, 0, SIZE, SIZE], np.float32)
    face = np.random.default_rng(0).normal(size=WIDTH)
    face = (face / np.linalg.norm(face)).astype(np.float32)
    sight = Sight(box, points, 1.0, "", face)
    pupil = Pupil("nobody", (photo,), steps, 0, False, False, False, False)
    return pupil, Portraits([photo], [sight], face)
