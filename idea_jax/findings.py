"""What of this machine a run would stumble over: the library of `idea-doctor`."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax

from idea_jax.config import reading
from idea_jax.config.settings import COMPUTE_DTYPES, TrainConfig
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.errors import InputError
from idea_jax.faces import packs
from idea_jax.faces.models import KNOWN_SHA256, FaceError, inspect
from idea_jax.formats import enhancer as enhancers
from idea_jax.launch import describe
from idea_jax.models import flash, hub, sd
from idea_jax.models.tensor_files import TensorFiles, find_weights
from idea_jax.runtime import compile_cache, devices, memory
from idea_jax.runtime.files import WriteError, check_writable
from idea_jax.training import program as programs
from idea_jax.training.start import how_read, method_of, optimizer_of, settle

OK, NOTE, WRONG = "ok", "note", "wrong"
FAMILIES = {768: "1.x", 1024: "2.x"}  # of Stable Diffusion, by the text encoder's width


class Finding(NamedTuple):
    """One line: what was looked at, `OK`, `NOTE` or `WRONG`, and what was found."""

    what: str
    level: str
    text: str


def packages() -> Iterator[Finding]:
    """Python and the packages, against the versions that were tested."""
    from packaging.requirements import Requirement

    yield Finding("python", OK, platform.python_version())
    for line in importlib.metadata.requires("idea-jax") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            how = f"pip install '{needed.name}{needed.specifier}'"
            yield Finding(needed.name, WRONG, f"it is not installed: {how}")
            continue
        if needed.specifier.contains(version, prereleases=True):
            yield Finding(needed.name, OK, version)
        else:
            text = f"{version}, tested with {needed.specifier}: "
            how = f"pip install '{needed.name}{needed.specifier}'"
            yield Finding(needed.name, WRONG, text + how)


def machine() -> Iterator[Finding]:
    """The devices of JAX, and their memory."""
    try:
        devices.check_backend()
    except InputError as error:
        yield Finding("devices", WRONG, str(error))
        return
    found = jax.local_devices()
    limit = memory_limit()
    each = memory.gigabytes(limit) if limit else "an unknown size"
    shared = "shared by all" if found[0].platform == "cpu" else "each"
    text = f"{len(found)} x {found[0].device_kind} ({found[0].platform}), {each} {shared}"
    yield Finding("devices", OK, text)
    wish = memory.wish_for_huge_pages()
    if found[0].platform == "cpu" and wish:
        text = (
            f"with {memory.TUNABLES}={wish} in the environment this system would give pages of 2 "
            "MB; a training of several people at once, or one whose calls take more than 64 MB on "
            "each core, can be a quarter faster then"
        )
        yield Finding("pages", NOTE, text)


def face_models(checkpoint: Path | None) -> Iterator[Finding]:
    """The packs that a run would find, and whether their files are those that are known."""
    root = packs.packs_folder()
    folders = [root / name for name in packs.PACKS] if root is not None else []
    if checkpoint is not None:
        folders.append(checkpoint / "face")
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        text = (
            "none is installed: training with a face needs --face_model_dir PACK or "
            "--accept_face_licence; --profile cross_init needs none"
        )
        yield Finding("face models", NOTE, text)
    for folder in folders:
        for path in sorted(folder.glob("*.onnx")):
            known = KNOWN_SHA256.get(path.name)
            try:
                inspect(path, known)
                level, text = OK, "the file that is known by this name"
                if known is None:
                    text = "its hash is not known; that says nothing against it"
            except FaceError as error:
                level, text = WRONG, str(error)
            yield Finding(f"{folder.name}/{path.name}", level, text)


def network() -> Iterator[Finding]:
    """Whether the Hub can be reached; asked for by opening a connection, without a request."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding("Hub", NOTE, "HF_HUB_OFFLINE is set: only what is in its cache can be used")
    elif hub.reachable(constants.ENDPOINT):
        yield Finding("Hub", OK, f"{constants.ENDPOINT} answers")
    else:
        yield Finding(
            "Hub", NOTE, f"{constants.ENDPOINT} cannot be reached: only its cache is left"
        )


def caches() -> Iterator[Finding]:
    """The folders in which downloads and compiled programs are kept."""
    from huggingface_hub import constants

    named = [("cache of the Hub", Path(constants.HF_HUB_CACHE))]
    try:
        named.append(("compiled programs", compile_cache.user_folder()))
    except RuntimeError as error:  # a user without a home
        yield Finding("compiled programs", NOTE, f"they are not kept: {error}")
    for name, folder in named:
        level, text = OK, f"{folder}, {size_of(folder)}"
        try:
            check_writable(folder)  # which leaves nothing behind
        except WriteError as error:
            level, text = NOTE, str(error)
        yield Finding(name, level, text)


def size_of(folder: Path) -> str:
    """What the files of a folder take; a link's file is counted where it lies."""
    if not folder.is_dir():
        return "not made yet"
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent) / name
            try:
                total += 0 if path.is_symlink() else path.stat().st_size
            except OSError:  # just deleted, or not ours
                continue
    return memory.gigabytes(total)


