"""Shared ID-Enhancers for tests: random ones, whose predictions differ from face to face."""

import shutil
from pathlib import Path

import jax
import numpy as np

from idea_jax.faces import random_model
from idea_jax.formats import enhancer as enhancers
from idea_jax.method import shared
from idea_jax.models import sd
from idea_jax.pytrees import tree_digest
from idea_jax.runtime.files import file_digest

NAMES = 5
BASIS = 3  # directions of the names


def config(dim: int, kind: str = "mlp", dim_2: int = 0) -> shared.EnhancerConfig:
    return shared.EnhancerConfig(kind, dim, width=16, kv_rank=2, dim_2=dim_2, basis=BASIS)


def config_for(model: sd.StableDiffusion, kind: str = "mlp") -> shared.EnhancerConfig:
    widths = [text.hidden_size for text in model.encoders]
    return config(widths[0], kind, sum(widths[1:]))


def tree(cfg: shared.EnhancerConfig, model: sd.StableDiffusion, seed: int = 0) -> shared.Shared:
    """A shared tree as training could leave it: nothing of it is zero."""
    rng = np.random.default_rng(seed)

    def normal(width, *shape):
        return rng.normal(0, 0.02, (*shape, cfg.num_tokens, width)).astype(np.float32)

    start = cfg.each(normal)
    names = cfg.each(lambda width: normal(width, NAMES))
    scale = cfg.each(lambda _: 0.02)
    fresh = shared.init_shared(cfg, model, jax.random.key(seed), start, scale, names)

    def trained(leaf):
        return np.asarray(leaf) + rng.normal(0, 0.1, leaf.shape).astype(np.float32)

    return {k: jax.tree.map(trained, v) if k in shared.TRAINED else v for k, v in fresh.items()}


def about(**changes) -> dict:
    values = {
        "base_model": "tiny",
        "revision": None,
        "base_weights": "0" * 64,
        "face_model": "0" * 64,
        "people": 3,
        "pictures": 6,
        "steps": 1,
        "sources": ["drawn"],
        "licence": "for tests",
        "versions": {},
    }
    return values | changes


def add_to(folder: Path, seed: int = 0, **changes) -> Path:
    """Writes an enhancer for a checkpoint with a face model into its folder; returns its path."""
    model, frozen = sd.load(folder)
    cfg = config_for(model)
    (face_model,) = (folder / "face").glob("*.onnx")
    known = {
        "base_weights": tree_digest(frozen.cross_kv),
        "face_model": file_digest(face_model),
    }
    path = folder / enhancers.FILE
    enhancers.write(path, cfg, tree(cfg, model, seed), about(**known | changes))
    return path


def copy_with_one(plain: Path, folder: Path) -> Path:
    """A copy of a checkpoint, with a face model and an enhancer."""
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    if not (folder / "face").is_dir():
        random_model.write_random_recogniser(folder / "face" / "arcface.onnx")
    add_to(folder)
    return folder