def checkpoint(cfg: TrainConfig) -> Iterator[Finding]:
    """Whether a checkpoint can be read, and what it is; its weights are opened and not loaded."""
    try:
        found = hub.resolve_for(cfg)
        model = sd.read_configs(found.folder, **how_read(cfg))
        # One file is open already.
        for part, stem in hub.weights_of(found.folder) if found.folder.is_dir() else ():
            TensorFiles(find_weights(found.folder / part, stem, cfg.variant))
        length = model.text.max_position_embeddings
        load_tokenizer(found.tokenizer, model.text.vocab_size, length, found.padding)
    except (InputError, OSError) as error:
        yield Finding("checkpoint", WRONG, describe(error))
        return
    family = "XL" if model.text_2 is not None else FAMILIES.get(model.text.hidden_size)
    kind = f"Stable Diffusion {family}" if family else "of a size of its own"
    side = model.unet.sample_size * model.vae.downscale
    text = f"{found.name}, {kind}, predicts {model.schedule.prediction_type}, {side} pixels"
    yield Finding("checkpoint", OK, text)
    yield enhancer(found.folder, model)


def enhancer(folder: Path, model: sd.StableDiffusion) -> Finding:
    """Whether a checkpoint has a shared ID-Enhancer that can be used."""
    what = "shared ID-Enhancer"
    path = enhancers.find("auto", folder)
    if path is None:
        return Finding(what, NOTE, "the checkpoint has none: people take more steps")
    try:
        enhancers.check(enhancers.read(path), model, path, face_model=None)
    except InputError as error:
        return Finding(what, WRONG, str(error))
    return Finding(what, OK, "the checkpoint has one")


def people_in_a_step(cfg: TrainConfig) -> Iterator[Finding]:
    """How many people a step takes on one device: the step is compiled for one and for two."""
    name = "people in a step"
    try:
        folder = hub.resolve_for(cfg).folder
        alone, both = (step_bytes(cfg, folder, count) for count in (1, 2))
    except (InputError, OSError) as error:
        yield Finding(name, WRONG, describe(error))
        return
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        yield Finding(name, WRONG, f"not even two: {memory.describe_memory(error, None)}")
        return
    limit = memory_limit()
    if limit is None:
        yield Finding(name, NOTE, "the memory of this machine is not known")
        return
    fit = people_that_fit(alone, both, limit)
    one, more, there = map(memory.gigabytes, (alone, both - alone, limit))
    text = (
        f"{fit} on a device of {there}: one takes {one}, each further one {more} (profile "
        f"{cfg.profile}, batch {cfg.train_batch_size}, --mixed_precision {cfg.mixed_precision})"
    )
    yield Finding(name, OK if fit else WRONG, text)


def memory_limit() -> int | None:
    """Bytes that programs on one device of this process may use; None if not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["bytes_limit"] if "bytes_limit" in stats else memory.host_memory()


def people_that_fit(one: int, two: int, limit: int) -> int:
    """How many people fit into a memory, from the bytes that steps of one and of two need."""
    if one > limit:
        return 0
    return 1 + (limit - one) // max(two - one, 1)


def step_bytes(cfg: TrainConfig, folder: Path, count: int) -> int:
    """Bytes that the step of so many people needs on one device, the frozen weights included."""
    cfg, enhancer = settle(cfg, folder)
    cfg = replace(cfg, max_train_steps=max(cfg.max_train_steps, 1))
    method, dtype = method_of(cfg, enhancer), COMPUTE_DTYPES[cfg.mixed_precision]
    attention = flash.resolve(cfg.attention, jax.local_devices()[0], dtype)
    model = replace(sd.read_configs(folder, dtype, **how_read(cfg)), attention=attention)
    mesh = devices.layout({"identity": 1, "data": 1}, count, count, cfg.train_batch_size).mesh
    program = programs.Program(
        model,
        method,
        optimizer_of(cfg, method),
        cfg.train_batch_size,
        mesh,
        steps_per_call=devices.steps_per_call(),
    )
    shape = programs.Shape(count, 1, model.unet.sample_size * model.vae.downscale)
    lowered = programs.lower_step(program, shape, cfg.seed, enhancer)
    return compile_cache.bytes_needed(lowered.compile())


def examine(of_model: dict | None, step: dict | None) -> Iterator[Finding]:
    """All findings, in order.

    Args:
      of_model: settings of a training that name a checkpoint and say how it is read; None to look
        at none.
      step: settings of a training whose step is compiled, to count the people that fit into it.
    """
    yield from packages()
    yield from machine()
    folder = None
    given = (of_model or {}) | {"train_data_dir": "."}
    if of_model is not None:
        cfg = reading.build(TrainConfig, {}, given)
        found = list(checkpoint(cfg))
        yield from found
        if found[0].level == OK:
            folder = hub.resolve_for(cfg).folder
    yield from face_models(folder)
    yield from network()
    yield from caches()
    if step is not None and folder is not None:
        yield from people_in_a_step(reading.build(TrainConfig, {}, given | step))
